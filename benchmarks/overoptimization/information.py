"""The information pre-check: does h know something about gold that the reward model does not?

Asked by ridge regression of gold on features, before any arm is run: on the reward model's H_last, on the
policy's h, and on both. Axes: N responses, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from r2m_ray.report.data import Series

PENALTIES = tuple(float(p) for p in np.logspace(-4, 4, 17))
"""Ridge penalties to choose from, relative to the number of training responses."""
SPLIT = (0.6, 0.2, 0.2)
"""Shares of the prompts that train, choose the penalty, and test; a prompt's responses stay together."""
LEAST_SEEDS = 3
LEAST_GAIN = 0.1
MOST_GAIN = 0.02


class Regime(StrEnum):
    """What a world claims about the policy's hidden states."""

    informative = "informative"
    uninformative = "uninformative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """R² on the responses to test prompts, at most 1 and below 0 where a fit is worse than the mean.

    gold: of the scores. differences: of the differences between responses to one prompt, which are all that a
    group's advantages see.
    """

    gold: float
    differences: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Information:
    """One seed's pre-check: what H_last explains, what h does, and what both do together."""

    reward_model: Explained
    policy: Explained
    both: Explained

    @property
    def gains(self) -> tuple[float, float]:
        """What h adds to H_last in R², of gold and of its differences."""
        return (
            self.both.gold - self.reward_model.gold,
            self.both.differences - self.reward_model.differences,
        )


def information(
    reward_NF: Series, policy_NF: Series, gold_N: Series, prompt_N: NDArray[np.int64], *, seed: int
) -> Information:
    """The pre-check of one seed.

    reward_NF: H_last. policy_NF: h pooled over the response, all poolings side by side. gold_N: scores.
    prompt_N: the prompt of each response; the seed draws which prompts train, choose and test.
    Raises ValueError for features that are not finite, and for a prompt with one response only, which has no
    differences.
    """
    sources = {
        "reward_model": reward_NF,
        "policy": policy_NF,
        "both": np.concatenate([reward_NF, policy_NF], axis=1),
    }
    for name, features_NF in sources.items():
        if not np.isfinite(features_NF).all():
            raise ValueError(f"{name}: features are not finite")
    _, prompt_N, count = np.unique(prompt_N, return_inverse=True, return_counts=True)
    if count.min() < 2:
        raise ValueError("a prompt has one response only; sample two or more for each")
    parts = _parts(len(count), prompt_N, seed)
    centred_N = _centred(gold_N[:, None], prompt_N)[:, 0]
    explained = {
        name: Explained(
            gold=_held_out_r2(features_NF, gold_N, parts),
            differences=_held_out_r2(_centred(features_NF, prompt_N), centred_N, parts),
        )
        for name, features_NF in sources.items()
    }
    return Information(**explained)


def precheck_failures(found: Mapping[int, Information], regime: Regime) -> tuple[str, ...]:
    """Why a world is not of the regime it claims, a sentence per seed and target; empty where it is.

    Informative: both targets gain ≥ .1 under every seed. Uninformative: < .02. Fewer than three seeds fail.
    """
    failures = []
    if len(found) < LEAST_SEEDS:
        failures.append(f"{len(found)} seeds; the pre-check needs {LEAST_SEEDS}.")
    for seed, one in found.items():
        for target, gain in zip(("gold", "differences within prompts"), one.gains, strict=True):
            if regime is Regime.informative and not gain >= LEAST_GAIN:
                failures.append(f"seed {seed}: h adds {gain:.3f} to R² of {target}, less than {LEAST_GAIN}.")
            if regime is Regime.uninformative and not gain < MOST_GAIN:
                failures.append(f"seed {seed}: h adds {gain:.3f} to R² of {target}, not below {MOST_GAIN}.")
    return tuple(failures)


def _parts(prompts: int, prompt_N: NDArray[np.int64], seed: int) -> list[NDArray[np.bool_]]:
    """Masks of the responses that train, choose and test."""
    order = np.random.default_rng(seed).permutation(prompts)
    ends = np.rint(np.cumsum(SPLIT) * prompts).astype(np.int64)
    pieces = np.split(order, ends[:-1])
    if min(len(piece) for piece in pieces) == 0:
        raise ValueError(f"{prompts} prompts are too few to train, choose a penalty and test")
    return [np.isin(prompt_N, piece) for piece in pieces]


def _centred(values_NF: Series, prompt_N: NDArray[np.int64]) -> Series:
    """Deviations from the mean of each prompt.

    With K responses per prompt, ``Σ_{i<j} (e_i − e_j)² = K·Σ_i (e_i − ē)²``: least squares and R² over all
    pairwise differences are those over deviations.
    """
    count = np.bincount(prompt_N)
    sums = np.zeros((len(count), values_NF.shape[1]))
    np.add.at(sums, prompt_N, values_NF)
    centred: Series = values_NF - (sums / count[:, None])[prompt_N]
    return centred


def _held_out_r2(features_NF: Series, target_N: Series, parts: Sequence[NDArray[np.bool_]]) -> float:
    """R² on the test part of a ridge fitted on the first part, with the penalty best on the second."""
    train, choose, test = parts
    mean, spread = features_NF[train].mean(axis=0), features_NF[train].std(axis=0)
    scaled_NF = (features_NF - mean) / np.where(spread > 0, spread, 1.0)
    offset = target_N[train].mean()
    left, singular, right = np.linalg.svd(scaled_NF[train], full_matrices=False)
    projected = left.T @ (target_N[train] - offset)

    def r2(penalty: float, part: NDArray[np.bool_]) -> float:
        weight = right.T @ (singular / (singular**2 + penalty * train.sum()) * projected)
        error = target_N[part] - offset - scaled_NF[part] @ weight
        around = target_N[part] - target_N[part].mean()
        if not around.any():
            raise ValueError("gold is the same for every response of a part; there is nothing to explain")
        return float(1 - (error @ error) / (around @ around))

    best = max(PENALTIES, key=lambda penalty: r2(penalty, choose))
    return r2(best, test)
