"""Batch arithmetic and memory against hand-calculated numbers, real objects and real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r2m_ray.cli.checks.memory import (
    PROCESS_BYTES,
    ActorMemory,
    ModelSizes,
    actor_memory,
    batch_plan,
    bucket_bytes,
    cached_tokens,
    checkpoint_bytes,
    head_parameters,
    record_bytes,
)
from r2m_ray.cli.checks.plan import sizes_of
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config, OldLogprobs
from r2m_ray.core.batch import pack_rows
from r2m_ray.core.head import R2MHead
from r2m_ray.core.packing import microbatches
from r2m_ray.engines.policy.blocks import grids
from r2m_ray.engines.weights import pack_buckets

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

POLICY = ModelSizes(
    parameters=1_000_000, largest=200_000, width=64, layers=2, feed_forward=128, key_value=64, vocabulary=160
)

REWARD = replace(POLICY, parameters=500_000, largest=100_000, width=48)

MODELS = {"policy": POLICY, "reference": POLICY, "reward": REWARD}


def demo(*overrides: str) -> Config:
    return load_config(["experiment=demo", *overrides])


def actor(config: Config, role: str) -> ActorMemory:
    found = {a.role: a for a in actor_memory(config, batch_plan(config), MODELS)}
    return found[role]


# Batches


def test_batch_arithmetic_by_hand() -> None:
    batch = batch_plan(demo("policy.ranks=2", "rollout.replicas=3", "cluster.cpus=4"))
    assert (batch.rows, batch.shards, batch.rows_per_shard) == (128, 4, 32)
    assert batch.shards_per_replica == {
        "rollout": (1, 2),
        "policy": (2, 2),
        "reference": (4, 4),
        "reward": (4, 4),
    }
    # Two mini-batches of 8 prompts, two epochs.
    assert (batch.minibatches, batch.optimizer_steps) == (2, 4)
    # 64 + 48 tokens, of which the last is never read; 18 such rows fit into 2048 tokens.
    assert (batch.row_tokens, batch.tokens) == (111, 128 * 111)
    assert (batch.rows_per_rank, batch.passes_per_minibatch) == (32, 2)
    # Four training passes, and the second mini-batch is scored for π_old.
    assert batch.policy_passes == (4 + 1) * 2


def test_without_a_scoring_pass_every_pass_trains() -> None:
    config = demo()
    config.algo.old_logp = OldLogprobs.rollout
    batch = batch_plan(config)
    assert batch.policy_passes == batch.optimizer_steps * batch.passes_per_minibatch == 4 * 4


@given(st.lists(st.integers(1, 111), min_size=64, max_size=64), st.integers(1, 1500))
def test_no_layout_needs_more_passes_than_planned(lengths: list[int], budget: int) -> None:
    config = Config()
    config.policy.tokens_per_microbatch = budget
    planned = batch_plan(config)
    assert planned.rows_per_rank == 64
    assert len(grids(lengths, budget)) <= planned.passes_per_minibatch
    assert len(microbatches(lengths, budget)) <= planned.passes_per_minibatch


# Memory


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "weights", "gradients", "optimizer"),
    [
        (0, 1, "float32", 4_000_000, 4_000_000, 8_000_000),
        (0, 2, "float32", 4_000_000, 4_000_000, 8_000_000),
        (1, 2, "float32", 4_000_000, 4_000_000, 6_000_000),
        (2, 1, "float32", 4_000_000, 4_000_000, 12_000_000),
        (2, 2, "float32", 4_000_000, 2_000_000, 6_000_000),
        (2, 2, "bfloat16", 2_000_000, 2_000_000, 6_000_000),
        # ZeRO-3 keeps a share and gathers all of so small a model.
        (3, 1, "float32", 8_000_000, 4_000_000, 12_000_000),
        (3, 2, "float32", 6_000_000, 2_000_000, 6_000_000),
    ],
)
def test_a_learner_rank_by_zero_stage(
    stage: int, ranks: int, dtype: str, weights: int, gradients: int, optimizer: int
) -> None:
    zero = f"+policy.deepspeed.zero_optimization.stage={stage}"
    learner = actor(demo(zero, f"policy.ranks={ranks}", f"model.dtype={dtype}"), "policy")
    assert (learner.count, learner.weights) == (ranks, weights)
    assert (learner.gradients, learner.optimizer) == (gradients, optimizer)
    assert learner.host == PROCESS_BYTES["policy"] + weights + gradients + optimizer + learner.largest_pass
    assert learner.device == learner.buffers == 0


def test_working_memory_of_the_learner_by_hand() -> None:
    learner = actor(demo("policy.ranks=2"), "policy")
    layer = 9 * 64 + 64 + 4 * 128
    states = 2048 * 4 * (2 * layer + layer)
    logits = 4 * 4 * 2048 * 160
    bucket = 1_000_000 * 4
    fresh = 2 * (128 * 111 // 2) * 64 * 4
    assert learner.largest_pass == states + logits + bucket + fresh == 41_191_680


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    layer = 9 * 64 + 64 + 4 * 128
    assert POLICY.activations(10, 2, checkpointing=True) == 10 * 2 * (2 * 64 + 2 * layer) + 16 * 10 * 160


def test_a_checkpoint_in_the_making_is_the_largest_phase_of_a_large_model() -> None:
    config = demo("policy.tokens_per_microbatch=128", "policy.ranks=2")
    # Weight and moments of 100 M parameters, gathered by rank 0.
    models = {**MODELS, "policy": replace(POLICY, parameters=100_000_000)}
    learner = next(a for a in actor_memory(config, batch_plan(config), models) if a.role == "policy")
    assert learner.largest_pass == 1_200_000_000


def test_a_rollout_engine_holds_cache_and_exported_states() -> None:
    engine = actor(demo(), "rollout")
    # 2048 blocks of 32: keys and values of two layers; a state with its token and position.
    assert engine.cache == 2048 * 32 * (2 * 64 * 4 + 64 * 4 + 16)
    assert engine.host == engine.process + engine.weights + 2048 * 32 * (768 + 16) + engine.largest_pass
    for other in ("reward=vanilla", "feedback.source=learner"):
        assert actor(demo(other), "rollout").cache == 2048 * 32 * 2 * 64 * 4


def test_a_tensor_parallel_rank_holds_its_own_columns() -> None:
    gpus = ("cluster.gpus_per_rollout=2", "+rollout.engine_args.distributed_executor_backend=mp")
    engine = actor(demo(*gpus, "+rollout.engine_args.tensor_parallel_size=2"), "rollout")
    assert engine.weights == 4_000_000 // 2
    assert engine.cache == 2048 * 32 * (64 * 4 + 32 * 4 + 16)
    assert engine.device == engine.weights + 2048 * 32 * (64 * 4 + 32 * 4 + 16) + engine.largest_pass


def test_the_cache_on_a_cpu_is_what_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo()
    config.rollout.engine_args = {}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cached_tokens(config, POLICY) == 2**31 // (2 * 64 * 4)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert cached_tokens(config, POLICY) == 2**30 // (2 * 64 * 4)
    config.rollout.engine_args = {"kv_cache_memory_bytes": 2**20, "block_size": 16}
    assert cached_tokens(config, POLICY) == 2**20 // (2 * 64 * 4)


def test_on_gpus_process_and_buffers_stay_in_the_machines_memory() -> None:
    config = demo("cluster.gpus_per_learner=1", "cluster.gpus_per_rollout=1", "reward=vanilla")
    config.rollout.engine_args = {}
    learner, engine = actor(config, "policy"), actor(config, "rollout")
    assert engine.cache is None
    assert engine.device == engine.weights + engine.largest_pass
    assert learner.host == learner.process + learner.buffers
    # What is written is copied from the GPU first: the state, then the model in its own type.
    assert learner.buffers == 12_000_000 + 4_000_000
    assert learner.device == learner.weights + learner.gradients + learner.optimizer + learner.largest_pass
    # DeepSpeed allocates the complete reduction bucket there.
    assert learner.largest_pass > 2_000_000_000


def test_a_reward_replica_holds_trunk_and_head() -> None:
    replica = actor(demo(), "reward")
    head = 4 * (2 * 64 * (48 + 64) + 48)
    assert replica.weights == 2_000_000 + head
    assert replica.gradients == replica.optimizer == 2 * head


def test_the_heads_size_is_the_heads() -> None:
    head = R2MHead(64, 48, 64, torch.zeros(48))
    assert head_parameters(demo(), MODELS) == sum(p.numel() for p in head.parameters())
    without = R2MHead(0, 48, 64, torch.zeros(48))
    assert head_parameters(demo("reward=vanilla"), MODELS) == sum(p.numel() for p in without.parameters())


def test_the_formulas_agree_with_what_real_actors_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth of each role's peak, as `benchmarks/memory.py` measured it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory as benchmark

    result = json.loads((BENCHMARKS / "results" / "memory.json").read_text())
    assert result["case"] == "small"
    described = benchmark.model_configs("small")
    models = {
        role: sizes_of(described["reward" if role == "reward" else "policy"], classifier=role == "reward")
        for role in ("policy", "reference", "reward")
    }
    assert {role: sizes.parameters for role, sizes in models.items()} == result["parameters"]
    config = load_config([*benchmark.COMMON, *result["overrides"]])
    for planned in actor_memory(config, batch_plan(config), models):
        measured = max(result["measured_uss"][planned.role])
        assert planned.host == pytest.approx(measured, rel=0.1), planned.role


# Records, buckets, checkpoints


def test_records_are_as_large_as_real_ones() -> None:
    config = demo("task.max_prompt_tokens=5", "task.max_new_tokens=3", "algo.prompts_per_step=8")
    batch = batch_plan(config)
    trajectories = pack_rows(["p"] * 8, [[7] * 5] * 8, [[8] * 3] * 64, ["r"] * 64, version=1)
    tensors = (
        trajectories.input_T,
        trajectories.label_T,
        trajectories.action_T,
        trajectories.rollout_logp_T,
        trajectories.truncated_N,
        trajectories.layout.offsets[1:],
    )
    assert trajectories.layout.tokens == batch.tokens == 64 * 7
    records = record_bytes(config, batch, MODELS)
    text = 4 * batch.tokens
    assert records["trajectories"] == sum(tensor.nbytes for tensor in tensors) + text
    assert records["hidden"] == records["fresh_hidden"] == torch.empty(64 * 7, 64).nbytes
    assert records["annotation"] == torch.empty(64, 48).nbytes + 64 * (4 + 4 + 4 + 8)
    assert records["reference"] == 2 * torch.empty(64 * 7).nbytes
    assert records["human_pairs"] == 0


def test_vanilla_sends_no_states_and_no_refresh_sends_them_once() -> None:
    batch = batch_plan(demo())
    assert record_bytes(demo("reward=vanilla"), batch, MODELS)["hidden"] == 0
    unrefreshed = record_bytes(demo("feedback.refresh=none"), batch, MODELS)
    assert unrefreshed["hidden"] > 0
    assert unrefreshed["fresh_hidden"] == 0


def test_human_pairs_are_two_rows_beside_the_responses_of_each_prompt() -> None:
    config = demo("reward=r2m_anchor")
    batch = batch_plan(config)
    records = record_bytes(config, batch, MODELS)
    own = records["trajectories"] + records["hidden"] + records["annotation"]
    assert config.algo.responses_per_prompt * records["human_pairs"] == 2 * own


@pytest.mark.parametrize("megabytes", [1, 3, 256])
def test_no_bucket_is_larger_than_planned(megabytes: int) -> None:
    # As many numbers in tensors of 200,000 at most.
    tensors = [(f"w{i}", torch.zeros(100_000 * (1 + i % 2))) for i in range(6)]
    tensors.append(("last", torch.zeros(100_000)))
    config = demo(f"sync.bucket_mb={megabytes}")
    largest = max(bucket.data.numel() for bucket in pack_buckets(tensors, megabytes * 2**20))
    assert 0.6 * bucket_bytes(config, POLICY) <= largest <= bucket_bytes(config, POLICY)


def test_checkpoints_by_hand() -> None:
    head = 2 * 64 * (48 + 64) + 48
    assert checkpoint_bytes(demo(), MODELS) == 1_000_000 * (4 + 12) + 12 * head
    assert checkpoint_bytes(demo("model.dtype=bfloat16"), MODELS) == 1_000_000 * (2 + 12) + 12 * head
