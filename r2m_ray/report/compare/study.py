"""The comparison that was decided on before the runs: endpoints, and each arm against the baseline.

With gold, primary are gold at KL*, 2 KL* and 4 KL* and the area under gold over [0, 4 KL*], where KL* is the
baseline's and counts as fixed: the intervals do not hold its own uncertainty. Gold at KLs between them shows
whether much depends on it, where the baseline's peak is flat.

Without gold, the frozen reward model's score is compared at matched KL. It is a proxy that training exploits,
so a higher score at the same KL is no proof of a better policy: those endpoints show how arms differ, and
never which one is good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from r2m_ray.errors import InputError
from r2m_ray.report.compare.curves import FROZEN, OWN, Comparison, Curve, require_same
from r2m_ray.report.compare.matched import (
    Peak,
    area,
    fall,
    fallen,
    frozen_at,
    gold_at,
    highest,
    mean_gold,
)
from r2m_ray.report.compare.statistics import Interval, holm, paired_interval, sign_flip_p
from r2m_ray.run.vocabulary import metric

MULTIPLES = (1, 2, 4)
"""Of KL*, where gold is matched; the area reaches to the last."""
BETWEEN = (0.5, 1.5, 3)
"""Of KL*, where gold is reported beside the primary endpoints."""
SHARES = (0.25, 0.5, 1.0)
"""Of the largest KL that every run reaches, where the frozen score is matched without gold."""
FALL = 0.5
"""The fall of gold whose KL is reported: what over-optimization must at least cost here."""
SHARED_NAME = "shared_mean_gold"
"""The endpoint over the KL that an arm and the baseline both reach under every seed: a range per arm."""
ACCURACIES = {
    metric("pairs/accuracy"): "Accuracy of the arm's own reward model on held-out pairs, at the end",
    metric("pairs/frozen_accuracy"): "Accuracy of the frozen reward model on the same pairs",
}

Values = tuple[float | None, ...]
"""One number per seed, in the order of the seeds; None where the arm is censored."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A number that a curve has or is censored in. label: for a reader. kl: nats it is taken at or up to."""

    name: str
    label: str
    value: Callable[[Curve], float | None]
    kl: float | None = None
    primary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One arm minus the baseline in one endpoint.

    differences: per seed, None where either is censored. interval: over the seeds that have both, None for
    fewer than two. p: the sign-flip test's, None where any seed is censored, because those that reach a KL
    are not a fair sample of all. p_holm: p over all arms of this endpoint. kl: as of the endpoint.
    """

    arm: str
    endpoint: str
    differences: Values
    interval: Interval | None
    p: float | None
    p_holm: float | None
    kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything the tables show.

    gold: whether gold is known. peak: where KL* is; None without gold, and where the baseline has none.
    values: of each endpoint and arm, one number per seed.
    """

    baseline: str
    seeds: tuple[int, ...]
    gold: bool
    peak: Peak | None
    endpoints: tuple[Endpoint, ...]
    values: Mapping[str, Mapping[str, Values]]
    contrasts: Mapping[str, Mapping[str, Contrast]]

    @property
    def challengers(self) -> tuple[str, ...]:
        """Every arm but the baseline."""
        return tuple(arm for arm in next(iter(self.values.values())) if arm != self.baseline)


def study(comparison: Comparison, top: Peak | None) -> Study:
    """Compare every arm with the baseline in the endpoints that the curves allow.

    That is gold at matched KL; without a KL* unmatched endpoints alone; without gold the frozen score.

    Args:
        comparison: the curves, paired by seed.
        top: where KL* is, of ``mean_peak`` over all seeds of the baseline, though fewer be compared here: a
            peak that only some of them have is none.

    Raises:
        InputError: there is no other arm, or only some runs have gold; or, without gold, runs of one seed
            have different reward models, whose scores have nothing in common.
    """
    if not comparison.challengers:
        raise InputError(f"only {comparison.baseline!r} to compare. Give the runs of another arm.")
    arms = comparison.arms.items()
    gold = all(curve.knows_gold for curve in comparison.curves(comparison.baseline))
    if gold:
        for curve in (curve for _, curves in arms for curve in curves):
            if not curve.knows_gold:
                raise InputError(f"{curve.source}: no gold score to compare at matched KL.")
        found = UNMATCHED if top is None else endpoints(top.kl)
    else:
        found, top = tuple(_proxy_endpoints(comparison)), None
    contrasts = {e.name: _contrasts(comparison, dict.fromkeys(comparison.challengers, e)) for e in found}
    if top:
        shared = {arm: _shared(comparison, arm, top.kl) for arm in comparison.challengers}
        contrasts[SHARED_NAME] = _contrasts(comparison, shared)
    return Study(
        baseline=comparison.baseline,
        seeds=comparison.seeds,
        gold=gold,
        peak=top,
        endpoints=found,
        values={e.name: {arm: tuple(map(e.value, curves)) for arm, curves in arms} for e in found},
        contrasts=contrasts,
    )


def endpoints(kl_star: float) -> tuple[Endpoint, ...]:
    """The endpoints of a comparison whose baseline peaks at KL* nats per response, the primary ones first."""
    widest = MULTIPLES[-1] * kl_star
    label = f"Area under gold over KL from 0 to {MULTIPLES[-1]} KL* = {widest:.3g} nats"
    under = Endpoint("area", label, partial(area, kl=widest), widest, primary=True)
    matched = [_gold_at(multiple, kl_star, primary=True) for multiple in MULTIPLES]
    between = [_gold_at(multiple, kl_star, primary=False) for multiple in BETWEEN]
    return (*matched, under, *between, *UNMATCHED)


def of_kl_star(multiple: float) -> str:
    """The name of a multiple of KL*."""
    return "KL*" if multiple == 1 else f"{multiple:g} KL*"


def _gold_at(multiple: float, kl_star: float, *, primary: bool) -> Endpoint:
    kl = multiple * kl_star
    label = f"Gold at {of_kl_star(multiple)} = {kl:.3g} nats"
    return Endpoint(f"gold_at_{multiple:g}_kl_star", label, partial(gold_at, kl=kl), kl, primary)


def _fall_kl(curve: Curve) -> float | None:
    place = fallen(curve, FALL)
    return None if place is None else place.of(curve.kl)


FINAL_KL = Endpoint("final_kl", "Final KL, nats", lambda curve: float(curve.kl[-1]))
UNMATCHED = (
    Endpoint("final_gold", "Final gold", lambda curve: float(curve.gold[-1])),
    FINAL_KL,
    Endpoint("peak_gold", "Highest evaluation of gold", lambda curve: float(curve.gold[highest(curve)])),
    Endpoint("peak_kl", "KL of that evaluation, nats", lambda curve: float(curve.kl[highest(curve)])),
    Endpoint("fall", "Fall of gold from there to the end", fall),
    Endpoint("fall_kl", f"KL at which gold had fallen by {FALL:g}, nats", _fall_kl),
)
"""Endpoints that need no KL*."""


def _shared(comparison: Comparison, arm: str, kl_star: float) -> Endpoint:
    both = (*comparison.curves(arm), *comparison.curves(comparison.baseline))
    upper = min(MULTIPLES[-1] * kl_star, *(curve.max_kl for curve in both))
    value = partial(mean_gold, kl=upper) if upper > 0 else lambda curve: None
    return Endpoint(SHARED_NAME, "Mean gold over the KL that both reach", value, upper)


def _proxy_endpoints(comparison: Comparison) -> Iterator[Endpoint]:
    """Endpoints without gold; accuracies are left out where a run did not measure them."""
    for runs in zip(*comparison.arms.values(), strict=True):
        rule = "without gold, runs of one seed are compared by one reward model"
        require_same(runs, lambda path: path == "model.reward", rule)
    curves = [curve for arm in comparison.arms.values() for curve in arm]
    upper = min(curve.max_kl for curve in curves)
    for share in SHARES if upper > 0 else ():
        kl = share * upper
        label = f"Score of the frozen reward model at {kl:.3g} nats"
        name = f"frozen_at_{share:g}_of_common_kl"
        yield Endpoint(name, label, partial(frozen_at, kl=kl), kl, primary=True)
    yield Endpoint("final_frozen", "Final score of the frozen reward model", partial(_last, name=FROZEN))
    yield FINAL_KL
    label = "Final score of the arm's own reward model minus the frozen one's"
    yield Endpoint("gap", label, lambda curve: _last(curve, OWN) - _last(curve, FROZEN))
    for name, label in ACCURACIES.items():
        if all(np.isfinite(_last(curve, name)) for curve in curves):
            yield Endpoint(name, label, partial(_last, name=name))


def _last(curve: Curve, name: str) -> float:
    """A metric of the last evaluation, NaN where the run did not measure it."""
    return float(curve.evaluations.series(name)[-1])


def _contrasts(comparison: Comparison, endpoints: Mapping[str, Endpoint]) -> dict[str, Contrast]:
    """Each arm minus the baseline in the arm's endpoint; p adjusted over all of these arms."""
    found = {}
    for arm, endpoint in endpoints.items():
        pairs = zip(comparison.curves(arm), comparison.curves(comparison.baseline), strict=True)
        values = [(endpoint.value(ours), endpoint.value(theirs)) for ours, theirs in pairs]
        differences = tuple(None if a is None or b is None else a - b for a, b in values)
        known = [difference for difference in differences if difference is not None]
        found[arm] = Contrast(
            arm=arm,
            endpoint=endpoint.name,
            differences=differences,
            interval=paired_interval(known) if len(known) > 1 else None,
            p=sign_flip_p(known) if len(known) == len(differences) > 1 else None,
            p_holm=None,
            kl=endpoint.kl,
        )
    adjusted = holm({arm: contrast.p for arm, contrast in found.items()})
    return {arm: replace(contrast, p_holm=adjusted[arm]) for arm, contrast in found.items()}
