"""What one curve amounts to: its end, its peak, its fall, and its gold over a range of KL."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import area


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point of a path: gold, KL (nats per response) and training step, between evaluations perhaps."""

    gold: float
    kl: float
    step: float


def final(curve: Curve) -> Place:
    """The last evaluation."""
    return _evaluation(curve, -1)


def peak(curve: Curve) -> Place:
    """The evaluation with the highest gold, the earliest of equals.

    The highest of many noisy values lies above the highest of their expectations, so a peak flatters.
    """
    return _evaluation(curve, int(np.argmax(curve.gold)))


def fall(curve: Curve) -> float:
    """Gold lost between the peak and the last evaluation; never negative."""
    return peak(curve).gold - final(curve).gold


def fallen(curve: Curve, amount: float) -> Place | None:
    """Where the path, after its peak, first lies ``amount`` of gold below it; None if it never fell so far.

    Raises ValueError for an amount that is not positive.
    """
    if not amount > 0:
        raise ValueError(f"amount={amount}: a fall is positive")
    top = int(np.argmax(curve.gold))
    level = curve.gold[top] - amount
    below = np.flatnonzero(curve.gold[top:] <= level)
    if not len(below):
        return None
    index = top + int(below[0])
    before, after = curve.gold[index - 1], curve.gold[index]
    part = float((before - level) / (before - after))

    def between(values: np.ndarray) -> float:
        return float(values[index - 1] + part * (values[index] - values[index - 1]))

    return Place(gold=float(level), kl=between(curve.kl), step=between(curve.steps))


def common_range(curves: Iterable[Curve]) -> float:
    """The largest KL that every one of the curves reaches, nats per response."""
    return min(curve.max_kl for curve in curves)


def mean_gold(curve: Curve, kl: float) -> float | None:
    """Area under gold over [0, kl], divided by ``kl``: comparable between ranges; None where censored.

    Raises ValueError for a range without extent.
    """
    if not kl > 0:
        raise ValueError(f"kl={kl}: a range of KL has a positive end")
    total = area(curve, kl)
    return None if total is None else total / kl


def _evaluation(curve: Curve, index: int) -> Place:
    return Place(gold=float(curve.gold[index]), kl=float(curve.kl[index]), step=float(curve.steps[index]))
