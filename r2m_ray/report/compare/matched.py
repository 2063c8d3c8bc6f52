"""Gold at matched KL: where a run's path first reaches a KL, and how far to go before it is called peak.

A path goes from evaluation to evaluation, straight in KL and gold. KL does not always rise along it, so a KL
may be passed several times: the **first passage** counts, because that is the policy one would have stopped
at. A path that never gets as far is censored there: it has no value, and none is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2m_ray.errors import InputError
from r2m_ray.report.compare.curves import Curve, Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Where a path first reaches a KL: ``fraction`` of the way from evaluation ``index`` to the next one."""

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
    """The first place on the path with this KL (nats per response), None where the path never reaches it.

    Raises ValueError for a negative or infinite KL.
    """
    if not 0 <= kl < np.inf:
        raise ValueError(f"kl={kl}: a KL is finite and not negative")
    beyond = np.flatnonzero(curve.kl >= kl)
    if not len(beyond):
        return None
    index = int(beyond[0])
    if index == 0:
        return Passage(index=0, fraction=0.0)
    before, after = curve.kl[index - 1], curve.kl[index]
    return Passage(index=index - 1, fraction=float((kl - before) / (after - before)))


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


def peak_of_mean(curves: Sequence[Curve]) -> Peak:
    """KL* of an arm: the KL at which the mean over its seeds, step by step, is highest in gold.

    The mean and not the best evaluation, which would be the luckiest one. Raises InputError where the curves
    were not evaluated after the same steps, or where mean gold is highest before any training.
    """
    top = highest_of_mean(curves)
    if top.kl == 0:
        raise InputError(
            f"arm {curves[0].arm!r}: mean gold is highest at KL 0, before training, so there is no KL* to "
            "match at. The world fails its gate of a baseline that first improves."
        )
    return top


def highest_of_mean(curves: Sequence[Curve]) -> Peak:
    """Where the mean over seeds is highest in gold, at KL 0 perhaps; InputError for different steps."""
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
    return Peak(
        arm=curves[0].arm,
        kl=float(kl[best]),
        gold=float(gold[best]),
        step=int(steps[best]),
        share=float(steps[best] / steps[-1]),
    )
