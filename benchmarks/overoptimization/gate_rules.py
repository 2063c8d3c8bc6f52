"""Whether a world over-optimizes at all: asked of the baseline alone, before any arm is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2m_ray.report.compare.curves import Curve, Series
from r2m_ray.report.compare.measures import fall, peak

LEAST_RISE = 0.2
LEAST_FALL = 0.5
PEAK_SHARE = (0.1, 0.4)
"""Where in the run gold peaks, both ends allowed."""
STEADY = 0.9
"""The least rank correlation of the proxy with the step that passes for a steady rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineGate:
    """What one seed's baseline did, held against what an over-optimizing one does.

    proxy_trend: Spearman's correlation of the frozen proxy with the step. rise: of gold, from step 0 to its
    highest evaluation; fall: from there to the end. peak_share: that evaluation's step over the last step.
    """

    seed: int
    proxy_trend: float
    rise: float
    fall: float
    peak_share: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, a sentence each; empty where the seed passes."""
        low, high = PEAK_SHARE
        checks = (
            (self.proxy_trend >= STEADY, f"the proxy does not rise steadily (trend {self.proxy_trend:.2f})"),
            (self.rise >= LEAST_RISE, f"gold rises by {self.rise:.2f}, less than {LEAST_RISE}"),
            (
                low <= self.peak_share <= high,
                f"gold peaks at {self.peak_share:.0%}, not {low:.0%}–{high:.0%}",
            ),
            (self.fall >= LEAST_FALL, f"gold falls by {self.fall:.2f}, less than {LEAST_FALL}"),
        )
        return tuple(f"seed {self.seed}: {message}." for passed, message in checks if not passed)


def baseline_gates(curves: Sequence[Curve]) -> tuple[BaselineGate, ...]:
    """The gate of every seed of a baseline; the world passes where no seed has a failure."""
    return tuple(
        BaselineGate(
            seed=curve.seed,
            proxy_trend=rank_correlation(curve.steps.astype(np.float64), curve.frozen),
            rise=peak(curve).gold - float(curve.gold[0]),
            fall=fall(curve),
            peak_share=peak(curve).step / float(curve.steps[-1]),
        )
        for curve in curves
    )


def rank_correlation(first: Series, second: Series) -> float:
    """Spearman's ρ, ties ranked in their middle; 0 where either series is constant."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def _ranks(values: Series) -> Series:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    middle: Series = (last - (count - 1) / 2)[place]
    return middle
