"""A comparison of run directories, written: Markdown, JSON, pictures and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r2m_ray.report.compare.curves import Curve, read_comparison
from r2m_ray.report.compare.matched import mean_peak
from r2m_ray.report.compare.pictures import effects, frontiers, over_training, rewards
from r2m_ray.report.compare.study import Study, study
from r2m_ray.report.compare.tables import preface, tables, write_tables
from r2m_ray.report.html import Figure, Section, comparison_page, write_pictures
from r2m_ray.report.plots import png
from r2m_ray.run.environment import environment
from r2m_ray.run.files import replace_file
from r2m_ray.run.vocabulary import metric

PAGE_FILE = "comparison.html"


def write_comparison(runs: Mapping[str, Sequence[Path]], baseline: str, directory: Path) -> Path:
    """Compare the runs of each arm with the baseline's, write everything, and return the page's path.

    Raises InputError for runs that are half-finished, damaged or of different worlds, for an unknown baseline
    and where it is alone; RunError if the directory cannot be written.
    """
    paired = read_comparison(runs, baseline)
    found = study(paired, mean_peak(paired.curves(baseline)))
    figures = gallery(paired.arms, baseline)
    if (bars := effects_figure(found)) is not None:
        figures = {"effects": bars, **figures}
    write_tables(found, directory)
    write_pictures(figures, directory)
    section = Section(
        heading="What the numbers depend on",
        notes=tuple(preface(found)),
        tables=tuple(tables(found)),
        figures=tuple(figures.values()),
    )
    here = environment()
    sources = {
        f"Runs of {arm}": ", ".join(str(c.source) for c in curves) for arm, curves in paired.arms.items()
    }
    facts = {
        "Seeds": ", ".join(map(str, paired.seeds)),
        **sources,
        "Commit": here["commit"] or "not in a git checkout",
        "Command": " ".join(here["command"]),
    }
    title = " · ".join(paired.arms)
    text = comparison_page(title, kind="r2m_ray comparison", facts=facts, sections=[section])
    replace_file(directory / PAGE_FILE, text)
    return directory / PAGE_FILE


def gallery(arms: Mapping[str, Sequence[Curve]], baseline: str) -> dict[str, Figure]:
    """The pictures of all arms, by file name without suffix; those that would be empty are left out."""
    gold = any(np.isfinite(curve.gold).any() for curves in arms.values() for curve in curves)
    drawn = [
        (
            "frontier",
            "Gold and proxy against the distance from the reference" if gold else "Proxy against distance",
            "Change since the start against √KL: the frozen reward model's score dashed"
            + (", gold solid. " if gold else ". ")
            + f"Faint lines are seeds, strong ones their mean, grey is {baseline}.",
            frontiers(arms, baseline),
        ),
        (
            "rewards",
            "Scores over the training steps",
            "Held-out prompts, the same ones at every point. An arm's own reward may rise because its scale "
            "does: arms are never compared by it.",
            rewards(arms, baseline),
        ),
        (
            "pair_precision",
            "Self-labelled pairs that gold confirms",
            "Share of the winner–loser pairs of a training step that gold orders alike; 0.5 is chance. Faint "
            "lines are seeds, the strong one is the moving average of their mean.",
            over_training(arms, baseline, metric("gold/pair_precision"), "precision"),
        ),
        (
            "scale_ratio",
            "Scale of the arm's reward against the frozen one's",
            "Within-group standard deviation of the arm's own reward over the frozen reward model's. A "
            "reward model that labels its own pairs can inflate it, which weakens the KL penalty.",
            over_training(arms, baseline, metric("reward/scale_ratio"), "ratio"),
        ),
    ]
    return {
        name: Figure(heading, caption, png(figure))
        for name, heading, caption, figure in drawn
        if figure is not None
    }


def effects_figure(found: Study) -> Figure | None:
    """The picture of the primary endpoints; None where a study has none."""
    figure = effects(found)
    if figure is None:
        return None
    caption = (
        f"Difference to {found.baseline} under the same seed: bars are means, dots are seeds, lines are "
        "nominal 95 % intervals over the seeds, absent with one."
    )
    return Figure("Primary endpoints", caption, png(figure))
