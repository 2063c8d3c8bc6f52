"""The figures of a report: small multiples in one style, drawn from the rows of ``metrics.jsonl``.

A panel is a list of curves, each one metric of the vocabulary; a panel without data is left out, and a figure
without panels is not drawn. Colours are Okabe and Ito's, which readers with colour blindness can distinguish.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from r2m_ray.report.data import Row, RunRecord, Series, column, known
from r2m_ray.run.vocabulary import REGISTRY, Source, metric

OWN, FROZEN, GOLD = "#0072B2", "#D55E00", "#009E73"
SKY, ROSE, AMBER, GREY = "#56B4E9", "#CC79A7", "#E69F00", "#8A9099"
PHASES = {"sample": OWN, "annotate": AMBER, "policy": GOLD, "reward": FROZEN}
KL, PROXY, GOLD_SCORE = metric("kl/sequence"), metric("reward/frozen_mean"), metric("gold/mean")
STEP_TIME = metric("time/step")
COLOURS = 256
"""Lines on white need no more, and a page of many panels is half to a third as large with a palette."""
_SMOOTHED_FROM = 40
WIDTH, HEIGHT = 11.8, 2.9  # Inches of a figure, and of each line of panels in it.
_LABEL_WIDTH = 0.72  # Inches.
STYLE = rc_params_from_file(Path(__file__).parent / "templates/figures.mplstyle", use_default_template=False)
"""The look of every figure, for matplotlib's ``rc_context``."""


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
    """Curves that share their axes. unit: label of the axis, by default the unit of the first metric.

    rows: which rows of ``metrics.jsonl`` the curves are of. Raises ValueError for a metric that those lack,
    KeyError for a name that is no metric.
    """

    title: str
    curves: tuple[Curve, ...]
    unit: str | None = None
    rows: Source = Source.step
    logarithmic: bool = False

    def __post_init__(self) -> None:
        for curve in self.curves:
            if metric(curve.key) in REGISTRY and REGISTRY[curve.key].source not in (self.rows, Source.both):
                raise ValueError(f"{self.title}: no {self.rows} row has {curve.key}")

    def present(self, run: RunRecord) -> bool:
        """Whether the run has a value of any of the curves."""
        return any(known(_rows(run, self.rows), curve.key) for curve in self.curves)

    def draw(self, axes: Axes, run: RunRecord) -> None:
        """Draw what the run has."""
        rows = _rows(run, self.rows)
        steps = column(rows, "step")
        for curve in self.curves:
            if known(rows, curve.key):
                marked = self.rows is Source.evaluation
                _draw_curve(axes, steps, column(rows, curve.key), curve, marked=marked)
        unit = REGISTRY[self.curves[0].key].unit if self.unit is None else self.unit
        finish(axes, self.title, "training step", "" if unit == "1" else unit)
        if len(rows) == 1:
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if self.logarithmic:
            _use_logarithm(axes)


@dataclass(frozen=True, slots=True)
class Special:
    """A panel that is more than curves over steps."""

    draw: Callable[[Axes, RunRecord], None]
    present: Callable[[RunRecord], bool]


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: its file name, its heading on the page, what it shows, and its panels."""

    name: str
    heading: str
    caption: str
    panels: tuple[Panel | Special, ...]


def draw_plot(plot: Plot, run: RunRecord) -> Figure | None:
    """Draw a figure; None if the run has nothing to show in it."""
    panels = [panel for panel in plot.panels if panel.present(run)]
    if not panels:
        return None
    with rc_context(STYLE):
        figure, cells = grid(len(panels), len(panels) if len(panels) <= 4 else 3)
        for panel, axes in zip(panels, cells, strict=True):
            panel.draw(axes, run)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a file's content, with a palette of colours; the same numbers give the same bytes."""
    drawn, compressed = io.BytesIO(), io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    # This method keeps the rarest colours, which are the thin lines'.
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        compressed, "PNG", optimize=True
    )
    return compressed.getvalue()


def grid(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, line by line; their margins are in inches, so that all panels align."""
    lines, width = -(-panels // columns), WIDTH / columns
    left, right, top, bottom = 0.66, 0.12, 0.60, 0.52
    figure = blank(HEIGHT * lines)
    cells = figure.add_gridspec(
        lines,
        columns,
        left=left / WIDTH,
        right=1 - right / WIDTH,
        bottom=bottom / (HEIGHT * lines),
        top=1 - top / (HEIGHT * lines),
        wspace=(left + right) / (width - left - right),
        hspace=(top + bottom) / (HEIGHT - top - bottom),
    )
    return figure, [figure.add_subplot(cells[divmod(i, columns)]) for i in range(panels)]


def blank(height: float) -> Figure:
    """A figure without panels, which can be saved without a display."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure


def moving_average(values: Series, window: int) -> Series:
    """Centred mean of the finite values within ``window`` entries, shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])


def draw_times(axes: Axes, run: RunRecord) -> None:
    """Stacked seconds of each phase of a step, labelled beside the stack."""
    steps, total = column(run.steps, "step"), np.nan_to_num(column(run.steps, STEP_TIME))
    seconds = {phase: np.nan_to_num(column(run.steps, f"time/{phase}")) for phase in PHASES}
    seconds["between"] = np.clip(total - sum(seconds.values()), 0, None)
    edges = np.stack([steps - 0.5, steps + 0.5], 1).ravel()
    highest = 1.25 * float(np.percentile(total, 95))
    base, label_height = np.zeros_like(total), -np.inf
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
    ticks = MaxNLocator(integer=True, nbins=6).tick_values(steps.min(), steps.max())
    axes.set_xticks([tick for tick in ticks if steps.min() <= tick <= steps.max()])


def draw_frontier(axes: Axes, run: RunRecord) -> None:
    """Gold and the frozen reward model's score as their change from the first evaluation, against √KL."""
    distance = np.sqrt(np.clip(column(run.evaluations, KL), 0, None))
    for key, label, colour, style in (
        (PROXY, "frozen RM (proxy)", FROZEN, "--"),
        (GOLD_SCORE, "gold", GOLD, "-"),
    ):
        if known(run.evaluations, key):
            values = column(run.evaluations, key)
            change = values - values[np.isfinite(values)][0]
            axes.plot(distance, change, style, color=colour, label=label, marker="o", markersize=3.5)
    axes.axhline(0, color=GREY, linewidth=0.8)
    finish(axes, "Reward against distance", "√KL to the reference, per response", "change since the start")


def _draw_curve(axes: Axes, steps: Series, values: Series, curve: Curve, *, marked: bool) -> None:
    if not (marked or curve.exact or len(values) < _SMOOTHED_FROM):
        axes.plot(steps, values, color=curve.colour, alpha=0.22, linewidth=0.9)
        values = moving_average(values, max(5, len(values) // 15))
    marker = "o" if marked or len(values) == 1 else None
    axes.plot(
        steps, values, curve.style, color=curve.colour, label=curve.label, marker=marker, markersize=3.5
    )


def _rows(run: RunRecord, source: Source) -> list[Row]:
    return run.evaluations if source is Source.evaluation else run.steps


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and legend of a panel, in the places that every panel has them."""
    axes.set_title(title, pad=24)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.02)
    if labels := axes.get_legend_handles_labels()[1]:
        anchor = (-0.01, 0.98)
        axes.legend(
            loc="lower left", bbox_to_anchor=anchor, ncols=len(labels), borderpad=0.2, columnspacing=1.2
        )


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
