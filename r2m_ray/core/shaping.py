"""Rewards on their way to advantages: scaled, shaped, mixed with gold, less a KL penalty.

Axes: N = G·K rows; rows iK … iK+K−1 are group i; G groups, K rows per group.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from r2m_ray.core.advantages import ADVANTAGES
from r2m_ray.core.reward_loss import SMALLEST_STD


def gold_mixture(reward_N: Tensor, gold_N: Tensor, weight: float) -> Tensor:
    """`(1−g)·r + g·gold` of each row, g = `weight`; r alone where gold is NaN, that is unknown."""
    return torch.where(gold_N.isnan(), reward_N, (1 - weight) * reward_N + weight * gold_N)


def mean_group_std(reward_GK: Tensor) -> Tensor:
    """Mean over groups of each group's standard deviation (ddof 0), a float64 scalar; NaN of no group."""
    reward_GK = reward_GK.double()
    return (reward_GK - reward_GK.mean(1, keepdim=True)).square().mean(1).sqrt().mean()


def match_frozen(reward_N: Tensor, frozen_N: Tensor, group_size: int) -> float:
    """The factor that gives own rewards the frozen model's spread: mean group std of `frozen_N` over that of
    `reward_N`, ddof 0, over the groups of a complete step whose rewards are all finite.

    It is 1 where there is no such group, or where either spread is below 1e-6: no spread is no scale.
    """
    own_GK, frozen_GK = reward_N.view(-1, group_size), frozen_N.view(-1, group_size)
    finite_G = (own_GK.isfinite() & frozen_GK.isfinite()).all(1)
    own, frozen = float(mean_group_std(own_GK[finite_G])), float(mean_group_std(frozen_GK[finite_G]))
    return frozen / own if own >= SMALLEST_STD and frozen >= SMALLEST_STD else 1.0


SCALES: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "raw": lambda reward_N, frozen_N, group_size: 1.0,
    "match_frozen": match_frozen,
}
"""(own reward_N, frozen_N, group_size) → the factor of the step's own rewards."""


def par(reward_N: Tensor, initial: float) -> Tensor:
    """`σ(r − r₀)`: Preference As Reward, arXiv 2502.18770, with one reference reward for all prompts.

    initial: r₀, the mean reward of the initial policy. What lies far above it gains next to nothing, so there
    is little left to win by exploiting the reward model. float64. Raises ValueError where r₀ is not finite.
    """
    if not math.isfinite(initial):
        raise ValueError(f"the initial policy's mean reward is {initial}")
    # In float32 σ is 1 from 17 on, and the best of a group would equal the rest.
    return torch.sigmoid(reward_N.double() - initial)


SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {"raw": lambda reward_N, initial: reward_N, "par": par}
"""(reward_N, the initial policy's mean reward) → what becomes of it."""


def step_advantages(
    own_N: Tensor,
    frozen_N: Tensor,
    gold_N: Tensor,
    penalty_N: Tensor | None,
    *,
    group_size: int,
    advantage: str,
    scale: str = "raw",
    shape: str = "raw",
    initial_reward: float = float("nan"),
    gold_weight: float = 0.0,
) -> Tensor:
    """Advantages of a training step's rows, float32 [N], from their rewards (Eq. 1 and its siblings).

    Own rewards are scaled (`SCALES`), shaped around the scaled ``initial_reward`` (`SHAPES`), and mixed with
    gold by ``gold_weight``; ``penalty_N`` [N], β times each row's KL, is subtracted where it is given.

    Args:
        own_N, frozen_N: float32 [N], rewards of R2M's head and of the frozen reward model.
        gold_N: float32 [N], NaN where the task knows no gold.
        penalty_N: float32 [N], or None where the KL is a term of the loss.
        advantage, scale, shape: keys of `ADVANTAGES`, `SCALES`, `SHAPES`.
        initial_reward: r₀ of `shape`, the initial policy's mean reward.

    Raises:
        ValueError: for a group size that the advantage cannot use, or r₀ not finite where it is needed.
    """
    factor = SCALES[scale](own_N, frozen_N, group_size)
    reward_N = gold_mixture(SHAPES[shape](factor * own_N, factor * initial_reward), gold_N, gold_weight)
    if penalty_N is not None:
        reward_N = reward_N - penalty_N
    return ADVANTAGES[advantage](reward_N, group_size).float()
