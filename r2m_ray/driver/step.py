"""What the configuration makes of a step: ω(t), plans of what to sample, advantages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from r2m_ray.config.schema import Advantage, Config, KLPlace, OmegaSchedule, RewardShape
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.core.head import omega
from r2m_ray.core.shaping import step_advantages
from r2m_ray.driver.rows import Rows
from r2m_ray.errors import RunError

EVALUATION_STEP = 0
"""Stands for the training step in the seeds of evaluation samples, so they differ from every step's."""


def omega_at(config: Config, step: int) -> float:
    """ω(t) of Eq. 4, or its floor throughout with ``reward.omega_schedule=constant``."""
    if config.reward.omega_schedule is OmegaSchedule.constant:
        return config.reward.omega_floor
    return omega(step, config.algo.steps, config.reward.omega_floor)


def sample_plans(
    config: Config, prompts: Sequence[Prompt], step: int, *, responses: int | None = None
) -> list[SamplePlan]:
    """Cut prompts into shards of as many rows as training has in ``algo.prompts_per_shard`` groups.

    Args:
        config: of the run.
        prompts: of the step.
        step: the training step; ``EVALUATION_STEP`` samples no greedy row.
        responses: to each prompt; None for a training step's K.
    """
    algo = config.algo
    group_size = responses or algo.responses_per_prompt
    size = max(1, algo.prompts_per_shard * algo.responses_per_prompt // group_size)
    return [
        SamplePlan(
            prompts=tuple(prompts[i : i + size]),
            group_size=group_size,
            step=step,
            seed=config.run.seed,
            temperature=algo.temperature,
            max_new_tokens=config.task.max_new_tokens,
            greedy_first=algo.advantage is Advantage.remax and step != EVALUATION_STEP,
        )
        for i in range(0, len(prompts), size)
    ]


def advantages(config: Config, rows: Rows, initial_reward: float = math.nan) -> list[Tensor]:
    """Advantages of a batch (Eq. 1 and its siblings), float32 [N] per shard."""
    algo, reward = config.algo, config.reward
    penalty_N = algo.kl_weight * rows.kl_penalty_N if algo.kl_place is KLPlace.reward else None
    if penalty_N is not None and algo.advantage is Advantage.remax:
        # Greedy rows report log-probs at temperature 1, and were drawn from no distribution.
        penalty_N.view(-1, rows.group_size)[:, 0] = 0
    advantage_N = step_advantages(
        rows.reward_N,
        rows.frozen_reward_N,
        rows.gold_N.float(),
        penalty_N,
        group_size=rows.group_size,
        advantage=algo.advantage.value,
        scale=reward.scale.value,
        shape=reward.shape.value,
        initial_reward=initial_reward,
        gold_weight=reward.gold_weight,
    )
    return list(advantage_N.split(rows.shard_sizes))


def initial_reward(config: Config, evaluations: Iterable[Mapping[str, Any]]) -> float:
    """Mean reward of the evaluation before step 1, of the run's log; NaN where ``reward.shape`` needs none.

    Raises RunError where ``reward.shape`` needs it and it is not a number.
    """
    if config.reward.shape is RewardShape.raw:
        return math.nan
    found = [row.get("reward/mean") for row in evaluations if row["step"] == 0]
    if not found or found[-1] is None or not math.isfinite(found[-1]):
        raise RunError(
            f"reward.shape={config.reward.shape.value}: step 0's evaluation has no finite reward. If the run "
            "goes on, restore metrics.jsonl; if it is new, examine model.reward"
        )
    return float(found[-1])
