"""A learner, and rows for it and the reference: random tokens, log-probs and advantages to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from r2m_ray.config.schema import AlgoConfig, Config, PolicyConfig, RewardConfig, TaskConfig
from r2m_ray.core.batch import PolicyBatch, ReferenceLogprobs, Trajectories, pack_rows
from r2m_ray.engines.policy.learner import PolicyLearner

K = 4
PROMPTS_PER_SHARD = 2


def trajectories(seed: int) -> Trajectories:
    """One shard: 2 prompts of 2–9 tokens and 4 responses each of 1–8, of a vocabulary of 160."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(4, 160, (length,), generator=generator).tolist()

    prompts = [ids(2, 10) for _ in range(PROMPTS_PER_SHARD)]
    responses = [ids(1, 9) for _ in range(PROMPTS_PER_SHARD * K)]
    logprobs = [(-3 * torch.rand(len(r), generator=generator)).tolist() for r in responses]
    return pack_rows(
        [f"prompt {i}" for i in range(PROMPTS_PER_SHARD)],
        prompts,
        responses,
        [f"response {i}" for i in range(len(responses))],
        logprobs=logprobs,
        version=0,
    )


def policy_batch(seed: int) -> PolicyBatch:
    """`trajectories(seed)` with random advantages and reference log-probs."""
    rows = trajectories(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    reference_T = torch.where(rows.action_T, -6 * torch.rand(rows.layout.tokens, generator=generator), 0)
    return PolicyBatch(
        trajectories=rows,
        advantage_N=torch.randn(rows.layout.rows, generator=generator),
        reference=ReferenceLogprobs(tempered_T=reference_T, unit_T=0.9 * reference_T),
    )


def learner_config(stage: int = 2) -> Config:
    """Two shards to a mini-batch, two epochs, feedback on; ZeRO-3 partitions even the smallest parameters.

    Adam's epsilon is large: with a tiny one the first steps are ±lr however small the gradient, and rounding
    decides the sign where a gradient is 0.
    """
    deepspeed = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"params": {"eps": 1e-2}},
    }
    return Config(
        algo=AlgoConfig(
            prompts_per_step=6,
            responses_per_prompt=K,
            prompts_per_shard=PROMPTS_PER_SHARD,
            minibatch_prompts=2 * PROMPTS_PER_SHARD,
            epochs=2,
            temperature=0.7,
        ),
        policy=PolicyConfig(learning_rate=1e-3, tokens_per_microbatch=64, deepspeed=deepspeed),
        reward=RewardConfig(omega_floor=0.6),
        task=TaskConfig(max_new_tokens=8),
    )


IDS = (0, 1, 2)
"""Two mini-batches: shards 0 and 1, then shard 2 alone."""
BATCHES = [policy_batch(seed) for seed in IDS]


def learner(config: Config, model_dir: Path, rank: int = 0, world_size: int = 1) -> PolicyLearner:
    return PolicyLearner(
        config=config,
        model_dir=str(model_dir),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )


def weights(policy: PolicyLearner) -> dict[str, Tensor]:
    """A copy of every weight, gathered in several buckets."""
    return {
        name: tensor.clone() for bucket in policy.weight_buckets(4096) for name, tensor in bucket.tensors()
    }


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
