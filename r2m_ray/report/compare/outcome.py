"""From the curves of a comparison to what a reader gets: the study they allow, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r2m_ray.errors import RunError
from r2m_ray.report.compare.comparison import Comparison
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import Peak, highest_of_mean
from r2m_ray.report.compare.pictures import effects, frontiers, over_training, png, rewards
from r2m_ray.report.compare.proxy import proxy_study
from r2m_ray.report.compare.study import UNMATCHED, Study, contrasted, study
from r2m_ray.report.compare.training import Training
from r2m_ray.report.html import Figure

TRAINING_PICTURES = {
    "pair_precision": (
        "gold/pair_precision",
        "precision",
        "Self-labelled pairs that gold confirms",
        "Share of the winner–loser pairs of a training step that gold orders alike; 0.5 is chance. Faint "
        "lines are seeds, the strong one is the moving average of their mean.",
    ),
    "scale_ratio": (
        "reward/scale_ratio",
        "ratio",
        "Scale of the arm's reward against the frozen one's",
        "Within-group standard deviation of the arm's own reward over the frozen reward model's. A reward "
        "model that labels its own pairs can inflate it, which weakens the KL penalty.",
    ),
}
"""Of each picture: the metric of the training steps, what its axis is called, heading and caption."""


def kl_star(curves: Sequence[Curve]) -> Peak | None:
    """Where the mean curve of a baseline's seeds peaks in gold; None where it has no such place."""
    if not curves or not all(curve.knows_gold for curve in curves):
        return None
    top = highest_of_mean(curves)
    return top if top.kl > 0 else None


def best_study(comparison: Comparison, top: Peak | None) -> Study:
    """The study that the curves allow: at matched KL, unmatched where there is no KL*, or without gold.

    top: of ``kl_star``, of all the baseline's seeds, though fewer be compared here: a peak that only some of
    them have is none. Raises InputError where there is no other arm than the baseline.
    """
    if not all(curve.knows_gold for curve in comparison.curves(comparison.baseline)):
        return proxy_study(comparison)
    return contrasted(comparison, UNMATCHED) if top is None else study(comparison, top=top)


def gallery(
    arms: Mapping[str, Sequence[Curve]], trainings: Mapping[str, Sequence[Training]], baseline: str
) -> dict[str, Figure]:
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
    ]
    drawn += [
        (name, heading, caption, over_training(trainings, baseline, key, label))
        for name, (key, label, heading, caption) in TRAINING_PICTURES.items()
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
        f"nominal 95 % intervals over {len(found.seeds)} seeds, absent with one."
    )
    return Figure("Primary endpoints", caption, png(figure))


def write_pictures(figures: Mapping[str, Figure], directory: Path) -> None:
    """Write every figure as ``<name>.png``; RunError names the file that cannot be written."""
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        try:
            path.write_bytes(figure.png)
        except OSError as error:
            raise RunError(f"{path}: cannot write it: {error.strerror}.") from error
