"""The report of a run: plots and one self-contained page, made from the files of its directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r2m_ray.report.data import Row, RunRecord, column, known, read_run
from r2m_ray.report.html import Figure, Headline, run_page, write_pictures
from r2m_ray.run.files import replace_file
from r2m_ray.run.vocabulary import metric

REPORT_DIRECTORY = "report"
PAGE_FILE = "report.html"

ALARM_PREFIX = "alarm/"
PROXY, GOLD, STEP_TIME = metric("reward/frozen_mean"), metric("gold/mean"), metric("time/step")
HEADLINES = (
    ("Frozen reward", PROXY, PROXY),
    ("R2M reward", metric("reward/mean"), metric("reward/mean")),
    ("Gold", GOLD, GOLD),
    ("KL per response", metric("kl/sequence"), metric("policy/kl_sequence")),
    ("Response length", metric("response/length_mean"), metric("response/length_mean")),
    ("RM accuracy", metric("pairs/accuracy"), None),
)
"""Label, metric of evaluations, metric of training steps."""


@dataclass(frozen=True, slots=True)
class Span:
    """What "first" and "last" mean in a report: two evaluations, or the means of a few training steps."""

    rows: Sequence[Row]
    held_out: bool
    width: int

    @property
    def text(self) -> str:
        first, last = self.rows[0]["step"], self.rows[-1]["step"]
        if self.held_out:
            return f"the evaluations after steps {first} and {last}"
        if self.width == 1:
            return f"steps {first} and {last}"
        return f"the first and the last {self.width} of {len(self.rows)} steps"

    def ends(self, key: str) -> tuple[float, float] | None:
        """First and last value of a metric, None if it has no finite value at both ends."""
        values = column(self.rows, key)
        first, last = values[: self.width], values[-self.width :]
        if not (np.isfinite(first).any() and np.isfinite(last).any()):
            return None
        return float(np.nanmean(first)), float(np.nanmean(last))


def write_report(run_directory: Path) -> Path:
    """Write ``report/*.png`` and ``report/report.html`` below a run directory; return the page's path.

    Reads nothing but the run's files, finished or not. Raises InputError naming a file that is missing or
    damaged, RunError if the report cannot be written.
    """
    # matplotlib takes a second to import, and whoever imports this module may never draw.
    from r2m_ray.report.figures import OVERVIEW, PLOTS
    from r2m_ray.report.plots import draw_plot, png

    run = read_run(run_directory)
    directory = run_directory / REPORT_DIRECTORY
    figures = {
        plot.name: Figure(plot.heading, plot.caption, png(drawn))
        for plot in (*PLOTS, OVERVIEW)
        if (drawn := draw_plot(plot, run)) is not None
    }
    write_pictures(figures, directory)
    figures.pop(OVERVIEW.name, None)
    span = span_of(run)
    text = run_page(
        run,
        reading=f"{reading(run, span)} {alarms(run)}".strip(),
        headlines=headlines(run, span),
        figures=[*figures.values()],
    )
    replace_file(directory / PAGE_FILE, text)
    return directory / PAGE_FILE


def span_of(run: RunRecord) -> Span:
    """Evaluations where there are two, because their prompts stay the same; else a tenth of the steps."""
    if len(run.evaluations) > 1:
        return Span(run.evaluations, held_out=True, width=1)
    return Span(run.steps, held_out=False, width=max(1, len(run.steps) // 10))


def headlines(run: RunRecord, span: Span) -> list[Headline]:
    """The numbers on top of the page: first and last value of each that the run has."""
    found = []
    for label, evaluated, trained in HEADLINES:
        key = evaluated if span.held_out else trained
        if key is not None and (ends := span.ends(key)) is not None:
            found.append(Headline(label, *ends))
    if known(run.steps, STEP_TIME):
        found.append(Headline("Seconds per step", None, float(np.nanmedian(column(run.steps, STEP_TIME)))))
    return found


def reading(run: RunRecord, span: Span) -> str:
    """What happened to the proxy and to gold, in one or two sentences that claim nothing more."""
    frozen, gold = span.ends(PROXY), span.ends(GOLD)
    if frozen is None:
        return "This run logged no score of the frozen reward model."
    start = f"Between {span.text}, the frozen reward model's score {_moved(*frozen)}"
    if gold is None:
        return f"{start}; this task has no gold score, so the run does not show whether responses got better."
    same = (frozen[1] - frozen[0]) * (gold[1] - gold[0]) >= 0
    text = f"{start} {'and' if same else 'while'} gold {_moved(*gold)}."
    if not span.held_out:
        return text
    values = column(span.rows, GOLD)
    best = int(np.nanargmax(values))
    if best == len(values) - 1:
        return f"{text} Gold's last evaluation is its best."
    fall = values[best] - gold[1]
    return f"{text} Gold was best after step {span.rows[best]['step']}, {fall:.2f} above the last evaluation."


def alarms(run: RunRecord) -> str:
    """Each alarm that was ever on, with the step it began at; nothing where none was."""
    found = []
    for key in sorted({key for row in run.steps for key in row if key.startswith(ALARM_PREFIX)}):
        raised = [int(row["step"]) for row in run.steps if row.get(key)]
        if raised:
            name = key.removeprefix(ALARM_PREFIX)
            found.append(f"{name} from step {raised[0]}, in {len(raised)} of {len(run.steps)} steps")
    return f"Alarms were on: {'; '.join(found)}." if found else ""


def _moved(first: float, last: float) -> str:
    change = last - first
    if abs(change) < 0.005:
        return f"stayed at {last:.2f}"
    return f"{'rose' if change > 0 else 'fell'} by {abs(change):.2f}"
