"""What runs without a gold score can say: the frozen reward model's score at matched KL, and its trust.

The frozen score is a proxy that training exploits, so a higher one at the same KL is no proof of a better
policy: the endpoints here tell arms apart, and never say which is good.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from r2m_ray.report.compare.comparison import Comparison, require_same
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import frozen_at
from r2m_ray.report.compare.measures import common_range
from r2m_ray.report.compare.statistics import RESAMPLES
from r2m_ray.report.compare.study import Endpoint, Study, contrasted

SHARES = (0.25, 0.5, 1.0)
"""Of the largest KL that every run reaches, where the frozen score is matched."""
ACCURACIES = {
    "rm_accuracy": "Accuracy of the arm's own reward model on held-out pairs, at the end",
    "rm_accuracy_frozen": "Accuracy of the frozen reward model on the same pairs",
}


def proxy_study(comparison: Comparison, *, seed: int = 0, resamples: int = RESAMPLES) -> Study:
    """Compare every arm with the baseline, without gold.

    Accuracies are left out where a run did not measure them. Raises InputError where there is no other arm,
    and where runs of one seed have different reward models, whose scores have nothing in common.
    """
    for runs in zip(*comparison.arms.values(), strict=True):
        require_same(
            runs, ("model.reward",), "without gold, runs of one seed are compared by one reward model"
        )
    curves = [curve for arm in comparison.arms.values() for curve in arm]
    upper = common_range(curves)
    found = [_matched(share, upper) for share in SHARES] if upper > 0 else []
    found += [
        _last("final_frozen", "Final score of the frozen reward model", lambda curve: curve.frozen[-1]),
        _last("final_kl", "Final KL, nats", lambda curve: curve.kl[-1]),
        _last("gap", "Final score of the arm's own reward model minus the frozen one's", gap),
    ]
    for key, label in ACCURACIES.items():
        if all(np.isfinite(last(curve, key)) for curve in curves):
            found.append(_last(key, label, partial(last, key=key)))
    return contrasted(comparison, found, seed=seed, resamples=resamples)


def gap(curve: Curve) -> float:
    """How far the arm's own reward model has moved from the frozen one, on the policy's last responses."""
    return float(curve.own[-1] - curve.frozen[-1])


def last(curve: Curve, key: str) -> float:
    """A metric of the last evaluation, NaN where the run did not measure it."""
    return float(curve.metrics[key][-1]) if key in curve.metrics else float("nan")


def _matched(share: float, upper: float) -> Endpoint:
    kl = share * upper
    return Endpoint(
        name=f"frozen_at_{share:g}_of_common_kl",
        label=f"Score of the frozen reward model at {kl:.3g} nats",
        primary=True,
        value=partial(frozen_at, kl=kl),
        kl=kl,
    )


def _last(name: str, label: str, value: Callable[[Curve], float]) -> Endpoint:
    return Endpoint(name=name, label=label, primary=False, value=lambda curve: float(value(curve)))
