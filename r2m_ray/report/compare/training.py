"""The training steps of a run, beside its evaluations: what an arm's own updates did, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from r2m_ray.report.compare.curves import Series
from r2m_ray.report.data import column, read_run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """Every training step of one run; series are as long as ``steps``, NaN where a row lacks the metric."""

    arm: str
    seed: int
    steps: NDArray[np.int64]
    metrics: Mapping[str, Series]

    def series(self, key: str) -> Series:
        """One metric, NaN throughout where the run has none of this name."""
        if key in self.metrics:
            return self.metrics[key]
        return np.full(len(self.steps), np.nan)


def read_training(directory: Path, arm: str) -> Training:
    """The steps that a run has logged; InputError naming a file that is missing or damaged."""
    run = read_run(directory)
    names = sorted({key for row in run.steps for key in row} - {"step", "kind", "nonfinite"})
    return Training(
        arm=arm,
        seed=int(run.config["run"]["seed"]),
        steps=np.array([row["step"] for row in run.steps], dtype=np.int64),
        metrics=MappingProxyType({name: column(run.steps, name) for name in names}),
    )
