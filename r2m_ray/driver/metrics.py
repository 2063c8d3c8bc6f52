"""What one training step looked like, as numbers: rewards, responses, gold, and the rows worth reading.

Axes: G groups, K rows per group, N = G·K rows of the whole step, shard after shard.

Keys are paths. Everything below ``time/`` (seconds) and ``memory/`` (bytes) depends on the machine;
every other value repeats exactly when a run repeats. A statistic with nothing to average is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from r2m_ray.core.batch import Annotation, Trajectories
from r2m_ray.core.reward_loss import SMALLEST_STD, group_pairs, group_reward_entropy
from r2m_ray.core.shaping import SCALES, mean_group_std

GOLD_TOTAL = "total"
"""Key of a gold score's dictionary that holds the score itself; every other key is a part of it."""

MACHINE_PREFIXES = ("time/", "memory/")
"""Keys that start so are measured, not computed, and differ between identical runs."""


def step_metrics(
    trajectories: Sequence[Trajectories],
    annotation: Sequence[Annotation],
    advantage: Sequence[Tensor],
    omega: float,
    gold: Sequence[Mapping[str, float]] | None = None,
    *,
    greedy_first: bool = False,
    scale: str = "raw",
) -> dict[str, float]:
    """Every number of a step that its records tell.

    The three sequences hold one record per shard; advantages are float [N of the shard]. ``gold`` holds
    one dictionary per row of the step: ``total``, and the parts it is made of. Standard deviations have
    ddof 0. Rewards are those of the annotation; ``reward/scale_factor`` is what ``reward.scale`` multiplies
    them with on their way to the advantages.

    What is not finite is counted (``reward/nonfinite``: rows whose reward, own or frozen, is not;
    ``hidden/nonfinite``: those of them that the frozen model scores well, so that their h is at fault) and
    left out: rows of averages over rows, their groups of averages over groups. With ``greedy_first`` row 0 of
    each group is ReMax's baseline: no sample, so averages over rows leave it out too, and
    ``reward/greedy_mean`` tells its reward.
    """
    own_GK = grouped([shard.reward_N for shard in annotation], annotation)
    frozen_GK = grouped([shard.frozen_reward_N for shard in annotation], annotation)
    identity_GK = torch.cat([shard.response_id_N.view(-1, shard.layout.group_size) for shard in annotation])
    finite_GK = torch.isfinite(own_GK) & torch.isfinite(frozen_GK)
    sampled_GK = torch.ones_like(finite_GK)
    sampled_GK[:, : int(greedy_first)] = False
    metrics = {
        "omega": omega,
        "tokens": float(sum(shard.layout.tokens for shard in trajectories)),
        "advantage/std": _std(torch.cat(list(advantage))),
        "reward/nonfinite": float((~finite_GK).sum()),
        "hidden/nonfinite": float((~torch.isfinite(own_GK) & torch.isfinite(frozen_GK)).sum()),
    }
    if greedy_first:
        metrics["reward/greedy_mean"] = finite_mean(own_GK[:, 0])
    metrics |= _response_metrics(trajectories, sampled_GK.flatten())
    metrics |= _row_metrics(own_GK[sampled_GK & finite_GK], frozen_GK[sampled_GK & finite_GK])
    metrics["reward/scale_factor"] = SCALES[scale](own_GK.flatten(), frozen_GK.flatten(), own_GK.shape[1])
    whole_G = finite_GK.all(1)
    scores = own_GK[whole_G], frozen_GK[whole_G], identity_GK[whole_G]
    metrics |= _group_metrics(*scores)
    if gold is not None:
        gold_GK = torch.tensor([row[GOLD_TOTAL] for row in gold], dtype=torch.float64).view_as(own_GK)
        sampled = [row for row, counts in zip(gold, sampled_GK.flatten().tolist(), strict=True) if counts]
        metrics |= {f"gold/{part}": mean(row[part] for row in sampled) for part in _parts(gold[0])}
        metrics |= {"gold/mean": finite_mean(gold_GK[sampled_GK])}
        metrics |= _gold_metrics(gold_GK[whole_G], *scores)
    return metrics


def merge_stats(prefix: str, stats: Mapping[str, float]) -> dict[str, float]:
    """A role's statistics below ``prefix/``; its ``time/`` and ``memory/`` keys stay below those."""
    merged = {}
    for key, value in stats.items():
        head, _, rest = key.partition("/")
        name = f"{head}/{prefix}/{rest}" if key.startswith(MACHINE_PREFIXES) else f"{prefix}/{key}"
        merged[name] = float(value)
    return merged


def rollout_records(
    step: int,
    trajectories: Sequence[Trajectories],
    annotation: Sequence[Annotation],
    advantage: Sequence[Tensor],
    omega: float,
    gold: Sequence[Mapping[str, float]] | None = None,
    *,
    limit: int,
    attention: Mapping[int, Sequence[tuple[str, float]]] | None = None,
) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a step, whole groups in order, ready for JSON.

    ``group`` and ``row`` count through the step. ``role`` is ``winner`` or ``loser`` of the group's
    Bradley–Terry pair by the annotation rewards, else ``none``. ``attention`` gives, by row, each input
    token's text and the weight the R2M head's query put on it.
    """
    records: list[dict[str, Any]] = []
    first_row = 0
    for rows, notes, advantage_N in zip(trajectories, annotation, advantage, strict=True):
        size = rows.layout.group_size
        roles, lengths = _pair_roles(notes), rows.response_lengths
        for n in range(min(rows.layout.rows, limit - len(records))):
            row = first_row + n
            records.append(
                {
                    "step": step,
                    "group": row // size,
                    "row": row,
                    "prompt": rows.prompts[n // size],
                    "response": rows.responses[n],
                    "role": roles[n],
                    "reward": float(notes.reward_N[n]),
                    "frozen_reward": float(notes.frozen_reward_N[n]),
                    "omega": omega,
                    "advantage": float(advantage_N[n]),
                    "truncated": bool(rows.truncated_N[n]),
                    "tokens": int(lengths[n]),
                    "gold": None if gold is None else float(gold[row][GOLD_TOTAL]),
                    "gold_parts": None if gold is None else _parts(gold[row]),
                    "attention": [list(pair) for pair in attention[row]]
                    if attention and row in attention
                    else None,
                }
            )
        first_row += rows.layout.rows
    return records


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


def grouped(values: Sequence[Tensor], annotation: Sequence[Annotation]) -> Tensor:
    """Per-row values of every shard as float64 [G, K]: sums over many rows must not lose digits."""
    shards = zip(values, annotation, strict=True)
    return torch.cat([value_N.double().view(-1, shard.layout.group_size) for value_N, shard in shards])


def scale_ratio(own_GK: Tensor, frozen_GK: Tensor) -> float:
    """``mean_group_std`` of own over frozen rewards; both are floored, so that the ratio has a logarithm."""
    own, frozen = float(mean_group_std(own_GK)), float(mean_group_std(frozen_GK))
    # Not max(floor, value), which would turn NaN into the floor.
    return max(own, SMALLEST_STD) / max(frozen, SMALLEST_STD)


def pair_difference(score_GK: Tensor, winner_G: Tensor, loser_G: Tensor) -> Tensor:
    """The winner's score minus the loser's, [G], from their columns."""
    return (score_GK.gather(1, winner_G[:, None]) - score_GK.gather(1, loser_G[:, None]))[:, 0]


def _response_metrics(trajectories: Sequence[Trajectories], sampled_N: Tensor) -> dict[str, float]:
    length_N = torch.cat([shard.response_lengths for shard in trajectories]).double()
    truncated_N = torch.cat([shard.truncated_N for shard in trajectories])
    # One token that is no cut: the end token alone.
    empty_N = (length_N == 1) & ~truncated_N
    return {
        "response/length_mean": finite_mean(length_N[sampled_N]),
        "response/length_max": float(length_N[sampled_N].max()),
        "response/tokens": float(length_N.sum()),
        "response/truncated_fraction": finite_mean(truncated_N[sampled_N]),
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
        "reward/pair_flip_rate": finite_mean((pair_difference(frozen_GK, winner_G, loser_G) < 0)[pair_G]),
        "reward/zero_std_groups": finite_mean(~spread_G),
    }


def _gold_metrics(
    gold_GK: Tensor, own_GK: Tensor, frozen_GK: Tensor, identity_GK: Tensor
) -> dict[str, float]:
    winner_G, loser_G, pair_G = group_pairs(own_GK, identity_GK)
    difference_G = pair_difference(gold_GK, winner_G, loser_G)
    return {
        "gold/group_std": float(mean_group_std(gold_GK)),
        "gold/correlation": finite_mean(group_correlation(own_GK, gold_GK)),
        "gold/frozen_correlation": finite_mean(group_correlation(frozen_GK, gold_GK)),
        "gold/pair_precision": finite_mean((difference_G > 0)[pair_G & (difference_G != 0)]),
    }


def _pair_roles(notes: Annotation) -> list[str]:
    size = notes.layout.group_size
    reward_GK = notes.reward_N.view(-1, size)
    winner_G, loser_G, pair_G = group_pairs(reward_GK, notes.response_id_N.view(-1, size))
    roles = ["none"] * notes.layout.rows
    for group in (pair_G & torch.isfinite(reward_GK).all(1)).nonzero()[:, 0].tolist():
        roles[group * size + int(winner_G[group])] = "winner"
        roles[group * size + int(loser_G[group])] = "loser"
    return roles


def _parts(gold: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in gold.items() if key != GOLD_TOTAL}


def _centred(score_GK: Tensor) -> Tensor:
    return score_GK.double() - score_GK.double().mean(1, keepdim=True)


def _std(values: Tensor) -> float:
    """Standard deviation of the values that are finite, NaN of nothing."""
    values = values.double()
    return float(_centred(values[None, torch.isfinite(values)]).square().mean().sqrt())
