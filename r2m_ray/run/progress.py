"""What a person who watches a run sees: a live panel on a terminal, one line per step everywhere else."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from r2m_ray.errors import printable
from r2m_ray.run.vocabulary import metric

OUTSIDE_STEP = frozenset({"start", "warm_up", "evaluate", "checkpoint"})
"""Phases between steps: no part of ``time/step``."""

HEADLINES = {
    metric("reward/mean"): "own",
    metric("reward/frozen_mean"): "frozen",
    metric("gold/mean"): "gold",
    metric("omega"): "ω",
    metric("policy/kl_token"): "KL/token",
    metric("kl/token"): "KL/token",
    metric("policy/kl_sequence"): "KL/row",
    metric("kl/sequence"): "KL/row",
    metric("response/length_mean"): "length",
    metric("pairs/accuracy"): "RM accuracy",
    metric("pairs/frozen_accuracy"): "frozen RM accuracy",
}
"""The few metrics worth watching, and their labels."""
CURVES = ("own", "frozen", "gold")
TOKENS, STEP_SECONDS = metric("response/tokens"), metric("time/step")
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 60
_DAY_SECONDS = 86_400.0


class PhaseClock:
    """Seconds spent in each phase since they were last collected; phases may overlap."""

    def __init__(self) -> None:
        self.running: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._begin: float | None = None
        self._end = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self.running[name] = start
        if name not in OUTSIDE_STEP and self._begin is None:
            self._begin = start
        try:
            yield
        finally:
            end = time.monotonic()
            del self.running[name]
            self._seconds[name] = self._seconds.get(name, 0.0) + end - start
            if name not in OUTSIDE_STEP:
                self._end = end

    def collect(self) -> dict[str, float]:
        """``time/<phase>`` of every finished phase, and ``time/step``, first start to last end."""
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        if self._begin is not None:
            times[STEP_SECONDS] = self._end - self._begin
        self._seconds, self._begin = {}, None
        return times

    def reset(self) -> None:
        """Forget the phases of an unfinished step: the run returned to a checkpoint."""
        self._seconds = {name: seconds for name, seconds in self._seconds.items() if name in OUTSIDE_STEP}
        self._begin = None


class RunProgress:
    """Shows a run to whoever watches it. Text may hold anything; it is escaped here."""

    def __init__(self, console: Console, *, name: str, steps: int, clock: PhaseClock) -> None:
        self._console, self._name, self._steps, self._clock = console, printable(name), steps, clock
        self._metrics: Mapping[str, float] = {}
        self._curves: dict[str, deque[float]] = {label: deque(maxlen=_CURVE_POINTS) for label in CURVES}
        # The time left comes from up to a day of steps, because a step can take hours.
        self._progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("left {task.fields[left]}"),
            console=console,
            expand=True,
            speed_estimate_period=_DAY_SECONDS,
        )
        self._task = self._progress.add_task("", total=steps, left="?")
        self._live = Live(get_renderable=self.panel, console=console, refresh_per_second=4)
        if console.is_terminal:
            self._live.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._progress.update(self._task, completed=step)
        seconds = self._progress.tasks[0].time_remaining
        left = "?" if seconds is None else str(timedelta(seconds=round(seconds)))
        self._progress.update(self._task, left=left)
        shown = headlines(metrics)
        for label in shown.keys() & self._curves.keys():
            self._curves[label].append(shown[label])
        if not self._console.is_terminal:
            phases = (f"{name} {seconds:.2f}s" for name, seconds in _phase_seconds(metrics).items())
            self.message("  ".join([f"step {step}/{self._steps}", *_texts(shown), *phases, f"left {left}"]))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.message("  ".join([f"evaluation after step {step}", *_texts(headlines(metrics))]))

    def rewind(self, step: int) -> None:
        """Go back to ``step``; the time left is unknown until two more steps have finished."""
        self._progress.reset(self._task, completed=step, left="?")

    def message(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def panel(self) -> RenderableType:
        """The complete view as it is now. Whatever else is printed scrolls by above it."""
        numbers = Table.grid(padding=(0, 3))
        shown = headlines(self._metrics)
        numbers.add_row(*[Text(label, style="dim") for label in shown])
        numbers.add_row(*[Text(number(value), style="bold") for value in shown.values()])
        curves = [
            Text.assemble((f"{label:>7} ", "dim"), sparkline(values))
            for label, values in self._curves.items()
            if len(values) > 1
        ]
        return Panel(
            Group(self._progress, Text(""), numbers, *curves, Text(""), self._times()),
            title=Text(self._name),
            title_align="left",
            border_style="blue",
            width=min(self._console.width, 110),
        )

    def _times(self) -> Text:
        now = time.monotonic()
        running = [
            (f"▶ {printable(name)} {now - start:.1f}s  ", "bold green")
            for name, start in tuple(self._clock.running.items())
        ]
        finished = [
            (f"{name} {seconds:.2f}s  ", "dim") for name, seconds in _phase_seconds(self._metrics).items()
        ]
        return Text.assemble(*running, *finished)


def headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """The headlines that a row has, by their labels, and the tokens per second of a step."""
    shown = {label: metrics[name] for name, label in HEADLINES.items() if name in metrics}
    if metrics.get(STEP_SECONDS) and TOKENS in metrics:
        shown["tokens/s"] = metrics[TOKENS] / metrics[STEP_SECONDS]
    return shown


def number(value: float) -> str:
    """Three significant digits, in full from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def sparkline(values: Iterable[float]) -> str:
    """The values as one row of block characters between their least and greatest."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _texts(shown: Mapping[str, float]) -> list[str]:
    return [f"{label} {number(value)}" for label, value in shown.items()]


def _phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase and of the step: the keys directly below ``time/``."""
    times = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    return {printable(name): seconds for name, seconds in times.items() if "/" not in name}
