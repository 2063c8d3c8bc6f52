"""The batch arithmetic of a configuration: what a step and a run consist of, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from r2m_ray.config.schema import Config, OldLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Numbers that follow from a valid configuration; those of a run count a new run, from step 1.

    shards_per_replica: the least and the most shards of a step that one replica or rank of a role gets.
    minibatches: optimizer steps of one epoch. rows_per_rank: rows of a mini-batch that one learner rank has
    at most. row_tokens: input tokens of a row at most, one less than prompt and response together.
    tokens_least, tokens_most: packed tokens T of a step. passes_per_minibatch: forward passes of a rank over
    its part of a mini-batch, at most. policy_passes: those of a whole step, π_old's included.
    evaluations: the one before the first step included.
    """

    steps: int
    prompts: int
    responses_per_prompt: int
    rows: int
    shards: int
    rows_per_shard: int
    shards_per_replica: Mapping[str, tuple[int, int]]
    minibatches: int
    optimizer_steps: int
    rows_per_rank: int
    row_tokens: int
    tokens_least: int
    tokens_most: int
    passes_per_minibatch: int
    policy_passes: int
    head_updates: int
    run_rows: int
    run_optimizer_steps: int
    run_head_updates: int
    evaluations: int
    checkpoints: int


def batch_plan(config: Config) -> BatchPlan:
    """The arithmetic of a configuration that `config_checks` found no fault with.

    A row has 1 to `max_prompt_tokens + max_new_tokens − 1` input tokens. A forward pass takes at least
    `max(1, tokens_per_microbatch // row_tokens)` rows while there are as many, in either layout of
    `models.blocks`, which bounds the passes from above.
    """
    algo, steps = config.algo, config.algo.steps
    rows = algo.prompts_per_step * algo.responses_per_prompt
    shards = algo.prompts_per_step // algo.prompts_per_shard
    minibatches = algo.prompts_per_step // algo.minibatch_prompts
    row_tokens = config.task.max_prompt_tokens + config.task.max_new_tokens - 1
    rows_per_rank = algo.minibatch_prompts // config.policy.ranks * algo.responses_per_prompt
    rows_per_pass = max(1, config.policy.tokens_per_microbatch // row_tokens)
    passes = _ceil(rows_per_rank, rows_per_pass)
    # The first mini-batch's own training pass scores π_old.
    scoring = minibatches - 1 if algo.old_logp is OldLogprobs.learner else 0
    replicas = {
        "rollout": config.rollout.replicas,
        "policy": config.policy.ranks,
        "reference": config.reference.replicas,
        "reward": config.reward.replicas,
    }
    return BatchPlan(
        steps=steps,
        prompts=algo.prompts_per_step,
        responses_per_prompt=algo.responses_per_prompt,
        rows=rows,
        shards=shards,
        rows_per_shard=rows // shards,
        shards_per_replica={role: (shards // n, _ceil(shards, n)) for role, n in replicas.items()},
        minibatches=minibatches,
        optimizer_steps=algo.epochs * minibatches,
        rows_per_rank=rows_per_rank,
        row_tokens=row_tokens,
        tokens_least=rows,
        tokens_most=rows * row_tokens,
        passes_per_minibatch=passes,
        policy_passes=(algo.epochs * minibatches + scoring) * passes,
        head_updates=config.reward.update_steps,
        run_rows=rows * steps,
        run_optimizer_steps=algo.epochs * minibatches * steps,
        run_head_updates=config.reward.update_steps * steps,
        evaluations=1 + _moments(config.evaluate.every, steps),
        checkpoints=_moments(config.checkpoint.every, steps),
    )


def _moments(every: int, steps: int) -> int:
    """Steps of 1 … ``steps`` that are the last or a multiple of ``every`` (0: the last alone)."""
    return _ceil(steps, every) if every else 1


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)
