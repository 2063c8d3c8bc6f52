"""Advantages from rewards: how much better a row is than its peers.

Axes: N = G·K rows; rows iK … iK+K−1 are group i; G groups, K rows per group. Every function maps
(reward_N float32/float64, group_size) to advantage_N of the same dtype, detached: an advantage is a
constant of the policy update. Equal rewards give advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GRPO_STD_OFFSET = 1e-4
TIE_TOLERANCE = 1e-6


def rloo(reward_N: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: `A_j = r_j − mean of the other K−1 rewards` (Eq. 1).

    Raises ValueError for group_size < 2.
    """
    deviation_GK = _deviation(_groups(reward_N, group_size))
    return (deviation_GK * (group_size / (group_size - 1))).flatten()


def grpo(reward_N: Tensor, group_size: int) -> Tensor:
    """Group-relative: `A_j = (r_j − mean) / (std + 1e-4)`, std with ddof 1 (arXiv:2402.03300).

    Raises ValueError for group_size < 2.
    """
    reward_GK = _groups(reward_N, group_size)
    return (_deviation(reward_GK) / (reward_GK.std(1, keepdim=True) + GRPO_STD_OFFSET)).flatten()


def dr_grpo(reward_N: Tensor, group_size: int) -> Tensor:
    """GRPO without the division by std: `A_j = r_j − mean` (arXiv:2503.20783).

    Raises ValueError for group_size < 2.
    """
    return _deviation(_groups(reward_N, group_size)).flatten()


def reinforce_pp(reward_N: Tensor, group_size: int) -> Tensor:
    """REINFORCE++: `A_j = (r_j − batch mean) / batch std`, ddof 0 (arXiv:2501.03262).

    The batch is all of reward_N, so the caller passes the rewards of the complete training step, not of a
    shard; group_size only has to divide their number.
    """
    batch_1N = _groups(reward_N, group_size, smallest=1).reshape(1, -1)
    std = batch_1N.std(correction=0)
    return (_deviation(batch_1N) / torch.where(std > 0, std, 1)).flatten()


def remax(reward_N: Tensor, group_size: int) -> Tensor:
    """ReMax: `A_j = r_j − r_0`, where row 0 of each group is the greedy response (arXiv:2310.10505).

    The greedy row is the baseline and not a sample, so its own advantage is 0. Raises ValueError for
    group_size < 2.
    """
    reward_GK = _groups(reward_N, group_size)
    return (reward_GK - reward_GK[:, :1]).flatten()


def tied(reward_GK: Tensor) -> Tensor:
    """Groups that are equal up to rounding, bool [G]: `max − min < 1e-6·max(1, |mean|)`."""
    spread_G = reward_GK.amax(1) - reward_GK.amin(1)
    return spread_G < TIE_TOLERANCE * reward_GK.mean(1).abs().clamp(min=1)


ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "reinforce_pp": reinforce_pp,
    "remax": remax,
}


def _groups(reward_N: Tensor, group_size: int, smallest: int = 2) -> Tensor:
    if group_size < smallest:
        raise ValueError(
            f"group_size must be at least {smallest}, got {group_size}: raise responses_per_prompt"
        )
    if reward_N.ndim != 1 or reward_N.numel() % group_size:
        raise ValueError(f"reward_N {list(reward_N.shape)} does not form groups of {group_size}")
    return reward_N.detach().reshape(-1, group_size)


def _deviation(reward_GK: Tensor) -> Tensor:
    """Rewards minus their group's mean; exactly 0 in a tied group.

    A mean of equal numbers is off by a rounding error, which a division by an equally small std would blow
    up to advantages of order 1.
    """
    return torch.where(tied(reward_GK)[:, None], 0, reward_GK - reward_GK.mean(1, keepdim=True))
