"""The paper's tables in miniature: its figures in columns of their own, beside ours, never in one scale.

Its policies and reward models have billions of parameters and are judged by another model; ours have a third
of a million and are judged by an exact parser. What can be compared is the order of the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks.overoptimization.arms import ARMS, BASELINE
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import Peak, gold_at
from r2m_ray.report.compare.tables import mean
from r2m_ray.report.html import Table
from r2m_ray.run.vocabulary import metric

NONE = "–"
ALPACA_EVAL = {
    "RLOO": ("28.4", "30.2"),
    "RLOO+R2M": ("34.5", "38.2"),
    "R2M w/o Train": ("24.4", NONE),
    "R2M w/ Noise": ("25.4", NONE),
    "R2M w/o BT": ("31.5", NONE),
    "R2M w/o GRE": ("32.3", NONE),
}
"""Of the paper's LLaMA3-8B: length-controlled win rate and win rate, percent."""
ACCURACY = {"frozen": "72.3", "before": "69.2", "after": "78.6"}
"""Of its reward model on held-out pairs, percent: vanilla, R2M before training, and after."""
HOURS = {"rloo": "4.4 h, 57 GB per GPU", "rloo_r2m": "4.5 h, 58 GB per GPU"}
"""Of a complete run."""
UPDATE = "7 s, 10 GB (13 s, 65 GB for the full model)"
"""One update of its reward model: cross-attention and head."""

Read = Callable[[Curve], float | None]
Curves = Mapping[str, Sequence[Curve]]


def paper_tables(curves: Curves, top: Peak | None) -> tuple[Table, ...]:
    """Arms and ablations, reward-model accuracy, and cost; rows without a finished run say so.

    top: the baseline's KL*, None where it has none.
    """
    return _arms(curves, top), _accuracy(curves.get("rloo_r2m", ())), _cost(curves)


def _arms(curves: Curves, top: Peak | None) -> Table:
    rows = []
    baseline = curves.get(BASELINE, ())
    for arm in ARMS.values():
        if arm.paper is None:
            continue
        ours = curves.get(arm.name, ())
        cells = [
            NONE if top is None else _against(ours, baseline, partial(gold_at, kl=top.kl)),
            NONE if top is None else _against(ours, baseline, partial(gold_at, kl=2 * top.kl)),
            _against(ours, baseline, lambda curve: float(curve.gold[-1])),
        ]
        rows.append((arm.paper, *ALPACA_EVAL.get(arm.paper, (NONE, NONE)), *cells, str(len(ours))))
    return Table(
        heading="The paper's arms and ablations",
        note="The paper: AlpacaEval with LLaMA3-8B, percent. Here: mean gold over the seeds, 3.4 at most, "
        "and in brackets the difference from RLOO under the same seeds: rows of other seeds have other "
        "means. The two are different measures of different models; only the order of rows can "
        "be compared.",
        head=(
            "arm", "paper: LC win rate", "paper: win rate", "here: gold at KL*", "here: gold at 2 KL*",
            "here: final gold", "here: seeds",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _accuracy(curves: Sequence[Curve]) -> Table:
    def percent(key: str, place: int) -> str:
        values = [float(curve.evaluations.series(metric(key))[place]) for curve in curves]
        known = [value for value in values if np.isfinite(value)]
        return f"{100 * statistics.mean(known):.1f}" if known else NONE

    return Table(
        heading="Accuracy of the reward model on held-out pairs, percent",
        note="Before is a head with a random cross-attention, read at the last step's ω; after is the end of "
        "training. The frozen model is the same throughout.",
        head=("reward model", "paper", "here, RLOO+R2M"),
        rows=(
            ("frozen (vanilla)", ACCURACY["frozen"], percent("pairs/frozen_accuracy", -1)),
            ("R2M before training", ACCURACY["before"], percent("pairs/accuracy", 0)),
            ("R2M after training", ACCURACY["after"], percent("pairs/accuracy", -1)),
        ),
    )


def _cost(curves: Curves) -> Table:
    shared = set.intersection(*({curve.seed for curve in curves.get(arm, ())} for arm in HOURS))

    def seconds(arm: str, key: str) -> float | None:
        runs = [curve.training for curve in curves.get(arm, ()) if curve.seed in shared]
        medians = [float(np.nanmedian(rows.series(metric(key)))) for rows in runs]
        return statistics.mean(medians) if medians else None

    step = {arm: seconds(arm, "time/step") for arm in HOURS}
    baseline, r2m = step["rloo"], step["rloo_r2m"]
    ratio = f"{r2m / baseline:.2f}" if baseline and r2m else NONE
    return Table(
        heading="Cost",
        note="Here: median seconds of a training step, and of its phase of reward update and weight sync, "
        "while other runs shared the machine; benchmarks/step_time.py and benchmarks/memory.py measure "
        "with care.",
        head=("", "paper: complete run", "here: seconds of a step"),
        rows=(
            ("RLOO", HOURS["rloo"], _seconds(baseline)),
            ("RLOO+R2M", HOURS["rloo_r2m"], _seconds(r2m)),
            ("ratio of the times", "1.02", ratio),
            ("update of the reward model", UPDATE, _seconds(seconds("rloo_r2m", "time/reward"))),
        ),
    )


def _against(ours: Sequence[Curve], baseline: Sequence[Curve], read: Read) -> str:
    """Their mean, and in brackets its difference from the baseline under the seeds of both."""
    if not ours:
        return NONE
    theirs = {curve.seed: read(curve) for curve in baseline}
    pairs = [(read(curve), theirs.get(curve.seed)) for curve in ours if curve.arm != BASELINE]
    differences = [own - other for own, other in pairs if own is not None and other is not None]
    against = f" [{statistics.mean(differences):+.3f}]" if differences else ""
    return f"{mean(tuple(map(read, ours)))}{against}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
