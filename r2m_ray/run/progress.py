"""What a person watching a run sees: a live panel on a terminal, one line per step everywhere else."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r2m_ray.errors import printable

OUTSIDE_STEP = frozenset({"start", "warm_up", "evaluate", "checkpoint"})
"""Phases between steps: no part of ``time/step``."""

HEADLINES = {
    "own": "reward/mean",
    "frozen": "reward/frozen_mean",
    "gold": "gold/mean",
    "ω": "omega",
    "KL/token": "policy/kl_token",
    "KL/row": "policy/kl_sequence",
    "length": "response/length_mean",
}
EVALUATION_HEADLINES = {
    "own": "reward",
    "frozen": "frozen_reward",
    "gold": "gold",
    "KL/token": "kl_token",
    "KL/row": "kl_sequence",
    "length": "length",
    "RM accuracy": "rm_accuracy",
    "frozen RM accuracy": "rm_accuracy_frozen",
}
CURVES = ("own", "frozen", "gold")
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 60
_ETA_STEPS = 20


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
            times["time/step"] = self._end - self._begin
        self._seconds, self._begin = {}, None
        return times


class Progress(Protocol):
    """Shows a run to whoever watches it. Text may hold anything; it is escaped here."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def progress(console: Console, *, name: str, steps: int, clock: PhaseClock) -> Progress:
    """The live panel where the console is a terminal, plain lines otherwise."""
    if console.is_terminal:
        return LiveProgress(console, name=name, steps=steps, clock=clock)
    return PlainProgress(console, steps=steps)


class PlainProgress:
    """One line per step, for logs and pipes."""

    def __init__(self, console: Console, *, steps: int) -> None:
        self._console = console
        self._pace = Pace(steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.advance(step)
        values = [f"{label} {number(value)}" for label, value in headlines(metrics, HEADLINES).items()]
        phases = [f"{name} {seconds:.2f}s" for name, seconds in _phase_seconds(metrics).items()]
        self._print(f"step {step}/{self._pace.steps}  {'  '.join(values + phases)}  left {self._pace.left}")

    def message(self, text: str) -> None:
        self._print(printable(text))

    def close(self) -> None:
        """Nothing to put back: lines are already written."""

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class LiveProgress:
    """A panel that redraws itself in place; whatever else is printed scrolls by above it."""

    def __init__(self, console: Console, *, name: str, steps: int, clock: PhaseClock) -> None:
        self._name, self._clock, self._console = printable(name), clock, console
        self._pace = Pace(steps)
        self._metrics: dict[str, float] = {}
        self._curves: dict[str, deque[float]] = {label: deque(maxlen=_CURVE_POINTS) for label in CURVES}
        self._live = Live(get_renderable=self.panel, console=console, refresh_per_second=4)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.advance(step)
        self._metrics = dict(metrics)
        shown = headlines(metrics, HEADLINES)
        for label in CURVES:
            if label in shown:
                self._curves[label].append(shown[label])

    def message(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def close(self) -> None:
        self._live.stop()

    def panel(self) -> RenderableType:
        """The whole view as it is now."""
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            Text(f"step {self._pace.done}/{self._pace.steps}", style="bold"),
            ProgressBar(total=self._pace.steps, completed=self._pace.done),
            Text(f"left {self._pace.left}"),
        )
        body = Group(head, Text(""), self._numbers(), *self._curve_lines(), Text(""), self._times())
        return Panel(
            body,
            title=Text(self._name),
            title_align="left",
            border_style="blue",
            width=min(self._console.width, 110),
        )

    def _numbers(self) -> Table:
        table = Table.grid(padding=(0, 3))
        shown = {label: number(value) for label, value in headlines(self._metrics, HEADLINES).items()}
        table.add_row(*[Text(label, style="dim") for label in shown])
        table.add_row(*[Text(value, style="bold") for value in shown.values()])
        return table

    def _curve_lines(self) -> list[Text]:
        return [
            Text.assemble((f"{label:>7} ", "dim"), sparkline(values))
            for label, values in self._curves.items()
            if len(values) > 1
        ]

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


class Pace:
    """How far a run is and how long the rest takes, by the wall clock of its latest steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self._ends: deque[tuple[int, float]] = deque(maxlen=_ETA_STEPS)

    def advance(self, step: int) -> None:
        self.done = step
        self._ends.append((step, time.monotonic()))

    @property
    def left(self) -> str:
        """Hours, minutes and seconds; a question mark until two steps are done."""
        (first, begin), (last, end) = (self._ends[0], self._ends[-1]) if self._ends else ((0, 0.0), (0, 0.0))
        if last <= first:
            return "?"
        seconds = round((end - begin) / (last - first) * (self.steps - last))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def headlines(metrics: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """The few numbers worth watching by their label, those that the row has."""
    shown = {label: metrics[key] for label, key in names.items() if key in metrics}
    if metrics.get("time/step") and "response/tokens" in metrics:
        shown["tokens/s"] = metrics["response/tokens"] / metrics["time/step"]
    return shown


def number(value: float) -> str:
    """Three significant digits, in full from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def sparkline(values: deque[float]) -> str:
    """The values as one row of block characters between their least and greatest."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase and of the step: the keys directly below ``time/``."""
    times = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    return {printable(name): seconds for name, seconds in times.items() if "/" not in name}
