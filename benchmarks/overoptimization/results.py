"""The results of a schedule's finished runs: tables, curves, gates, pictures, and one page.

Whatever part of a schedule is finished is compared, and what is missing is listed; nothing here starts a run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.overoptimization.arms import ARMS, BASELINE
from benchmarks.overoptimization.curves_record import ALARMS, curves_record, first_alarms
from benchmarks.overoptimization.doses import dose_sections
from benchmarks.overoptimization.paper import paper_tables
from benchmarks.overoptimization.presets import Preset, World
from benchmarks.overoptimization.runs import Run, State, read_ticket, standing
from r2m_ray.errors import InputError
from r2m_ray.report.compare.compare import effects_figure, gallery
from r2m_ray.report.compare.curves import Curve, comparison, read_curve, require_gold
from r2m_ray.report.compare.matched import Peak, mean_peak
from r2m_ray.report.compare.study import Study, study
from r2m_ray.report.compare.tables import markdown, preface, record, tables
from r2m_ray.report.html import Section, Table, comparison_page, write_pictures
from r2m_ray.run.environment import environment, versions
from r2m_ray.run.files import replace_file

GATES_FILE = "gates.json"
PAGE_FILE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The runs of one world's schedule that are on disk.

    curves: of each arm with a finished run, by seed in order. missing: name of each other run and why it is
    missing. tickets: of every run that was started, by name.
    """

    world: World
    curves: Mapping[str, Sequence[Curve]]
    missing: Sequence[tuple[str, str]]
    tickets: Mapping[str, Mapping[str, Any]]


def find(preset: Preset, world: World, root: Path) -> Found:
    """Read every run of a world's schedule that is finished."""
    curves: dict[str, list[Curve]] = {}
    missing, tickets = [], {}
    for arm, seed in preset.runs(world):
        run = Run(world=world, arm=arm, seed=seed, root=root)
        where = standing(run)
        if ticket := read_ticket(run):
            tickets[run.name] = ticket
        if where.state is not State.finished:
            missing.append((run.name, str(where)))
            continue
        try:
            curve = read_curve(run.directory, arm.name)
            require_gold(curve)
        except InputError as error:
            missing.append((run.name, f"finished, but cannot be compared: {error}"))
            continue
        curves.setdefault(arm.name, []).append(curve)
    ordered = {
        arm.name: sorted(curves[arm.name], key=lambda curve: curve.seed)
        for arm in preset.arms(world)
        if arm.name in curves
    }
    return Found(world=world, curves=ordered, missing=missing, tickets=tickets)


def studies(found: Found) -> tuple[Peak | None, list[Study]]:
    """KL* of all the baseline's seeds, and one study for each set of seeds that arms share with it.

    Every arm is compared under all seeds that it and the baseline have finished, and those with the same
    seeds are one family; the family with most seeds comes first.
    """
    baseline = {curve.seed: curve for curve in found.curves.get(BASELINE, ())}
    top = mean_peak([*baseline.values()])
    families: dict[tuple[int, ...], list[str]] = {}
    for arm, curves in found.curves.items():
        shared = tuple(curve.seed for curve in curves if curve.seed in baseline)
        if arm != BASELINE and shared:
            families.setdefault(shared, []).append(arm)
    done = []
    for seeds, arms in sorted(families.items(), key=lambda family: (-len(family[0]), family[0])):
        members = (c for arm in (BASELINE, *arms) for c in found.curves[arm] if c.seed in seeds)
        done.append(study(comparison(members, BASELINE), top))
    return top, done


def against_controls(found: Found, top: Peak | None) -> list[Study]:
    """Each arm that reads h compared with the one that learns the same without it, under all seeds of both.

    top: the baseline's KL*, so that these differences are at the KLs of all others.
    """
    done = []
    for arm in ARMS.values():
        if arm.without_h is None or not {arm.without_h, arm.name} <= found.curves.keys():
            continue
        both = [found.curves[name] for name in (arm.without_h, arm.name)]
        seeds = set.intersection(*({curve.seed for curve in curves} for curves in both))
        members = [curve for curves in both for curve in curves if curve.seed in seeds]
        if members:
            done.append(study(comparison(members, arm.without_h), top))
    return done


def write_results(preset: Preset, root: Path, out: Path, made: Mapping[str, Any]) -> Path:
    """Write everything that the finished runs say below ``out``; return the page's path.

    made: of ``made_with``; it goes into ``record.json`` with every run's seconds. Raises InputError where
    runs of different worlds lie under one root, RunError where nothing can be written.
    """
    sections: list[Section] = []
    runs: dict[str, Any] = {}
    every = {world.name: find(preset, world, root) for world in preset.worlds}
    for world in preset.worlds:
        found = every[world.name]
        sections += _world_sections(preset, found, root, out / world.name)
        runs[world.name] = {
            "finished": {name: _cost(ticket) for name, ticket in found.tickets.items()
                         if name not in dict(found.missing)},
            "missing": dict(found.missing),
        }  # fmt: skip
    sections += dose_sections({name: found.curves for name, found in every.items()}, out)
    _write_json(out / "record.json", {**made, "preset": preset.name, "runs": runs})
    title = f"Over-optimization: {preset.name}"
    text = comparison_page(title, kind="r2m_ray lab", facts=_facts(made), sections=sections)
    replace_file(out / PAGE_FILE, text)
    return out / PAGE_FILE


def made_with(command: str) -> dict[str, Any]:
    """Machine and its load, versions and commit of this process, and the command as it was typed."""
    return {
        "command": command,
        "machine": machine(),
        "packages": versions(),
        "commit": environment()["commit"],
    }


def warnings(found: Found, verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What a reader must know of a world before any of its numbers."""
    said = [
        f"This world failed gate {verdict['gate']} ({verdict['question']}): "
        f"{' '.join(verdict['failures'])} What follows does not answer the question of the lab."
        for verdict in verdicts
        if not verdict["passed"]
    ]
    undecided = [gate for gate in range(1, 5) if gate not in {verdict["gate"] for verdict in verdicts}]
    if undecided:
        said.append(f"Not decided yet: gate {', '.join(map(str, undecided))}.")
    seeds = {curve.seed for curves in found.curves.values() for curve in curves}
    for verdict in verdicts:
        unasked = sorted(seeds - {int(seed) for seed in verdict["values"]})
        if verdict["passed"] and unasked:
            said.append(f"Gate {verdict['gate']} was not asked of seed {', '.join(map(str, unasked))}.")
    commits: dict[str, set[str]] = {}
    for ticket in found.tickets.values():
        commits.setdefault(ticket["code"], set()).add(str(ticket["commit"]))
    if len(commits) > 1:
        made = sorted(" or ".join(sorted(same)) for same in commits.values())
        said.append(
            f"These runs were made by {len(commits)} versions of r2m_ray, by commit: {'; '.join(made)}."
        )
    return tuple(said)


def _world_sections(preset: Preset, found: Found, root: Path, directory: Path) -> list[Section]:
    gates = root / found.world.name / GATES_FILE
    verdicts: list[dict[str, Any]] = json.loads(gates.read_text()) if gates.is_file() else []
    top, compared = studies(found)
    figures = gallery(found.curves, BASELINE)
    for one in compared:
        if (bars := effects_figure(one)) is not None:
            figures[f"effects-seeds-{'-'.join(map(str, one.seeds))}"] = bars
    paper = paper_tables(found.curves, top)
    said = warnings(found, verdicts)
    compared += against_controls(found, top)
    titles = [_title(one) for one in compared]
    write_pictures(figures, directory)
    _write_json(directory / "curves.json", curves_record(found.curves))
    _write_json(directory / GATES_FILE, verdicts)
    _write_json(directory / "comparison.json", {"warnings": said, "families": [*map(record, compared)]})
    texts = [f"# {title}\n\n{markdown(one)}" for title, one in zip(titles, compared, strict=True)]
    texts += [f"# {table.heading}\n\n{table.note}\n\n{table.markdown()}\n" for table in paper]
    texts += [f"# {table.heading}\n\n{table.markdown()}\n" for table in _state_tables(found, verdicts)]
    replace_file(directory / "comparison.md", "\n".join([*(f"**{text}**\n" for text in said), *texts]))
    overview = Section(
        heading=f"The {found.world.name} world",
        warnings=said,
        notes=(f"{len(found.tickets)} of {len([*preset.runs(found.world)])} runs were started.",),
        tables=_state_tables(found, verdicts),
        figures=tuple(figures.values()),
    )
    families = [
        Section(heading=title, notes=tuple(preface(one)), tables=tuple(tables(one)))
        for title, one in zip(titles, compared, strict=True)
    ]
    beside = Section(heading=f"The paper's tables in miniature, {found.world.name}", tables=paper)
    return [overview, *families, beside]


def _title(found: Study) -> str:
    against = f" against {found.baseline}" if found.baseline != BASELINE else ""
    return f"{', '.join(found.challengers)}{against} under seeds {', '.join(map(str, found.seeds))}"


def _state_tables(found: Found, verdicts: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    gates = Table(
        heading="Gates",
        note="Asked in this order, before any arm is run.",
        head=("gate", "question", "verdict", "why"),
        rows=tuple(
            (str(v["gate"]), v["question"], "passed" if v["passed"] else "failed", " ".join(v["failures"]))
            for v in verdicts
        ),
    )
    missing = Table(
        heading="Missing",
        note="Runs of the schedule that are in no table.",
        head=("run", "why"),
        rows=tuple(found.missing),
    )
    return (gates, _alarms(found), missing) if found.missing else (gates, _alarms(found))


def _alarms(found: Found) -> Table:
    def shown(curves: Sequence[Curve], name: str) -> str:
        every = (first_alarms(curve.training) for curve in curves)
        first = [alarms[name] for alarms in every if name in alarms]
        return f"{len(first)} of {len(curves)}" + (f", from step {min(first)}" if first else "")

    return Table(
        heading="Alarms",
        note="Runs in which each alarm was ever on, and the earliest step of any. They watch the arm's own "
        "reward and the KL, and know nothing of gold.",
        head=("arm", *ALARMS),
        rows=tuple((arm, *(shown(curves, name) for name in ALARMS)) for arm, curves in found.curves.items()),
    )


def _facts(made: Mapping[str, Any]) -> dict[str, str]:
    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

    return {
        "Command": made["command"],
        "Machine": listed(made["machine"]),
        "Libraries": listed(made["packages"]),
        "Commit": made["commit"] or "not in a git checkout",
    }


def _cost(ticket: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seconds": round(sum(attempt["seconds"] or 0.0 for attempt in ticket["attempts"]), 1),
        "attempts": len(ticket["attempts"]),
        "commit": ticket["commit"],
        "code": ticket["code"],
        "command": shlex.join(["r2m-ray", "train", *ticket["overrides"]]),
    }


def _write_json(path: Path, content: Any) -> None:
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
