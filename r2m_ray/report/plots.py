"""The figures of a report: small multiples in one style, drawn from the rows of ``metrics.jsonl``.

A panel is a list of curves, each one metric; a panel without data is left out, and a figure without
panels is not drawn. Colours are Okabe and Ito's, which readers with colour blindness tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from r2m_ray.report.data import Row, RunRecord, Series, column, known

OWN, FROZEN, GOLD = "#0072B2", "#D55E00", "#009E73"
SKY, ROSE, AMBER, GREY = "#56B4E9", "#CC79A7", "#E69F00", "#8A9099"
PHASES = {"sample": OWN, "annotate": AMBER, "policy": GOLD, "reward": FROZEN}
_SMOOTHED_FROM = 40
WIDTH, HEIGHT = 11.8, 2.9  # Inches of a figure, and of each line of panels in it.
_LABEL_WIDTH = 0.72  # Inches.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": "#9AA0A6",
    "axes.labelcolor": "#4A4F55",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#6A7077",
    "ytick.color": "#6A7077",
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "axes.formatter.useoffset": False,
    "figure.dpi": 150,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps; ``exact`` for a schedule, which has no noise to smooth."""

    key: str
    label: str
    colour: str
    style: str = "-"
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share their axes; ``rows`` says which rows of the log they come from."""

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    rows: str = "steps"
    logarithmic: bool = False

    def present(self, run: RunRecord) -> bool:
        return any(known(rows_of(run, self.rows), curve.key) for curve in self.curves)

    def draw(self, axes: Axes, run: RunRecord) -> None:
        rows = rows_of(run, self.rows)
        steps = column(rows, "step")
        for curve in self.curves:
            if known(rows, curve.key):
                _draw_curve(axes, steps, column(rows, curve.key), curve, marked=self.rows == "evaluations")
        finish(axes, self.title, "training step", self.unit)
        if len(rows) == 1:
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        axes.set_xticks(_step_ticks(np.array(axes.get_xlim())))
        if self.logarithmic:
            _use_logarithm(axes)


@dataclass(frozen=True, slots=True)
class Special:
    """A panel that is more than curves over steps."""

    draw: Callable[[Axes, RunRecord], None]
    present: Callable[[RunRecord], bool]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: its file name, its heading on the page, what it shows, and its panels."""

    name: str
    heading: str
    caption: str
    panels: tuple[Panel | Special, ...]

    @property
    def keys(self) -> Iterator[str]:
        """Every metric that the figure reads."""
        for panel in self.panels:
            yield from panel.keys if isinstance(panel, Special) else (curve.key for curve in panel.curves)


def save_plot(plot: Plot, run: RunRecord, directory: Path) -> Path | None:
    """Draw a figure into ``directory``; None if the run has nothing to show in it."""
    panels = [panel for panel in plot.panels if panel.present(run)]
    if not panels:
        return None
    columns = len(panels) if len(panels) <= 4 else 3
    lines = -(-len(panels) // columns)
    path = directory / f"{plot.name}.png"
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT * lines))
        FigureCanvasAgg(figure)
        for i, panel in enumerate(panels):
            line, place = divmod(i, columns)
            panel.draw(figure.add_axes(cell(place, line, columns, lines)), run)
        figure.savefig(path)
    return path


def cell(place: int, line: int, columns: int, lines: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of a panel's axes; margins are in inches, so that all panels align."""
    width, height = WIDTH / columns, HEIGHT
    left, right, top, bottom = 0.66, 0.12, 0.60, 0.52
    return (
        (place * width + left) / WIDTH,
        ((lines - 1 - line) * height + bottom) / (lines * height),
        (width - left - right) / WIDTH,
        (height - top - bottom) / (lines * height),
    )


def rows_of(run: RunRecord, name: str) -> list[Row]:
    return run.evaluations if name == "evaluations" else run.steps


def moving_average(values: Series, window: int) -> Series:
    """Centred mean of the finite values within ``window`` entries, shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])


def draw_times(axes: Axes, run: RunRecord) -> None:
    """Stacked seconds of each phase of a step, labelled beside the stack."""
    steps, whole = column(run.steps, "step"), np.nan_to_num(column(run.steps, "time/step"))
    seconds = {phase: np.nan_to_num(column(run.steps, f"time/{phase}")) for phase in PHASES}
    seconds["between"] = np.clip(whole - sum(seconds.values()), 0, None)
    edges = np.stack([steps - 0.5, steps + 0.5], 1).ravel()
    highest = 1.25 * float(np.percentile(whole, 95))
    base, label_height = np.zeros_like(whole), -np.inf
    for phase, values in seconds.items():
        if not values.any():
            continue
        colour = PHASES.get(phase, GREY)
        axes.fill_between(edges, np.repeat(base, 2), np.repeat(base + values, 2), color=colour, linewidth=0)
        label_height = max(float(np.median(base + values / 2)), label_height + 0.085 * highest)
        axes.annotate(phase, (1.0, label_height), xycoords=("axes fraction", "data"), color=colour,
                      ha="right", va="center", fontsize=8.5, fontweight="bold")  # fmt: skip
        base = base + values
    finish(axes, "Time per step", "training step", "seconds")
    axes.grid(False, axis="x")
    # A first step full of compilation would flatten all the others.
    axes.set_ylim(0, max(highest, label_height + 0.05 * highest))
    room = (edges[-1] - edges[0]) * _LABEL_WIDTH / (axes.get_position().width * WIDTH - _LABEL_WIDTH)
    axes.set_xlim(edges[0], edges[-1] + room)
    axes.set_xticks(_step_ticks(steps))


def draw_frontier(axes: Axes, run: RunRecord) -> None:
    """Gold and the frozen reward model's score as their change from the first evaluation, against √KL."""
    distance = np.sqrt(np.clip(column(run.evaluations, "kl_sequence"), 0, None))
    for key, label, colour, style in (
        ("frozen_reward", "frozen RM (proxy)", FROZEN, "--"),
        ("gold", "gold", GOLD, "-"),
    ):
        if known(run.evaluations, key):
            values = column(run.evaluations, key)
            change = values - values[np.isfinite(values)][0]
            axes.plot(distance, change, style, color=colour, label=label, marker="o", markersize=3.5)
    axes.axhline(0, color=GREY, linewidth=0.8)
    finish(axes, "Reward against distance", "√KL to the reference, per response", "change since the start")


def _draw_curve(axes: Axes, steps: Series, values: Series, curve: Curve, *, marked: bool) -> None:
    if marked:
        axes.plot(
            steps, values, curve.style, color=curve.colour, label=curve.label, marker="o", markersize=3.5
        )
    elif curve.exact or len(values) < _SMOOTHED_FROM:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, curve.style, color=curve.colour, label=curve.label, marker=marker)
    else:
        axes.plot(steps, values, color=curve.colour, alpha=0.22, linewidth=0.9)
        smooth = moving_average(values, max(5, len(values) // 15))
        axes.plot(steps, smooth, curve.style, color=curve.colour, label=curve.label)


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and legend of a panel, in the places that every panel has them."""
    axes.set_title(title, pad=24)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.02)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.98),
            ncols=len(handles),
            borderpad=0.2,
            columnspacing=1.2,
        )


def _step_ticks(steps: Series) -> list[float]:
    """Round step numbers within the range of ``steps``."""
    ticks = MaxNLocator(integer=True, nbins=6).tick_values(steps.min(), steps.max())
    return [tick for tick in ticks if steps.min() <= tick <= steps.max()]


def _use_logarithm(axes: Axes) -> None:
    """A logarithmic axis with plain numbers, where the values span enough for one."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
