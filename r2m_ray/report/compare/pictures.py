"""Pictures of a comparison: one panel per arm, every seed thin and their mean thick, or one bar per arm.

Each arm's panel shows the baseline's mean in grey, so panels need not share an axis that the worst arm would
stretch. An empty picture is None.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.study import Contrast, Endpoint, Study
from r2m_ray.report.compare.tables import CENSORED
from r2m_ray.report.data import Series
from r2m_ray.report.plots import FROZEN, GOLD, GREY, OWN, STYLE, WIDTH, blank, finish, grid, moving_average

Arms = Mapping[str, Sequence[Curve]]

COLUMNS = 4
SEED: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.35}
BAR_INCHES = 0.27
TITLE_LETTERS = 34
WINDOW_SHARE = 15
"""A moving average over training steps spans one in so many of them, and five at least."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of every panel: where a run's values lie."""

    label: str
    colour: str
    x: Callable[[Curve], Series | NDArray[np.int64]]
    y: Callable[[Curve], Series]
    style: str = "-"


def frontiers(arms: Arms, baseline: str) -> Figure | None:
    """Gold (solid) and the frozen proxy (dashed), as changes from the start, against √KL."""

    def distance(curve: Curve) -> Series:
        return np.sqrt(curve.kl)

    lines = [
        Line("gold", GOLD, distance, lambda curve: curve.gold - curve.gold[0]),
        Line("frozen RM (proxy)", FROZEN, distance, lambda curve: curve.frozen - curve.frozen[0], "--"),
    ]
    return _multiples(arms, baseline, lines, "√KL, per response", "change since the start")


def rewards(arms: Arms, baseline: str) -> Figure | None:
    """Gold, the frozen proxy and the arm's own reward over the training steps."""

    lines = [
        Line("gold", GOLD, lambda curve: curve.steps, lambda curve: curve.gold),
        Line("frozen RM", FROZEN, lambda curve: curve.steps, lambda curve: curve.frozen, "--"),
        Line("own RM", OWN, lambda curve: curve.steps, lambda curve: curve.own, "--"),
    ]
    return _multiples(arms, baseline, lines, "training step", "score")


def over_training(arms: Arms, baseline: str, key: str, label: str) -> Figure | None:
    """One metric of the training steps; arms that lack it have no panel, thick lines are moving averages."""
    line = Line(label, OWN, lambda curve: curve.training.steps, lambda curve: curve.training.series(key))
    known = {arm: curves for arm, curves in arms.items() if _known(line, curves)}
    return _multiples(known, baseline, [line], "training step", label, smooth=True)


def effects(study: Study) -> Figure | None:
    """Each arm's difference to the baseline in the primary endpoints: bar, interval, and every seed."""
    shown = [endpoint for endpoint in study.endpoints if endpoint.primary]
    arms = study.challengers
    if not shown:
        return None
    height = 1.3 + BAR_INCHES * len(arms)
    with rc_context(STYLE):
        figure = blank(height)
        left = 0.35 + 0.075 * max(map(len, arms))
        width = (WIDTH - left) / len(shown)
        for i, endpoint in enumerate(shown):
            box = ((left + i * width) / WIDTH, 0.5 / height, (width - 0.3) / WIDTH, (height - 1.1) / height)
            axes = figure.add_axes(box)
            _draw_effects(axes, endpoint, [study.contrasts[endpoint.name][arm] for arm in arms])
            axes.set_yticks(range(len(arms)), arms if i == 0 else [""] * len(arms))
            axes.set_ylim(len(arms) - 0.4, -0.6)
    return figure


def mean_line(values: Sequence[Series | NDArray[np.int64]]) -> Series:
    """Mean over runs, entry by entry, of what is known; NaN where nothing is."""
    stacked = np.stack(list(values))
    total, count = np.nansum(stacked, axis=0), (~np.isnan(stacked)).sum(axis=0)
    mean: Series = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean


def _multiples(
    arms: Arms, baseline: str, lines: Sequence[Line], x_label: str, y_label: str, *, smooth: bool = False
) -> Figure | None:
    if not arms:
        return None
    columns = min(COLUMNS, len(arms))
    with rc_context(STYLE):
        figure, cells = grid(len(arms), columns)
        for i, ((arm, runs), axes) in enumerate(zip(arms.items(), cells, strict=True)):
            if arm != baseline and baseline in arms:
                first = next(each for each in lines if _known(each, arms[baseline]))
                axes.plot(*_mean(first, arms[baseline], smooth), color=GREY, linewidth=1.3, label=baseline)
            for each in (line for line in lines if _known(line, runs)):
                for run in runs:
                    axes.plot(each.x(run), each.y(run), each.style, color=each.colour, **SEED)
                axes.plot(*_mean(each, runs, smooth), each.style, color=each.colour, label=each.label)
            finish(axes, arm, x_label, "" if i % columns else y_label)
            if i > 1 and (legend := axes.get_legend()):
                # The first panels, the baseline's and another's, explain all.
                legend.remove()
    return figure


def _known(line: Line, runs: Sequence[Curve]) -> bool:
    return any(np.isfinite(line.y(run)).any() for run in runs)


def _mean(line: Line, runs: Sequence[Curve], smooth: bool) -> tuple[Series, Series]:
    x, y = mean_line([line.x(run) for run in runs]), mean_line([line.y(run) for run in runs])
    return x, moving_average(y, max(5, len(y) // WINDOW_SHARE)) if smooth else y


def _draw_effects(axes: Axes, endpoint: Endpoint, contrasts: Sequence[Contrast]) -> None:
    for place, contrast in enumerate(contrasts):
        known = [value for value in contrast.differences if value is not None]
        if not known:
            axes.text(0, place, f" {CENSORED}", va="center", color=GREY, fontsize=8)
            continue
        mean = sum(known) / len(known)
        axes.barh(place, mean, height=0.62, color=GOLD if mean >= 0 else FROZEN, alpha=0.35)
        if contrast.interval is not None:
            ends = [contrast.interval.low, contrast.interval.high]
            axes.plot(ends, [place, place], color="#1d2126", linewidth=1.4)
        axes.plot(known, [place] * len(known), "o", color="#1d2126", markersize=2.8, alpha=0.6)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(False, axis="y")
    if not axes.patches:
        axes.set_xticks([])
    axes.set_title(textwrap.fill(endpoint.label, TITLE_LETTERS), fontsize=8.5)
