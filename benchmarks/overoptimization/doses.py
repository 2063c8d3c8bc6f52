"""Dose–response: gold at the same KL over a knob of the world, where there are runs under two doses or more.

KL* is the informative world's own: a KL of each world's own would hide what the dose does to the baseline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import rc_context

from benchmarks.overoptimization.arms import BASELINE
from benchmarks.overoptimization.presets import INFORMATIVE, SELF_CORRECT
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import Peak, gold_at, mean_peak
from r2m_ray.report.compare.study import MULTIPLES, Values, of_kl_star
from r2m_ray.report.compare.tables import mean, number
from r2m_ray.report.html import Figure, Section, Table, write_pictures
from r2m_ray.report.plots import GOLD, OWN, STYLE, finish, grid, png
from r2m_ray.run.files import replace_file

COLOURS = (OWN, GOLD)

Curves = Mapping[str, Mapping[str, Sequence[Curve]]]
"""Of each world, by name, its arms' curves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A setting whose dose differs. lines: of each line, the world and the arm that have each dose of it."""

    setting: str
    meaning: str
    lines: Mapping[str, Mapping[float, tuple[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a knob does. gold: of each line, by dose, the seeds' gold at each multiple of KL*."""

    knob: Knob
    kl_star: float
    seeds: tuple[int, ...]
    gold: Mapping[str, Mapping[float, tuple[Values, ...]]]


_CORRECTED = {**{dose: world.name for dose, world in SELF_CORRECT.items()}, 0.6: INFORMATIVE.name}
KNOBS = (
    Knob(
        setting="task.annotator_bias",
        meaning="Share of the reward model's pairs that are labelled by style alone.",
        lines={
            BASELINE: {
                0.0: (INFORMATIVE.name, "rloo_bias_0"),
                0.2: (INFORMATIVE.name, BASELINE),
                0.5: (INFORMATIVE.name, "rloo_bias_0.5"),
            }
        },
    ),
    Knob(
        setting="task.self_correct_prob",
        meaning="How often demonstrations correct a wrong fact, so how well the policy's states know one.",
        lines={
            arm: {dose: (world, arm) for dose, world in _CORRECTED.items()} for arm in (BASELINE, "static_h")
        },
    ),
)


def dose_sections(curves: Curves, out: Path) -> list[Section]:
    """Write what each knob does below ``out``, and return it for the page; nothing without doses."""
    found = responses(curves, mean_peak(curves.get(INFORMATIVE.name, {}).get(BASELINE, ())))
    if not found:
        return []
    drawn = {f"doses-{one.knob.setting.rpartition('.')[2]}": figure(one) for one in found}
    shown = tuple(map(table, found))
    write_pictures(drawn, out)
    replace_file(out / "doses.json", json.dumps([asdict(one) for one in found], indent=1) + "\n")
    texts = (f"# {one.heading}\n\n{one.note}\n\n{one.markdown()}\n" for one in shown)
    replace_file(out / "doses.md", "\n".join(texts))
    return [Section(heading="Dose–response", tables=shown, figures=tuple(drawn.values()))]


def responses(curves: Curves, top: Peak | None) -> list[Response]:
    """What each knob does, of those that have a line with two doses under shared seeds.

    top: the informative baseline's KL*; without one there is no KL to match at, and no response.
    """
    found = (_response(knob, curves, top.kl) for knob in KNOBS) if top else ()
    return [response for response in found if any(len(line) > 1 for line in response.gold.values())]


def table(response: Response) -> Table:
    """Each line's mean gold by dose, and every seed's."""

    def cell_of(values: Values) -> str:
        return f"{mean(values)} ({', '.join(map(number, values))})"

    return Table(
        heading=f"Doses of {response.knob.setting}",
        note=f"{response.knob.meaning} Mean gold at matched KL over seeds "
        f"{', '.join(map(str, response.seeds))}, and each seed's; KL* is {response.kl_star:.2f} nats.",
        head=("arm", "dose", *(f"gold at {of_kl_star(multiple)}" for multiple in MULTIPLES)),
        rows=tuple(
            (line, f"{dose:g}", *map(cell_of, gold))
            for line, doses in response.gold.items()
            for dose, gold in doses.items()
        ),
    )


def figure(response: Response) -> Figure:
    """A panel per multiple of KL*: gold over the dose, seeds as dots and their mean as a line."""
    with rc_context(STYLE):
        drawing, cells = grid(len(MULTIPLES), len(MULTIPLES))
        for place, (multiple, axes) in enumerate(zip(MULTIPLES, cells, strict=True)):
            for colour, (line, doses) in zip(COLOURS, response.gold.items(), strict=False):
                seen = {dose: [g for g in gold[place] if g is not None] for dose, gold in doses.items()}
                means = {dose: sum(known) / len(known) for dose, known in seen.items() if known}
                axes.plot([*means], [*means.values()], "-", color=colour, label=line)
                for dose, known in seen.items():
                    axes.plot([dose] * len(known), known, "o", color=colour, markersize=3, alpha=0.6)
            label = f"gold at {of_kl_star(multiple)}"
            finish(axes, label, response.knob.setting, "gold" if place == 0 else "")
    heading = f"Doses of {response.knob.setting}"
    return Figure(heading, f"{response.knob.meaning} Dots are seeds, lines their means.", png(drawing))


def _response(knob: Knob, curves: Curves, kl_star: float) -> Response:
    there = {
        line: {
            dose: {curve.seed: curve for curve in curves[world][arm]}
            for dose, (world, arm) in sorted(doses.items())
            if curves.get(world, {}).get(arm)
        }
        for line, doses in knob.lines.items()
    }
    every = [set(by_seed) for doses in there.values() for by_seed in doses.values()]
    seeds = tuple(sorted(set.intersection(*every))) if every else ()
    gold = {
        line: {
            dose: tuple(
                tuple(gold_at(by_seed[seed], multiple * kl_star) for seed in seeds) for multiple in MULTIPLES
            )
            for dose, by_seed in doses.items()
        }
        for line, doses in there.items()
        if doses and seeds
    }
    return Response(knob=knob, kl_star=kl_star, seeds=seeds, gold=gold)
