"""What a reward model is worth, in numbers: the order within a prompt, and how sure it is of a pair.

Axes: G groups (prompts), K rows per group, M pairs whose better response comes first.

A reward counts as right where it is greater for the better response: a tie is wrong. Averages are over what
is finite, and NaN over nothing. With two responses to a prompt, correlations are ±1 and entropy and skew are
constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2m_ray.core.reward_loss import SMALLEST_STD, group_pairs, group_reward_entropy
from r2m_ray.core.shaping import mean_group_std
from r2m_ray.driver.metrics import finite_mean, group_correlation, pair_difference, scale_ratio

CALIBRATION_BINS = 10
EQUAL_GOLD = 1e-9
"""Gold scores are sums of tenths, which round: closer ones are equal."""


def group_measures(own_GK: Tensor, frozen_GK: Tensor, identity_GK: Tensor) -> dict[str, float]:
    """Spread and shape of both rewards within groups, own ones without suffix.

    identity_GK: int64, equal for rows of a group that are the same tokens. ``pair_flip_rate``: groups whose
    best and worst row by the own reward are in the other order for the frozen one. A group with a reward that
    is not finite takes no part.
    """
    whole_G = _whole(own_GK, frozen_GK)
    own_GK, frozen_GK, identity_GK = own_GK[whole_G], frozen_GK[whole_G], identity_GK[whole_G]
    entropy_G, spread_G = group_reward_entropy(own_GK)
    winner_G, loser_G, pair_G = group_pairs(own_GK, identity_GK)
    return {
        "group_std": float(mean_group_std(own_GK)),
        "group_std_frozen": float(mean_group_std(frozen_GK)),
        "scale_ratio": scale_ratio(own_GK, frozen_GK),
        "group_entropy": finite_mean(entropy_G[spread_G]),
        "group_skew": finite_mean(group_skew(own_GK)),
        "pair_flip_rate": finite_mean((pair_difference(frozen_GK, winner_G, loser_G) < 0)[pair_G]),
    }


def gold_measures(
    gold_GK: Tensor, own_GK: Tensor, frozen_GK: Tensor, identity_GK: Tensor
) -> dict[str, float]:
    """How far both rewards order the responses to one prompt as gold does; groups as in `group_measures`.

    ``rm_accuracy_on_policy``: of all pairs within a group that gold tells apart. ``pseudo_label_precision``:
    of the pairs that self-labelling would take, best and worst row by the own reward, as far as gold tells
    them apart.
    """
    whole_G = _whole(own_GK, frozen_GK)
    gold_GK, identity_GK = gold_GK[whole_G], identity_GK[whole_G]
    own_GK, frozen_GK = own_GK[whole_G], frozen_GK[whole_G]
    winner_G, loser_G, pair_G = group_pairs(own_GK, identity_GK)
    gain_G = pair_difference(gold_GK, winner_G, loser_G)
    return {
        "gold_correlation": finite_mean(group_correlation(own_GK, gold_GK)),
        "gold_correlation_frozen": finite_mean(group_correlation(frozen_GK, gold_GK)),
        "rm_accuracy_on_policy": order_accuracy(own_GK, gold_GK),
        "rm_accuracy_on_policy_frozen": order_accuracy(frozen_GK, gold_GK),
        "pseudo_label_precision": finite_mean((gain_G > 0)[pair_G & (gain_G.abs() > EQUAL_GOLD)]),
    }


def order_accuracy(reward_GK: Tensor, gold_GK: Tensor) -> float:
    """Share of the pairs within a group, of different gold, whose better row has the greater reward."""
    better_GKK = gold_GK[:, :, None] - gold_GK[:, None, :] > EQUAL_GOLD
    greater_GKK = reward_GK[:, :, None] > reward_GK[:, None, :]
    return finite_mean(greater_GKK[better_GKK])


def group_skew(reward_GK: Tensor) -> Tensor:
    """Skew of each group's rewards, `mean(z³)` standardised by ddof 0, float64 [G]; NaN without spread.

    K−1 equal losers and one stand-out have (K−2)/√(K−1), which is what GRE drives a group to.
    """
    centred_GK = reward_GK.double() - reward_GK.double().mean(1, keepdim=True)
    std_G = centred_GK.square().mean(1).sqrt()
    return torch.where(std_G < SMALLEST_STD, torch.nan, (centred_GK / std_G[:, None]).pow(3).mean(1))


def pair_accuracy(reward_M2: Tensor) -> float:
    """Share of the pairs whose better response, the first, has the greater reward."""
    return float((reward_M2[:, 0] > reward_M2[:, 1]).double().mean())


def calibration_error(reward_M2: Tensor) -> float:
    """Expected calibration error of `σ(r₁ − r₂)` over pairs whose first response is the better one.

    The confidence of a pair is `max(p, 1−p)` with `p = σ(r₁ − r₂)`, and it is right where p > ½ (half right
    at ½). Ten bins of equal width cover confidences from ½ to 1; the error is the mean over pairs of their
    bin's `|share right − mean confidence|`.
    """
    margin_M = (reward_M2[:, 0] - reward_M2[:, 1]).double()
    margin_M = margin_M[torch.isfinite(margin_M)]
    confidence_M = torch.sigmoid(margin_M.abs())
    excess_M = (torch.sign(margin_M) + 1) / 2 - confidence_M
    bin_M = ((2 * confidence_M - 1) * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    sums = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_M, excess_M)
    return float(sums.abs().sum() / len(margin_M)) if len(margin_M) else float("nan")


def _whole(own_GK: Tensor, frozen_GK: Tensor) -> Tensor:
    return (torch.isfinite(own_GK) & torch.isfinite(frozen_GK)).all(1)
