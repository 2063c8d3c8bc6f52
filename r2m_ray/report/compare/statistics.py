"""What a mean of few paired differences is worth: intervals, tests, and what they can and cannot mean.

One difference per seed, arm minus baseline under the same seed, so what the seed does to both cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
SIGNIFICANCE = 0.05
RESAMPLES = 10_000
MOST_FLIPPED = 24
"""Pairs whose sign patterns are still enumerated: 2²³ sums, 64 MiB."""

_COVERAGE = {
    2: 0.50, 3: 0.75, 4: 0.80, 5: 0.83, 6: 0.86, 8: 0.89, 10: 0.90, 12: 0.905, 15: 0.917, 20: 0.929,
    30: 0.936, 50: 0.943,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean of ``pairs`` differences with its nominal 95 % interval, all in the unit of the differences."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_interval(differences: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean over seeds: pairs are drawn with replacement.

    Equal numbers of pairs draw the same pairs, so intervals of several arms move together. Nominal: see
    ``typical_coverage`` for what few pairs make of it. Raises ValueError below two pairs (scipy's).
    """
    values = np.asarray(differences, dtype=np.float64)
    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), pairs=len(values))


def typical_coverage(pairs: int) -> float:
    """How often a nominal 95 % interval of two pairs or more holds the true mean, for normal differences.

    Measured on 20,000 synthetic samples of each size, to half a percent, and interpolated; .943 from 50 on.
    """
    return float(np.interp(pairs, list(_COVERAGE), list(_COVERAGE.values())))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of "the differences are symmetric about 0", exact: the share of the 2ⁿ sign patterns whose
    mean is at least as far from 0 as the one observed.

    Valid for one to ``MOST_FLIPPED`` pairs, and never below ``smallest_p``.
    """
    values = np.asarray(differences, dtype=np.float64)
    # Sums of sums: scipy's permutation_test visits each pattern by itself, 3,000 times as slow for 20 pairs.
    # A pattern and its opposite are equally far from 0, so the first sign can stay.
    sums = values[:1]
    for value in values[1:]:
        sums = np.concatenate([sums + value, sums - value])
    # Sums of the same numbers in another order differ by rounding, and are ties all the same.
    slack = 1e-12 * float(np.abs(values).sum())
    return float((np.abs(sums) >= abs(values.sum()) - slack).mean())


def smallest_p(pairs: int) -> float:
    """The least p that ``sign_flip_p`` can return: 2^(1 − pairs)."""
    return float(2.0 ** (1 - pairs))


def pairs_needed(arms: int) -> int:
    """The fewest pairs with which one of so many arms can pass Holm at all: ``2^(1 − pairs)·arms ≤ 0.05``."""
    return 1 + int(np.ceil(np.log2(arms / SIGNIFICANCE)))


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment: family-wise error over all arms under any dependence between them.

    Sorted ascending, ``p̃_(i) = max_{j ≤ i} min(1, (m − j + 1)·p_(j))``. An arm that could not be tested
    (None) stays None and still counts among the m, or censoring would make the others look better.
    """
    family = len(p)
    adjusted: dict[str, float | None] = dict.fromkeys(p)
    largest = 0.0
    tested = sorted(((value, arm) for arm, value in p.items() if value is not None), key=lambda pair: pair[0])
    for rank, (value, arm) in enumerate(tested):
        largest = max(largest, min(1.0, (family - rank) * value))
        adjusted[arm] = largest
    return adjusted


def limits(pairs: int, arms: int) -> str:
    """What so many seeds can and cannot show about so many arms, in sentences for a reader."""
    seeds = f"{pairs} seed{'s' if pairs != 1 else ''}"
    if pairs < 2:
        return f"With {seeds} there is no interval and no test: a difference may be the seed's own."
    family = f"Holm over {arms} arm{'s' if arms != 1 else ''}"
    text = (
        f"With {seeds}, a nominal {LEVEL:.0%} bootstrap interval holds the true mean about "
        f"{typical_coverage(pairs):.0%} of the time for normal differences: read it as the seeds' spread. "
        f"The sign-flip test cannot go below p = {smallest_p(pairs):.2g}"
    )
    if pairs < (needed := pairs_needed(arms)):
        return (
            f"{text}; {family} needs {needed} seeds before any arm can pass at {SIGNIFICANCE}, so nothing "
            "here can be called significant."
        )
    return f"{text}, which {family} leaves room for."
