"""A comparison of run directories, written: Markdown, JSON, pictures and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r2m_ray.report.compare.comparison import Comparison, comparison, read_comparison
from r2m_ray.report.compare.curves import read_curve
from r2m_ray.report.compare.outcome import best_study, effects_figure, gallery, kl_star, write_pictures
from r2m_ray.report.compare.page import Section, page
from r2m_ray.report.compare.tables import preface, tables, write_tables
from r2m_ray.report.compare.training import read_training
from r2m_ray.run.environment import environment
from r2m_ray.run.files import replace_file

PAGE_FILE = "comparison.html"


def write_comparison(runs: Mapping[str, Sequence[Path]], baseline: str, directory: Path) -> Path:
    """Compare the runs of each arm with the baseline's, write everything, and return the page's path.

    Raises InputError for runs that are half-finished, damaged or of different worlds, for an unknown baseline
    and where it is alone; RunError if the directory cannot be written.
    """
    paired = read(runs, baseline)
    found = best_study(paired, kl_star(paired.curves(baseline)))
    trainings = {arm: [read_training(path, arm) for path in paths] for arm, paths in runs.items()}
    figures = gallery(paired.arms, trainings, baseline)
    if (bars := effects_figure(found)) is not None:
        figures = {"effects": bars, **figures}
    write_tables(found, directory)
    write_pictures(figures, directory)
    section = Section(
        heading="What this rests on",
        notes=tuple(preface(found)),
        tables=tuple(tables(found)),
        figures=tuple(figures.values()),
    )
    text = page(" · ".join(paired.arms), kind="r2m_ray comparison", facts=_facts(paired), sections=[section])
    replace_file(directory / PAGE_FILE, text)
    return directory / PAGE_FILE


def read(runs: Mapping[str, Sequence[Path]], baseline: str) -> Comparison:
    """The runs as a comparison, with gold required of all as soon as one has it."""
    curves = [read_curve(path, arm, gold=False) for arm, paths in runs.items() for path in paths]
    paired = comparison(curves, baseline)
    if any(np.isfinite(curve.gold).any() for curve in curves):
        return read_comparison(runs, baseline)
    return paired


def _facts(paired: Comparison) -> dict[str, str]:
    here = environment()
    return {
        "Seeds": ", ".join(map(str, paired.seeds)),
        **{
            f"Runs of {arm}": ", ".join(str(curve.source) for curve in curves)
            for arm, curves in paired.arms.items()
        },
        "Commit": here["commit"] or "not in a git checkout",
        "Command": " ".join(here["command"]),
    }
