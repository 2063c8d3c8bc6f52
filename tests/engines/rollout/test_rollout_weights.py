"""Weight updates: afterwards the engine is the new policy, and until then it samples nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_model
from rollout_rows import moved, readings, sample_plan
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from r2m_ray.core.batch import SamplePlan
from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.engines.weights import WeightBucket, WeightDigest, pack_buckets
from r2m_ray.errors import RunError

GREEDY = sample_plan(temperature=0.0, group_size=1)


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose output layer is its embedding."""
    return save_model(
        tmp_path_factory.mktemp("tied"),
        Qwen3ForCausalLM,
        seed=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module", params=["untied", "tied"])
def model_dir(request: pytest.FixtureRequest, policy_dir: Path) -> Path:
    directory: Path = policy_dir if request.param == "untied" else request.getfixturevalue("tied_dir")
    return directory


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Any], model_dir: Path) -> Iterator[RolloutEngine]:
    with start_engine(model_dir) as engine:
        yield engine


def changed(model_dir: Path, seed: int) -> PreTrainedModel:
    """The policy of the directory after a large step in a random direction."""
    return moved(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval(), seed)


def buckets(model: PreTrainedModel) -> list[WeightBucket]:
    """Several, some of which end in the middle of a layer."""
    packed = list(pack_buckets(model.named_parameters(), 50_000))
    assert len(packed) > 3
    return packed


def update(engine: RolloutEngine, sent: list[WeightBucket], version: int) -> None:
    digest = WeightDigest()
    engine.begin_weight_update()
    for bucket in sent:
        digest.update(bucket)
        engine.load_bucket(bucket)
    engine.finish_weight_update(version=version, digest=digest.hexdigest())


def assert_is(engine: RolloutEngine, model: PreTrainedModel, plan: SamplePlan, version: int) -> None:
    """Greedy tokens, log-probs and hidden states are the model's, and the version is stamped."""
    ((rows, hidden),) = engine.sample([plan])
    assert rows.version == engine.version == version
    for where, expected, logits in readings(model, rows):
        action = rows.action_T[where]
        assert torch.equal(logits.argmax(-1)[action], rows.label_T[where][action])
        torch.testing.assert_close(hidden.hidden_TP[where], expected, atol=1e-4, rtol=0)


def test_after_an_update_the_engine_is_the_new_policy(engine: RolloutEngine, model_dir: Path) -> None:
    # The first sample leaves the old policy's prefixes in the cache.
    engine.sample([GREEDY])
    for version in (1, 2):
        model = changed(model_dir, version)
        sent = buckets(model)
        before = engine.stats()["sync_bytes"]
        update(engine, sent, version)
        assert engine.stats()["sync_bytes"] - before == sum(bucket.data.numel() for bucket in sent)
        assert_is(engine, model, GREEDY, version)


def test_a_corrupted_tensor_is_caught_and_the_engine_quarantined(
    engine: RolloutEngine, model_dir: Path
) -> None:
    model = changed(model_dir, 3)
    sent = buckets(model)
    digest = WeightDigest()
    for bucket in sent:
        digest.update(bucket)
    version = engine.version
    torn = sent[1].data.clone()
    torn[100] ^= 1
    engine.begin_weight_update()
    for bucket in [sent[0], dataclasses.replace(sent[1], data=torn), *sent[2:]]:
        engine.load_bucket(bucket)
    with pytest.raises(RunError, match="sha256"):
        engine.finish_weight_update(version=3, digest=digest.hexdigest())
    assert engine.version == version
    with pytest.raises(RunError, match="complete update"):
        engine.sample([GREEDY])
    update(engine, sent, 3)
    assert_is(engine, model, GREEDY, 3)


def test_an_incomplete_update_is_refused_and_leaves_nothing_behind(
    engine: RolloutEngine, model_dir: Path
) -> None:
    other, model = changed(model_dir, 4), changed(model_dir, 5)
    engine.begin_weight_update()
    for bucket in buckets(other)[:-1]:
        engine.load_bucket(bucket)
    with pytest.raises(RunError, match=r"lacks \d+ parameters"):
        engine.finish_weight_update(version=4, digest=None)
    with pytest.raises(RunError, match="complete update"):
        engine.sample([GREEDY])
    # Abandoned before its end, in the middle of a layer; once by us, once by vLLM.
    for broken in (False, True):
        engine.begin_weight_update()
        engine.load_bucket(buckets(other)[0])
        engine.load_bucket(buckets(other)[1])
        if broken:
            with pytest.raises(ValueError, match="update_info"):
                engine.receive_weights({"bucket": None})
    with pytest.raises(RunError, match="complete update"):
        engine.sample([GREEDY])
    update(engine, buckets(model), 5)
    assert_is(engine, model, GREEDY, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: ("model.extra.weight", tensor), "unknown or sent twice"),
        (lambda name, tensor: (name, tensor.flatten()), "was expected"),
    ],
)
def test_weights_that_do_not_belong_are_refused(
    engine: RolloutEngine,
    model_dir: Path,
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
    message: str,
) -> None:
    model = changed(model_dir, 6)
    name, tensor = next(iter(model.named_parameters()))
    (bucket,) = pack_buckets([change(name, tensor)], 2**30)
    engine.begin_weight_update()
    with pytest.raises(RunError, match=message):
        engine.load_bucket(bucket)
    with pytest.raises(RunError, match="no weight update is open"):
        engine.finish_weight_update(version=6, digest=None)
    update(engine, buckets(model), 6)
    assert_is(engine, model, GREEDY, 6)


def test_a_parameter_sent_twice_is_refused(engine: RolloutEngine, model_dir: Path) -> None:
    model = changed(model_dir, 7)
    engine.begin_weight_update()
    engine.load_bucket(buckets(model)[0])
    with pytest.raises(RunError, match="sent twice"):
        engine.load_bucket(buckets(model)[0])
    update(engine, buckets(model), 7)
    assert engine.version == 7


def test_an_unhashed_update_is_not_compared(engine: RolloutEngine, model_dir: Path) -> None:
    model = changed(model_dir, 8)
    engine.begin_weight_update(verify=False)
    for bucket in buckets(model):
        engine.load_bucket(bucket)
    with pytest.raises(RunError, match="verify=True"):
        engine.finish_weight_update(version=8, digest="0" * 64)
    engine.begin_weight_update(verify=False)
    for bucket in buckets(model):
        engine.load_bucket(bucket)
    engine.finish_weight_update(version=8, digest=None)
    assert engine.version == 8
