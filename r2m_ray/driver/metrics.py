"""What a batch of rows looks like, as numbers; steps and evaluations compute a quantity by one function.

Axes: G groups (prompts), K rows per group, N = G·K rows of the batch, shard after shard; M pairs whose better
response comes first. Names are those of ``r2m_ray.run.vocabulary``.

A reward counts as right where it is greater for the better response: a tie is wrong. Averages are over what
is finite, and NaN over nothing. Standard deviations have ddof 0. With two responses to a prompt, correlations
are ±1 and entropy and skew are constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from r2m_ray.config.schema import Advantage, Config
from r2m_ray.core.reward_loss import SMALLEST_STD, group_pairs, group_reward_entropy
from r2m_ray.core.roles import Stats
from r2m_ray.core.shaping import SCALES, mean_group_std
from r2m_ray.driver.rollouts import Example
from r2m_ray.driver.rows import Rows
from r2m_ray.run.vocabulary import MACHINE_PREFIXES, TOTAL

CALIBRATION_BINS = 10
EQUAL_GOLD = 1e-9
"""Gold scores are sums of tenths, which round: closer ones are equal."""


def step_metrics(
    config: Config,
    omega: float,
    rows: Rows,
    advantage: Sequence[Tensor],
    examples: Sequence[Example],
    policy: Stats,
    reward: Stats,
    sync: Stats,
) -> dict[str, float]:
    """Every number of a training step but its alarms and times.

    advantage: float32 [N of the shard] per shard. policy, reward, sync: what the roles report of their
    updates, below ``policy/``, ``rm/`` and ``sync/``. With ReMax row 0 of each group is a baseline and no
    sample: averages over rows leave it out, and ``reward/greedy_mean`` is its reward.
    """
    greedy = config.algo.advantage is Advantage.remax
    own_GK, frozen_GK = rows.grouped(rows.reward_N), rows.grouped(rows.frozen_reward_N)
    scale = SCALES[config.reward.scale.value]
    metrics = {
        "omega": omega,
        "tokens": float(rows.tokens),
        "advantage/std": _std(torch.cat(list(advantage))),
        "reward/scale_factor": scale(own_GK.flatten(), frozen_GK.flatten(), rows.group_size),
        "bytes/driver": float(rows.nbytes),
        "bytes/records": float(sum(example.nbytes for example in examples)),
    }
    if greedy:
        metrics["reward/greedy_mean"] = finite_mean(own_GK[:, 0])
    metrics |= batch_metrics(rows, greedy_first=greedy)
    for prefix, stats in (("policy", policy), ("rm", reward), ("sync", sync)):
        metrics |= merge_stats(prefix, stats)
    return metrics


def batch_metrics(rows: Rows, *, greedy_first: bool = False) -> dict[str, float]:
    """What rewards, responses and gold of a batch are like: ``reward/``, ``response/`` and ``gold/``.

    Rewards are those of the annotation. What is not finite is counted (``reward/nonfinite``: rows whose
    reward, own or frozen, is not; ``hidden/nonfinite``: those of them that the frozen model scores well, so
    that their h is at fault) and left out: rows of averages over rows, their groups of averages over groups.
    Quantities of groups are there for more than one row per group. greedy_first: see `step_metrics`.
    """
    own_GK, frozen_GK = rows.grouped(rows.reward_N), rows.grouped(rows.frozen_reward_N)
    finite_GK = torch.isfinite(own_GK) & torch.isfinite(frozen_GK)
    sampled_GK = torch.ones_like(finite_GK)
    sampled_GK[:, : int(greedy_first)] = False
    sampled_N = sampled_GK.flatten()
    metrics = {
        "reward/nonfinite": float((~finite_GK).sum()),
        "hidden/nonfinite": float((~torch.isfinite(own_GK) & torch.isfinite(frozen_GK)).sum()),
    }
    metrics |= _response_metrics(rows, sampled_N)
    metrics |= _row_metrics(own_GK[sampled_GK & finite_GK], frozen_GK[sampled_GK & finite_GK])
    if rows.gold:
        parts = {part: value_N[sampled_N].tolist() for part, value_N in rows.gold.items() if part != TOTAL}
        metrics |= {f"gold/{part}": mean(values) for part, values in parts.items()}
        metrics["gold/mean"] = finite_mean(rows.gold_N[sampled_N])
    if rows.group_size == 1:
        return metrics
    complete_G = finite_GK.all(1)
    identity_GK = rows.response_id_N.view(-1, rows.group_size)
    scores = own_GK[complete_G], frozen_GK[complete_G], identity_GK[complete_G]
    metrics |= _group_metrics(*scores)
    if rows.gold:
        metrics |= _gold_metrics(rows.grouped(rows.gold_N)[complete_G], *scores)
    return metrics


def kl_metrics(rows: Rows) -> dict[str, float]:
    """KL of the sampled distribution to the reference, per response and per token; finite rows alone."""
    known_N = torch.isfinite(rows.kl_N)
    return {
        "kl/sequence": finite_mean(rows.kl_N),
        "kl/token": float(rows.kl_N[known_N].sum() / rows.length_N[known_N].sum()),
    }


def pair_metrics(own_M2: Tensor, frozen_M2: Tensor, kind: str = "") -> dict[str, float]:
    """Accuracy of both rewards on pairs: held-out ones, or counterfactual ones of a kind."""
    name = f"{kind}_accuracy" if kind else "accuracy"
    return {
        f"pairs/{prefix}{name}": finite_mean(
            (reward_M2[:, 0] > reward_M2[:, 1])[torch.isfinite(reward_M2).all(1)]
        )
        for prefix, reward_M2 in (("", own_M2), ("frozen_", frozen_M2))
    }


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


def merge_stats(prefix: str, stats: Stats) -> dict[str, float]:
    """A role's statistics below ``prefix/``; its ``time/`` and ``memory/`` keys stay below those."""
    merged = {}
    for key, value in stats.items():
        head, _, rest = key.partition("/")
        name = f"{head}/{prefix}/{rest}" if key.startswith(MACHINE_PREFIXES) else f"{prefix}/{key}"
        merged[name] = float(value)
    return merged


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean, NaN of nothing."""
    items = list(values)
    return sum(items) / len(items) if items else float("nan")


def finite_mean(values: Tensor) -> float:
    """Mean of the values that are finite, NaN of nothing."""
    values = values.double()
    return float(values[torch.isfinite(values)].mean())


def group_correlation(left_GK: Tensor, right_GK: Tensor) -> Tensor:
    """Pearson correlation of two scores within each group, float64 [G]; NaN where either is constant."""
    left_GK, right_GK = _centred(left_GK), _centred(right_GK)
    left_G, right_G = left_GK.square().mean(1).sqrt(), right_GK.square().mean(1).sqrt()
    covariance_G = (left_GK * right_GK).mean(1)
    constant_G = (left_G < SMALLEST_STD) | (right_G < SMALLEST_STD)
    return torch.where(constant_G, torch.nan, covariance_G / (left_G * right_G))


def group_skew(reward_GK: Tensor) -> Tensor:
    """Skew of each group's rewards, `mean(z³)` standardised by ddof 0, float64 [G]; NaN without spread.

    K−1 equal losers and one stand-out have (K−2)/√(K−1), which is what GRE drives a group to.
    """
    centred_GK = _centred(reward_GK)
    std_G = centred_GK.square().mean(1).sqrt()
    return torch.where(std_G < SMALLEST_STD, torch.nan, (centred_GK / std_G[:, None]).pow(3).mean(1))


def order_accuracy(reward_GK: Tensor, gold_GK: Tensor) -> float:
    """Share of the pairs within a group, of different gold, whose better row has the greater reward."""
    better_GKK = gold_GK[:, :, None] - gold_GK[:, None, :] > EQUAL_GOLD
    greater_GKK = reward_GK[:, :, None] > reward_GK[:, None, :]
    return finite_mean(greater_GKK[better_GKK])


def scale_ratio(own_GK: Tensor, frozen_GK: Tensor) -> float:
    """``mean_group_std`` of own over frozen rewards; both are floored, so that the ratio has a logarithm."""
    own, frozen = float(mean_group_std(own_GK)), float(mean_group_std(frozen_GK))
    # Not max(floor, value), which would turn NaN into the floor.
    return max(own, SMALLEST_STD) / max(frozen, SMALLEST_STD)


def pair_difference(score_GK: Tensor, winner_G: Tensor, loser_G: Tensor) -> Tensor:
    """The winner's score minus the loser's, [G], from their columns."""
    return (score_GK.gather(1, winner_G[:, None]) - score_GK.gather(1, loser_G[:, None]))[:, 0]


def _response_metrics(rows: Rows, sampled_N: Tensor) -> dict[str, float]:
    length_N = rows.length_N.double()
    # One token that is no cut: the end token alone.
    empty_N = (length_N == 1) & ~rows.truncated_N
    return {
        "response/length_mean": finite_mean(length_N[sampled_N]),
        "response/length_max": float(length_N[sampled_N].max()),
        "response/tokens": float(length_N.sum()),
        "response/truncated_fraction": finite_mean(rows.truncated_N[sampled_N]),
        "response/empty_fraction": finite_mean(empty_N[sampled_N]),
    }


def _row_metrics(own_N: Tensor, frozen_N: Tensor) -> dict[str, float]:
    return {
        "reward/mean": finite_mean(own_N),
        "reward/std": _std(own_N),
        "reward/frozen_mean": finite_mean(frozen_N),
        "reward/frozen_std": _std(frozen_N),
        "reward/frozen_gap": finite_mean(own_N - frozen_N),
    }


def _group_metrics(own_GK: Tensor, frozen_GK: Tensor, identity_GK: Tensor) -> dict[str, float]:
    entropy_G, spread_G = group_reward_entropy(own_GK)
    winner_G, loser_G, pair_G = group_pairs(own_GK, identity_GK)
    return {
        "reward/frozen_correlation": finite_mean(group_correlation(own_GK, frozen_GK)),
        "reward/group_std": float(mean_group_std(own_GK)),
        "reward/frozen_group_std": float(mean_group_std(frozen_GK)),
        "reward/scale_ratio": scale_ratio(own_GK, frozen_GK),
        "reward/group_entropy": finite_mean(entropy_G[spread_G]),
        "reward/group_skew": finite_mean(group_skew(own_GK)),
        "reward/pair_flip_rate": finite_mean((pair_difference(frozen_GK, winner_G, loser_G) < 0)[pair_G]),
        "reward/zero_std_groups": finite_mean(~spread_G),
    }


def _gold_metrics(
    gold_GK: Tensor, own_GK: Tensor, frozen_GK: Tensor, identity_GK: Tensor
) -> dict[str, float]:
    winner_G, loser_G, pair_G = group_pairs(own_GK, identity_GK)
    gain_G = pair_difference(gold_GK, winner_G, loser_G)
    return {
        "gold/group_std": float(mean_group_std(gold_GK)),
        "gold/correlation": finite_mean(group_correlation(own_GK, gold_GK)),
        "gold/frozen_correlation": finite_mean(group_correlation(frozen_GK, gold_GK)),
        "gold/order_accuracy": order_accuracy(own_GK, gold_GK),
        "gold/frozen_order_accuracy": order_accuracy(frozen_GK, gold_GK),
        "gold/pair_precision": finite_mean((gain_G > 0)[pair_G & (gain_G.abs() > EQUAL_GOLD)]),
    }


def _centred(score_GK: Tensor) -> Tensor:
    return score_GK.double() - score_GK.double().mean(1, keepdim=True)


def _std(values: Tensor) -> float:
    """Standard deviation of the values that are finite, NaN of nothing."""
    values = values.double()
    return float(_centred(values[None, torch.isfinite(values)]).square().mean().sqrt())
