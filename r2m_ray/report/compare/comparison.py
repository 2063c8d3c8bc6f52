"""Arms beside each other: the same world, the same seeds, one method per arm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from r2m_ray.config.fields import deciding
from r2m_ray.config.schema import Compare
from r2m_ray.errors import InputError, hint
from r2m_ray.report.compare.curves import Curve, read_curve
from r2m_ray.report.compare.statistics import MOST_FLIPPED

WORLD = deciding(Compare.always)
"""Settings that are the same in every run: the world, its models, the budget, and how it is measured."""
START = deciding(Compare.seed)
"""Settings that are the same in every run of a seed; the reward model may be what an arm is about."""
METHOD = deciding(Compare.arm)
"""Settings that are the same under every seed of an arm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Curves of several arms, paired by seed.

    arms: of each arm, its curves in the order of ``seeds``. baseline: the arm that others are held against.
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


def read_comparison(runs: Mapping[str, Sequence[Path]], baseline: str, *, gold: bool = True) -> Comparison:
    """Read the run directories of each arm and compare them; errors of ``read_curve`` and ``comparison``."""
    curves = (read_curve(path, arm, gold=gold) for arm, paths in runs.items() for path in paths)
    return comparison(curves, baseline)


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
        lacking = [seed for seed in every if seed not in seeds]
        if lacking:
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
    paired = Comparison(arms=MappingProxyType(arms), seeds=tuple(every), baseline=baseline)
    paired.curves(baseline)
    return paired


def _check_alike(arms: Mapping[str, tuple[Curve, ...]]) -> None:
    everyone = [curve for curves in arms.values() for curve in curves]
    require_same(everyone, WORLD, "runs of one comparison share their world, budget and measurement")
    for curves in zip(*arms.values(), strict=True):
        require_same(curves, START, "runs of one seed start from the same policy")
    for arm, curves in arms.items():
        require_same(curves, METHOD, f"the runs of arm {arm!r} are one method under several seeds")


def require_same(curves: Sequence[Curve], sections: Sequence[str], rule: str) -> None:
    """Raise InputError at the first setting below ``sections`` that a curve does not share with the first."""
    for curve in curves[1:]:
        first = curves[0]
        for path in sorted(first.settings.keys() | curve.settings.keys()):
            if not any(path == s or path.startswith(f"{s}.") for s in sections):
                continue
            ours, theirs = first.settings.get(path), curve.settings.get(path)
            if ours != theirs:
                raise InputError(
                    f"{path} is {ours!r} in {first.source} and {theirs!r} in {curve.source}; {rule}. "
                    "Leave one of them out or run it again."
                )
