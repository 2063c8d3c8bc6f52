"""The record of every seed's curve: evaluations as they are, training steps as means since the one before."""

from __future__ import annotations

import json

import numpy as np
from curve_fixtures import make_curve

from benchmarks.overoptimization.curves_record import curves_record


def test_training_steps_are_averaged_since_the_evaluation_before() -> None:
    steps = np.arange(1, 11)
    curve = make_curve(
        [0.0, 1.23456789, 4.0],
        [1.0, np.nan, 0.5],
        arm="rloo_r2m",
        seed=3,
        evaluated={"pairs/accuracy": [0.7, 0.6, np.nan], "unlisted": [0, 0, 0]},
        trained={
            "gold/pair_precision": np.where(steps == 4, np.nan, steps / 10),
            "reward/scale_ratio": np.full(10, np.nan),
            "time/step": np.ones(10),
            "alarm/kl": steps > 6,
            "alarm/flip_rate": np.zeros(10),
        },
    )
    record = curves_record({"rloo_r2m": [curve]})
    assert record == {
        "rloo_r2m": {
            "3": {
                "steps": [0, 5, 10],
                "kl": [0.0, 1.2346, 4.0],
                "gold": [1.0, None, 0.5],
                "frozen": [0.0, 1.2346, 4.0],
                "own": [0.0, 1.2346, 4.0],
                "pairs/accuracy": [0.7, 0.6, None],
                "gold/pair_precision": [None, 0.275, 0.8],
                "alarms": {"kl": 7},
            }
        }
    }
    assert json.dumps(record, allow_nan=False)
