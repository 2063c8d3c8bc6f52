"""Places on a run's path: gold at matched KL, the peak, the fall from it, and gold over a range of KL.

A path goes from evaluation to evaluation, straight in KL and gold. KL does not always rise along it, so a KL
may be passed several times: the **first passage** counts, because one would have stopped at that policy. A
path that never gets as far is censored there: it has no value, and none is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2m_ray.errors import InputError
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.data import Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A place on a path: ``fraction`` of the way from evaluation ``index`` to the next one."""

    index: int
    fraction: float

    def of(self, values: Series) -> float:
        """A series of the curve at this place, interpolated."""
        if self.fraction == 0:
            return float(values[self.index])
        return float((1 - self.fraction) * values[self.index] + self.fraction * values[self.index + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Where the mean curve of several seeds is highest in gold.

    arm: whose curve. kl: KL*, its mean KL there, nats per response. gold: its mean gold there. step: the
    training step. share: ``step`` over the run's last step; 1 means that the runs ended before they
    over-optimized.
    """

    arm: str
    kl: float
    gold: float
    step: int
    share: float


def first_passage(curve: Curve, kl: float) -> Passage | None:
    """The first place on the path with this KL (nats per response), None where the path never reaches it."""
    beyond = np.flatnonzero(curve.kl >= kl)
    if not len(beyond):
        return None
    index = int(beyond[0])
    return _between(curve.kl, index, kl) if index else Passage(index=0, fraction=0.0)


def gold_at(curve: Curve, kl: float) -> float | None:
    """Gold where the path first reaches ``kl``; None where the curve is censored."""
    passage = first_passage(curve, kl)
    return None if passage is None else passage.of(curve.gold)


def frozen_at(curve: Curve, kl: float) -> float | None:
    """Score of the original reward model where the path first reaches ``kl``; None where censored."""
    passage = first_passage(curve, kl)
    return None if passage is None else passage.of(curve.frozen)


def area(curve: Curve, kl: float) -> float | None:
    """``∫₀^kl gold at first passage``, gold times nats, exact on the path; None where the curve is censored.

    Gold may jump at a KL from which the path went back: it continues with the gold of its return.
    """
    if first_passage(curve, kl) is None:
        return None
    total, reached = 0.0, 0.0
    for i in range(1, len(curve.kl)):
        start, end = curve.kl[i - 1], curve.kl[i]
        high = min(float(end), kl)
        if high <= reached:
            continue
        slope = (curve.gold[i] - curve.gold[i - 1]) / (end - start)
        middle = curve.gold[i - 1] + slope * ((reached + high) / 2 - start)
        total += float(middle) * (high - reached)
        reached = high
    return total


def mean_gold(curve: Curve, kl: float) -> float | None:
    """Area under gold over [0, kl], divided by ``kl`` > 0: comparable between ranges; None where censored."""
    total = area(curve, kl)
    return None if total is None else total / kl


def highest(curve: Curve) -> int:
    """Index of the evaluation with the highest gold, the earliest of equals.

    The highest of many noisy values lies above the highest of their expectations, so a peak flatters.
    """
    return int(np.argmax(curve.gold))


def fall(curve: Curve) -> float:
    """Gold lost between the highest evaluation and the last one; never negative."""
    return float(curve.gold[highest(curve)] - curve.gold[-1])


def fallen(curve: Curve, amount: float) -> Passage | None:
    """Where the path first lies ``amount`` > 0 of gold below its highest evaluation, after that one.

    None where it never fell so far.
    """
    top = highest(curve)
    level = float(curve.gold[top]) - amount
    below = np.flatnonzero(curve.gold[top:] <= level)
    return _between(curve.gold, top + int(below[0]), level) if len(below) else None


def mean_peak(curves: Sequence[Curve]) -> Peak | None:
    """KL* of an arm: the KL at which the mean over its seeds, step by step, is highest in gold.

    The mean and not the best evaluation, which would be the luckiest one. None without curves or gold, and
    where mean gold is highest before any training. Raises InputError for curves of different steps.
    """
    if not curves or not all(curve.knows_gold for curve in curves):
        return None
    steps = curves[0].steps
    for curve in curves[1:]:
        if not np.array_equal(curve.steps, steps):
            raise InputError(
                f"{curve.source} was evaluated after other steps than {curves[0].source}, so they have no "
                "mean curve. Run both with the same evaluate.every and algo.steps."
            )
    gold = np.mean([curve.gold for curve in curves], axis=0)
    kl = np.mean([curve.kl for curve in curves], axis=0)
    best = int(np.argmax(gold))
    if kl[best] == 0:
        return None
    return Peak(
        arm=curves[0].arm,
        kl=float(kl[best]),
        gold=float(gold[best]),
        step=int(steps[best]),
        share=float(steps[best] / steps[-1]),
    )


def _between(values: Series, index: int, value: float) -> Passage:
    """Where a series takes ``value`` on the way to its entry ``index`` from the one before."""
    before, after = values[index - 1], values[index]
    return Passage(index=index - 1, fraction=float((value - before) / (after - before)))
