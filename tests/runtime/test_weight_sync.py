"""Weights from two real learner ranks over Ray, and what happens when ranks or replicas no longer agree.

The engines are replaced by a receiver that keeps what it is sent and compares digests as they do;
the engines themselves are tested beside their own code.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Ref
from r2m_ray.engines.weights import WeightBucket, WeightDigest, pack_buckets
from r2m_ray.errors import RunError
from r2m_ray.runtime.actors import PolicyActor, RewardActor
from r2m_ray.runtime.device import free_address
from r2m_ray.runtime.weight_sync import ObjectStoreSync
from r2m_ray.runtime.worker_group import Actors, first_difference, require_agreement
from tests.support.spawned import calls, spawned

FLIPPED = "model.layers.1.mlp.down_proj.weight"


class Receiver:
    """Where weights arrive."""

    def __init__(self) -> None:
        self.version = -1
        self.arrived: dict[str, str] = {}

    def begin_weight_update(self, verify: bool) -> None:
        self.arrived, self.digest, self.buckets = {}, WeightDigest(), 0

    def load_bucket(self, sent: Ref[WeightBucket]) -> None:
        bucket = ray.get(sent.handle, timeout=60)
        self.digest.update(bucket)
        self.buckets += 1
        for name, tensor in bucket.tensors():
            self.arrived[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def finish_weight_update(self, version: int, digest: str | None) -> None:
        if digest not in (None, self.digest.hexdigest()):
            raise RunError(f"sent {digest}, arrived {self.digest.hexdigest()}")
        self.version = version

    def seen(self) -> tuple[int, int, dict[str, str]]:
        return self.version, self.buckets, self.arrived


def flip(tensor: Callable[[Any], torch.Tensor]) -> Callable[[Any], None]:
    """Flips the lowest bit of one value inside an actor."""

    def change(actor: Any) -> None:
        with torch.no_grad():
            tensor(actor).view(-1)[7:8].view(torch.int32).bitwise_xor_(1)

    return change


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A policy of 4 MB, so that it takes several buckets of the smallest size."""
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=160, hidden_size=192, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(model).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranks(local_cluster: None) -> Iterator[Actors]:
    with spawned(PolicyActor, "policy") as actors:
        yield actors


@pytest.fixture(scope="module")
def meeting_point(local_cluster: None) -> tuple[str, int]:
    return free_address()


@pytest.fixture(scope="module")
def policy(
    request: pytest.FixtureRequest, ranks: Actors, meeting_point: tuple[str, int], model_dir: Path
) -> Actors:
    """Two ranks of a ZeRO stage, started again in the same processes.

    Under ZeRO-3 every parameter is partitioned, and gathered by both ranks for each bucket.
    """
    config = Config()
    config.policy.ranks = 2
    config.policy.deepspeed = {
        "zero_optimization": {"stage": request.param, "stage3_param_persistence_threshold": 0}
    }
    starts = calls(ranks, "start", *((config, str(model_dir), i, meeting_point, 0.0) for i in range(2)))
    asyncio.run(ranks.settle("start", starts))
    return ranks


@pytest.fixture(scope="module")
def receivers(local_cluster: None) -> Iterator[Actors]:
    with spawned(Receiver, "rollout") as actors:
        yield actors


def sync_of(policy: Actors, receivers: Actors) -> ObjectStoreSync:
    config = Config()
    config.sync.bucket_mb, config.sync.verify_every = 1, 2
    return ObjectStoreSync(config.sync, policy=policy, rollout=receivers)


def seen(receivers: Actors) -> list[tuple[int, int, dict[str, str]]]:
    return asyncio.run(receivers.all("look", "seen"))


@pytest.mark.parametrize("policy", [0, 3], indirect=True)
def test_both_ranks_make_each_bucket_and_every_engine_gets_all_weights(
    policy: Actors, receivers: Actors, model_dir: Path
) -> None:
    sync = sync_of(policy, receivers)
    stats = [asyncio.run(sync(version=version)) for version in (1, 2, 3, 3)]
    # The first sync is always verified, then every second version, and one that is sent again.
    assert [s["verified"] for s in stats] == [1, 1, 0, 1]
    expected = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in load_file(model_dir / "model.safetensors").items()
    }
    for version, buckets, arrived in seen(receivers):
        assert (version, buckets) == (3, stats[0]["buckets"])
        assert arrived == expected
    assert stats[0]["buckets"] > 3


@pytest.mark.parametrize("policy", [0], indirect=True)
def test_a_flipped_bit_of_one_rank_is_reported_by_rank_and_tensor(policy: Actors, receivers: Actors) -> None:
    """A ZeRO-3 rank holds no copy of another's parameters; the other stages do."""
    change = flip(lambda actor: actor._learner._engine.parameters[FLIPPED])
    sync = sync_of(policy, receivers)
    asyncio.run(sync(version=4))
    ray.get(policy.handles[1].__ray_call__.remote(change), timeout=60)
    # Unverified, it passes: the engines get rank 0's weights.
    asyncio.run(sync(version=5))
    with pytest.raises(RunError, match=rf"{FLIPPED} of policy-1 is not that of policy-0.*run\.resume"):
        asyncio.run(sync(version=6))
    assert [version for version, _, _ in seen(receivers)] == [5, 5]
    ray.get(policy.handles[1].__ray_call__.remote(change), timeout=60)
    asyncio.run(sync(version=6))
    assert [version for version, _, _ in seen(receivers)] == [6, 6]


@pytest.mark.parametrize("policy", [0, 3], indirect=True)
def test_weights_that_are_not_finite_never_arrive(policy: Actors, receivers: Actors) -> None:
    def spoil(value: float) -> Callable[[Any], None]:
        def change(actor: Any) -> None:
            engine = actor._learner._engine
            with engine.gathered(engine.parameters[FLIPPED], modify=True):
                engine.parameters[FLIPPED].data[0, 0] = value

        return change

    calls = [handle.__ray_call__.remote(spoil(float("nan"))) for handle in policy.handles]
    ray.get(calls, timeout=60)
    before = [version for version, _, _ in seen(receivers)]
    with pytest.raises(RunError, match=rf"policy weight {FLIPPED}: 1 of \d+ values are NaN or infinite"):
        asyncio.run(sync_of(policy, receivers)(version=9))
    for version, _, arrived in seen(receivers):
        assert version == before[0]
        assert FLIPPED not in arrived


def test_reward_replicas_that_drift_apart_are_reported_by_replica_and_parameter(
    local_cluster: None, tiny_reward_dir: Path
) -> None:
    config = Config()
    config.reward.replicas = 2
    address = free_address()
    with spawned(RewardActor, "reward") as actors:
        starts = calls(
            actors, "start", *((config, str(tiny_reward_dir), 64, i, address, 0.0) for i in range(2))
        )
        asyncio.run(actors.settle("start", starts))
        asyncio.run(require_agreement(actors, "reward update", "head_digests"))
        change = flip(lambda actor: actor._engine.head.w_v)
        ray.get(actors.handles[0].__ray_call__.remote(change), timeout=60)
        with pytest.raises(RunError, match=r"reward update: w_v of reward-1 is not that of reward-0"):
            asyncio.run(require_agreement(actors, "reward update", "head_digests"))


def test_a_rank_that_sends_nothing_takes_part_in_as_many_buckets() -> None:
    tensors = [(f"w{n}", torch.ones(n)) for n in (0, 3, 1, 5, 2, 2)]
    packed = list(pack_buckets(tensors, 48))
    assert [bucket.names for bucket in packed] == [("w0", "w3", "w1"), ("w5", "w2"), ("w2",)]
    assert list(pack_buckets(tensors, 48, pack=False)) == [None, None, None]


def test_the_majority_is_right_and_the_first_tensor_is_named() -> None:
    names = ["policy-0", "policy-1", "policy-2"]
    equal = {"a": "1", "b": "2", "c": "3"}
    assert first_difference(names, [equal, equal, equal]) is None
    assert first_difference(names, [equal | {"b": "x", "c": "x"}, equal, equal]) == (
        "b of policy-0 is not that of policy-1"
    )
    assert first_difference(names, [equal, equal | {"c": "x"}, equal | {"c": "y"}]) == (
        "c of policy-1, policy-2 is not that of policy-0"
    )
