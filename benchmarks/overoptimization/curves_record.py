"""Every seed's curve in JSON: what each evaluation measured, and the training steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r2m_ray.report.compare.curves import Curve, Rows
from r2m_ray.report.data import Series
from r2m_ray.run.vocabulary import REGISTRY, metric

ALARM_PREFIX = "alarm/"
ALARMS = tuple(name.removeprefix(ALARM_PREFIX) for name in REGISTRY if name.startswith(ALARM_PREFIX))
EVALUATED = tuple(map(metric, (
    "response/length_mean", "pairs/accuracy", "pairs/frozen_accuracy", "pairs/calibration_error",
    "pairs/frozen_calibration_error", "pairs/style_accuracy", "pairs/frozen_style_accuracy",
    "pairs/value_accuracy", "pairs/frozen_value_accuracy", "gold/correct", "gold/wrong", "gold/corrected",
    "gold/courtesy", "gold/intensifiers", "gold/repeats", "gold/excess_tokens",
)))  # fmt: skip
"""Of each evaluation, on its fixed prompts and held-out pairs."""
TRAINED = tuple(map(metric, (
    "gold/correlation", "gold/frozen_correlation", "gold/pair_precision", "omega", "reward/group_entropy",
    "reward/group_std", "reward/pair_flip_rate", "reward/scale_ratio", "rm/attention_entropy",
    "rm/feedback_ratio", "rm/flip_rate", "rm/gradient_norm_bradley_terry", "rm/gradient_norm_entropy",
    "rm/group_std",
)))  # fmt: skip
"""What needs groups of responses: mean over the training steps since the evaluation before, on their fresh
prompts; null at the first one."""
DIGITS = 5
"""Significant digits."""


def curves_record(curves: Mapping[str, Sequence[Curve]]) -> dict[str, dict[str, Any]]:
    """By arm and seed; measures that a run lacks are left out, and those that are not finite are null.

    ``alarms`` has the first step of each alarm that was ever on.
    """
    return {arm: {str(curve.seed): _record(curve) for curve in several} for arm, several in curves.items()}


def first_alarms(training: Rows) -> dict[str, int]:
    """The first step at which each alarm of a run was on, of those that ever were."""
    raised = {name: training.steps[training.series(f"{ALARM_PREFIX}{name}") > 0] for name in ALARMS}
    return {name: int(steps[0]) for name, steps in raised.items() if len(steps)}


def _record(curve: Curve) -> dict[str, Any]:
    trained = {key: _between(curve, key) for key in TRAINED}
    return {
        "steps": curve.steps.tolist(),
        "kl": _rounded(curve.kl),
        "gold": _rounded(curve.gold),
        "frozen": _rounded(curve.frozen),
        "own": _rounded(curve.own),
        **{
            key: _rounded(curve.evaluations.series(key))
            for key in EVALUATED
            if key in curve.evaluations.metrics
        },
        **{key: _rounded(values) for key, values in trained.items() if np.isfinite(values).any()},
        "alarms": first_alarms(curve.training),
    }


def _between(curve: Curve, key: str) -> Series:
    """Means over the training steps after each evaluation's predecessor, up to its own."""
    training, values = curve.training, curve.training.series(key)
    means = np.full(len(curve.steps), np.nan)
    for i in range(1, len(curve.steps)):
        inside = (training.steps > curve.steps[i - 1]) & (training.steps <= curve.steps[i])
        known = values[inside & np.isfinite(values)]
        if len(known):
            means[i] = known.mean()
    return means


def _rounded(values: Series) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]
