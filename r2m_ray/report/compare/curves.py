"""Finished runs as curves, and arms beside each other: the same world, the same seeds, one method per arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r2m_ray.config.fields import compared, leaves
from r2m_ray.config.schema import Compare
from r2m_ray.errors import InputError, hint
from r2m_ray.report.compare.statistics import MOST_FLIPPED
from r2m_ray.report.data import Row, RunRecord, Series, column, read_run
from r2m_ray.run.files import METRICS_FILE
from r2m_ray.run.vocabulary import metric

KL, GOLD = metric("kl/sequence"), metric("gold/mean")
FROZEN, OWN = metric("reward/frozen_mean"), metric("reward/mean")
START_KL = 0.1
"""Nats per response that two engines may disagree by on one policy; more means a start off the reference."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The rows of one kind in a run's ``metrics.jsonl``, as series of the length of ``steps``."""

    steps: NDArray[np.int64]
    metrics: Mapping[str, Series]

    def series(self, name: str) -> Series:
        """One metric, NaN where a row lacks it or it was not finite."""
        return self.metrics[name] if name in self.metrics else np.full(len(self.steps), np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One arm's run under one seed.

    evaluations: after steps from 0 to the planned last one. training: every training step. kl: of each
    evaluation the KL to the reference, nats per response; 0 at step 0, never negative. settings: the run's
    configuration, value by dotted path.
    """

    arm: str
    seed: int
    source: Path
    settings: Mapping[str, Any]
    evaluations: Rows
    training: Rows
    kl: Series

    @property
    def steps(self) -> NDArray[np.int64]:
        """The training steps after which the run was evaluated."""
        return self.evaluations.steps

    @property
    def gold(self) -> Series:
        """Mean gold score; NaN throughout where the task knows none."""
        return self.evaluations.series(GOLD)

    @property
    def frozen(self) -> Series:
        """Mean score of the original reward model."""
        return self.evaluations.series(FROZEN)

    @property
    def own(self) -> Series:
        """Mean reward of the arm's own reward model."""
        return self.evaluations.series(OWN)

    @property
    def knows_gold(self) -> bool:
        """Whether every evaluation has a gold score."""
        return bool(np.isfinite(self.gold).all())

    @property
    def max_kl(self) -> float:
        """The largest KL of any evaluation, nats per response."""
        return float(self.kl.max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Curves of several arms, paired by seed.

    arms: of each arm, its curves in the order of ``seeds``. baseline: the arm that others are compared with.
    """

    arms: Mapping[str, tuple[Curve, ...]]
    seeds: tuple[int, ...]
    baseline: str

    def curves(self, arm: str) -> tuple[Curve, ...]:
        """One arm's curves in the order of the seeds; InputError for an arm that is not here."""
        if arm not in self.arms:
            known = list(self.arms)
            raise InputError(f"no arm {arm!r} here; there are {', '.join(known)}.{hint(arm, known)}")
        return self.arms[arm]

    @property
    def challengers(self) -> tuple[str, ...]:
        """Every arm but the baseline."""
        return tuple(arm for arm in self.arms if arm != self.baseline)


def read_curve(directory: Path, arm: str) -> Curve:
    """The curve of a finished run; ``arm`` is the name it goes by in a comparison.

    Raises InputError naming the file and the remedy for a run that is missing, damaged or half-finished, and
    for one that does not start at its reference.
    """
    run = read_run(directory)
    file = directory / METRICS_FILE
    _check_steps(file, run)
    evaluations = _rows(run.evaluations)
    for name in (KL, FROZEN, OWN):
        _check_finite(file, evaluations, name)
    kl = evaluations.series(KL)
    if abs(kl[0]) > START_KL:
        raise InputError(
            f"{file}: the KL at step 0 is {kl[0]:.3g} nats, so this run did not start at its reference and "
            "its KL cannot be matched. Run it again with model.reference=null."
        )
    settings = dict(leaves(run.config))
    return Curve(
        arm=arm,
        seed=int(settings["run.seed"]),
        source=directory,
        settings=settings,
        evaluations=evaluations,
        training=_rows(run.steps),
        # The estimate log π − log π_ref is below 0 now and then where the KL is close to it.
        kl=np.concatenate([[0.0], np.maximum(kl[1:], 0.0)]),
    )


def require_gold(curve: Curve) -> None:
    """Raise InputError for a run without gold, or with a gold score that is not finite."""
    file = curve.source / METRICS_FILE
    if not np.isfinite(curve.gold).any():
        raise InputError(
            f"{file}: no gold score. Use a task that knows one (task=note2answer) and evaluate.prompts > 0."
        )
    _check_finite(file, curve.evaluations, GOLD)


def read_comparison(runs: Mapping[str, Sequence[Path]], baseline: str) -> Comparison:
    """Read the run directories of each arm and pair them. As soon as one run has gold, all must.

    Raises the InputErrors of ``read_curve``, ``require_gold`` and ``comparison``.
    """
    curves = [read_curve(path, arm) for arm, paths in runs.items() for path in paths]
    paired = comparison(curves, baseline)
    if any(np.isfinite(curve.gold).any() for curve in curves):
        for curve in curves:
            require_gold(curve)
    return paired


def comparison(curves: Iterable[Curve], baseline: str) -> Comparison:
    """Pair curves by seed.

    Raises InputError naming the runs for an arm that lacks a seed or has it twice, for different worlds,
    different starts under one seed, different methods under one arm's name, or more seeds than can be tested.
    """
    found: dict[str, dict[int, Curve]] = {}
    for curve in curves:
        seeds = found.setdefault(curve.arm, {})
        if curve.seed in seeds:
            raise InputError(
                f"{curve.source} and {seeds[curve.seed].source} are both arm {curve.arm!r} with run.seed="
                f"{curve.seed}. Leave one out."
            )
        seeds[curve.seed] = curve
    every = sorted({seed for seeds in found.values() for seed in seeds})
    for arm, seeds in found.items():
        if lacking := [seed for seed in every if seed not in seeds]:
            raise InputError(
                f"arm {arm!r} has no run with run.seed={lacking[0]}, which others have, and arms are paired "
                "by seed. Run it, or leave that seed out of every arm."
            )
    if len(every) > MOST_FLIPPED:
        raise InputError(
            f"{len(every)} seeds; tests are exact for up to {MOST_FLIPPED}: leave some out of every arm"
        )
    arms = {arm: tuple(seeds[seed] for seed in every) for arm, seeds in found.items()}
    _check_alike(arms)
    paired = Comparison(arms=arms, seeds=tuple(every), baseline=baseline)
    paired.curves(baseline)
    return paired


def require_same(curves: Sequence[Curve], matters: Callable[[str], bool], rule: str) -> None:
    """Raise InputError at the first setting that matters and that a curve does not share with the first."""
    first = curves[0]
    for curve in curves[1:]:
        for path in sorted(first.settings.keys() | curve.settings.keys()):
            ours, theirs = first.settings.get(path), curve.settings.get(path)
            if ours != theirs and matters(path):
                raise InputError(
                    f"{path} is {ours!r} in {first.source} and {theirs!r} in {curve.source}; {rule}. "
                    "Leave one of them out or run it again."
                )


def _check_alike(arms: Mapping[str, tuple[Curve, ...]]) -> None:
    everyone = [curve for curves in arms.values() for curve in curves]
    rule = "runs of one comparison share their world, budget and measurement"
    require_same(everyone, lambda path: compared(path) is Compare.always, rule)
    for curves in zip(*arms.values(), strict=True):
        rule = "runs of one seed start from the same policy"
        require_same(curves, lambda path: compared(path) is Compare.seed, rule)
    for arm, curves in arms.items():
        rule = f"the runs of arm {arm!r} are one method under several seeds"
        require_same(curves, lambda path: compared(path) is Compare.arm, rule)


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


def _check_finite(file: Path, rows: Rows, name: str) -> None:
    holes = np.flatnonzero(~np.isfinite(rows.series(name)))
    if len(holes):
        raise InputError(
            f"{file}: {name} has no finite value after step {rows.steps[holes[0]]}. Find out what broke "
            "there and run again; a path with a hole cannot be matched."
        )


def _rows(rows: Sequence[Row]) -> Rows:
    names = sorted({name for row in rows for name in row} - {"step", "kind", "nonfinite"})
    return Rows(
        steps=np.array([row["step"] for row in rows], dtype=np.int64),
        metrics={name: column(rows, name) for name in names},
    )
