"""The path a finished run took, from its evaluations: KL, gold and both rewards, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from r2m_ray.errors import InputError
from r2m_ray.report.data import Row, RunRecord, column, known, read_run
from r2m_ray.run.files import METRICS_FILE

Series = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

GOLD = "gold"
REQUIRED = ("kl_sequence", "frozen_reward", "reward")
"""Keys of an evaluation without which a run has no place in a comparison, beside gold where it is known."""
START_KL = 0.1
"""Nats per response that two engines may disagree by on one policy; more means a start off the reference."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One arm's evaluations under one seed; all series are read-only and as long as ``steps``.

    steps: training steps after which the run was evaluated, from 0 to the planned last one.
    kl: KL to the reference, nats per response; 0 at step 0, never negative.
    gold, frozen, own: mean gold score, score of the original reward model, and score of the arm's own; gold
    is NaN throughout where the task knows none.
    metrics: every key of the evaluations by its name, NaN where a row lacks it.
    settings: the run's configuration, value by dotted path.
    """

    arm: str
    seed: int
    source: Path
    steps: NDArray[np.int64]
    kl: Series
    gold: Series
    frozen: Series
    own: Series
    metrics: Mapping[str, Series]
    settings: Mapping[str, Any]

    @property
    def knows_gold(self) -> bool:
        """Whether the task has a gold score."""
        return bool(np.isfinite(self.gold).all())

    @property
    def max_kl(self) -> float:
        """The largest KL of any evaluation, nats per response."""
        return float(self.kl.max())


def read_curve(directory: Path, arm: str, *, gold: bool = True) -> Curve:
    """The curve of a finished run; ``arm`` is the name it goes by in a comparison.

    Raises InputError naming the file and the remedy for a run that is missing, damaged or half-finished, for
    one that does not start at its reference, and, unless ``gold`` is False, for one without gold.
    """
    run = read_run(directory)
    file = directory / METRICS_FILE
    rows = run.evaluations
    _check_steps(file, run)
    _check_values(file, rows, (*REQUIRED, GOLD) if gold else REQUIRED)
    kl = column(rows, "kl_sequence")
    if abs(kl[0]) > START_KL:
        raise InputError(
            f"{file}: the KL at step 0 is {kl[0]:.3g} nats, so this run did not start at its reference and "
            "its KL cannot be matched. Run it again with model.reference=null."
        )
    kl[0] = 0.0
    names = sorted({key for row in rows for key in row} - {"step", "kind", "nonfinite"})
    settings = dict(flat(run.config))
    return Curve(
        arm=arm,
        seed=int(settings["run.seed"]),
        source=directory,
        steps=_fixed(np.array([row["step"] for row in rows], dtype=np.int64)),
        # The estimate log π − log π_ref is below 0 now and then where the KL is close to it.
        kl=_fixed(np.maximum(kl, 0.0)),
        gold=_fixed(column(rows, GOLD)),
        frozen=_fixed(column(rows, "frozen_reward")),
        own=_fixed(column(rows, "reward")),
        metrics=MappingProxyType({name: _fixed(column(rows, name)) for name in names}),
        settings=MappingProxyType(settings),
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted path."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_steps(file: Path, run: RunRecord) -> None:
    steps = [int(row["step"]) for row in run.evaluations]
    if not steps or steps[0] != 0:
        raise InputError(
            f"{file}: no evaluation at step 0, where every path starts. "
            "Run it again with evaluate.prompts > 0."
        )
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise InputError(f"{file}: evaluations out of order or twice. Restore the file or run again.")
    if steps[-1] != run.planned_steps:
        raise InputError(
            f"{file}: half-finished, its last evaluation is after step {steps[-1]} of {run.planned_steps}. "
            "Finish it with run.resume=true, or leave it out of the comparison."
        )


def _check_values(file: Path, rows: Sequence[Row], required: Sequence[str]) -> None:
    if GOLD in required and not known(rows, GOLD):
        raise InputError(
            f"{file}: no gold score. Use a task that knows one (task=note2answer) and evaluate.prompts > 0."
        )
    for key in required:
        holes = np.flatnonzero(~np.isfinite(column(rows, key)))
        if len(holes):
            raise InputError(
                f"{file}: {key} has no finite value after step {rows[holes[0]]['step']}. Find out what broke "
                "there and run again; a path with a hole cannot be matched."
            )


def _fixed(values: NDArray[Scalar]) -> NDArray[Scalar]:
    values.flags.writeable = False
    return values
