"""The record of every seed's curve: evaluations as they are, training steps as means since the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from r2m_ray.report.compare.training import Training

from benchmarks.overoptimization.curves_record import curves_record
from r2m_ray.report.compare.curves import Curve

MakeCurve = Callable[..., Curve]


def test_training_steps_are_averaged_since_the_evaluation_before(make_curve: MakeCurve) -> None:
    curve = make_curve([0.0, 1.23456789, 4.0], [1.0, np.nan, 0.5], arm="rloo_r2m", seed=3)
    measured = {"rm_accuracy": np.array([0.7, 0.6, np.nan]), "unlisted": np.zeros(3)}
    curve = replace(curve, metrics=MappingProxyType(measured))
    steps = np.arange(1, 11)
    values = {
        "gold/pair_precision": np.where(steps == 4, np.nan, steps / 10),
        "reward/scale_ratio": np.full(10, np.nan),
        "time/step": np.ones(10),
        "alarm/kl": (steps > 6).astype(float),
        "alarm/flip_rate": np.zeros(10),
    }
    training = Training(arm="rloo_r2m", seed=3, steps=steps, metrics=MappingProxyType(values))
    other = Training(arm="rloo_r2m", seed=4, steps=steps, metrics=MappingProxyType({}))
    record = curves_record({"rloo_r2m": [curve]}, {"rloo_r2m": [other, training]})
    assert record == {
        "rloo_r2m": {
            "3": {
                "steps": [0, 5, 10],
                "kl": [0.0, 1.2346, 4.0],
                "gold": [1.0, None, 0.5],
                "frozen": [0.0, 1.2346, 4.0],
                "own": [0.0, 1.2346, 4.0],
                "rm_accuracy": [0.7, 0.6, None],
                "gold/pair_precision": [None, 0.275, 0.8],
                "alarms": {"kl": 7},
            }
        }
    }
    assert json.dumps(record, allow_nan=False)


def test_a_run_without_training_steps_has_its_evaluations(make_curve: MakeCurve) -> None:
    (found,) = curves_record({"rloo": [make_curve([0.0], [1.0], arm="rloo")]}, {})["rloo"].values()
    assert found == {"steps": [0], "kl": [0.0], "gold": [1.0], "frozen": [0.0], "own": [0.0]}
