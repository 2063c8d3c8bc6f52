"""One run of the schedule: what starts it, where it lies, and how far it got; files alone say so.

A run ``<root>/<world>/<arm>-seed-<n>`` is an ordinary run directory. Beside it lie ``….log``, what its
processes printed, and ``….ticket.json``, what it was made of when it was first started and how each attempt
ended.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import r2m_ray
from benchmarks.overoptimization.arms import Arm
from benchmarks.overoptimization.presets import World
from benchmarks.overoptimization.worlds import run_overrides
from r2m_ray.errors import InputError, Problem
from r2m_ray.run.files import LOCK_FILE, METRICS_FILE, read_steps, replace_file
from r2m_ray.run.resume import Identity, differences

HOUSEKEEPING = ("checkpoint.every=5", "checkpoint.keep=1", "logging=disabled")
"""An interruption costs five steps at most; the lab reads the run's own files alone."""
ONLOOKERS = ("cli", "config/sweep", "report")
"""How the names of modules begin that read runs and decide none of their numbers."""


class State(StrEnum):
    """How far a run got."""

    absent = "not started"
    half = "half-finished"
    finished = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Directories of the prepared models that a run starts from."""

    policy: Path
    reward: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One arm in one world under one seed. extra: the command line's overrides, for every run alike."""

    world: World
    arm: Arm
    seed: int
    root: Path
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in its world."""
        return f"{self.arm.name}-seed-{self.seed}"

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return self.root / self.world.name / self.name

    @property
    def log(self) -> Path:
        """What its processes printed, one attempt after another."""
        return self.directory.with_name(f"{self.name}.log")

    @property
    def ticket(self) -> Path:
        """What it was made of, and its attempts."""
        return self.directory.with_name(f"{self.name}.ticket.json")

    @property
    def world_overrides(self) -> tuple[str, ...]:
        """What prepares its models."""
        return world_overrides(self.world, self.seed, self.extra)

    @property
    def reward_overrides(self) -> tuple[str, ...]:
        """What prepares the reward model that its arm scores with, the policy apart."""
        return (*self.world_overrides, *self.arm.reward_world)

    def overrides(self, models: Models | None = None) -> tuple[str, ...]:
        """The overrides of `r2m-ray train`; without models only to be checked, since they may not exist."""
        place = (f"run.root='{self.directory.parent}'", f"run.name={self.name}")
        paths = models and (f"model.policy='{models.policy}'", f"model.reward='{models.reward}'")
        world = run_overrides(self.world_overrides)
        # An arm is what the table says: the command line's overrides come before it and cannot change it.
        return (*world, *HOUSEKEEPING, *self.arm.overrides, *place, *(paths or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands. step: the last one logged. exit_code: of its last attempt, None while it runs."""

    state: State
    step: int = 0
    steps: int | None = None
    exit_code: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.state is not State.half:
            return self.state.value
        ended = f", ended with exit code {self.exit_code}" if self.exit_code else ""
        return f"{self.state.value} at step {self.step} of {self.steps or '?'}{ended}"


def world_overrides(world: World, seed: int, extra: Sequence[str]) -> tuple[str, ...]:
    """What makes a world under a seed."""
    return (*world.overrides, *extra, f"run.seed={seed}")


def standing(run: Run) -> Standing:
    """How far a run got, from its files alone; InputError names one that is damaged."""
    ticket = read_ticket(run)
    if ticket is None:
        return Standing(state=State.absent)
    last = ticket["attempts"][-1]
    steps = int(ticket["identity"]["config"]["algo.steps"])
    file = run.directory / METRICS_FILE
    rows = read_steps(file) if file.is_file() else []
    is_complete = any(row.get("kind") == "eval" and row["step"] == steps for row in rows)
    return Standing(
        # A last attempt that failed before it wrote anything left a run to start, not one to resume.
        state=State.finished if is_complete else State.half if used(run) else State.absent,
        step=max((int(row["step"]) for row in rows if row.get("kind") == "step"), default=0),
        steps=steps,
        exit_code=last["exit_code"],
        seconds=sum(attempt["seconds"] or 0.0 for attempt in ticket["attempts"]),
    )


def conflicts(run: Run, identity: Identity, code: str) -> Iterator[Problem]:
    """Why what lies in a run's used directory is not the run that would be started now.

    identity: of `r2m_ray.run.resume`; code: ``code_digest``. Other versions of libraries are warnings.
    """
    ticket = read_ticket(run)
    if ticket is None:
        if used(run):
            yield Problem(
                str(run.directory), "holds a run that this schedule did not start; choose another --root"
            )
        return
    if ticket["code"] != code:
        commit = ticket["commit"] or "an unknown commit"
        yield Problem(
            str(run.directory),
            f"was made by other code of r2m_ray ({commit}); go on with that code, or choose another --root",
        )
    stored, now = ticket["identity"], json.loads(json.dumps(identity))
    for problem in differences(stored, now, reshard=False):
        yield Problem(f"{run.directory}: {problem.path}", problem.message, problem.warning)
    for path in sorted({*stored["config"], *now["config"]}):
        before, after = stored["config"].get(path), now["config"].get(path)
        if path.startswith("evaluate.") and before != after:
            message = f"{before} -> {after}; runs of one root are measured alike, so choose another --root"
            yield Problem(f"{run.directory}: {path}", message)


def begin(run: Run, identity: Identity, code: str, commit: str | None, overrides: Sequence[str]) -> None:
    """Note on the run's ticket that an attempt begins; the first one says what the run is made of."""
    kept = read_ticket(run) if used(run) else None
    ticket = kept or {
        "arm": run.arm.name,
        "seed": run.seed,
        "overrides": list(overrides),
        "code": code,
        "commit": commit,
        "identity": identity,
        "attempts": [],
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ticket["attempts"].append({"started": now, "seconds": None, "exit_code": None})
    run.ticket.parent.mkdir(parents=True, exist_ok=True)
    _write(run, ticket)


def end(run: Run, exit_code: int, seconds: float) -> None:
    """Note on the run's ticket how its last attempt ended."""
    ticket = read_ticket(run)
    assert ticket is not None, run.ticket
    ticket["attempts"][-1] |= {"exit_code": exit_code, "seconds": round(seconds, 1)}
    _write(run, ticket)


def read_ticket(run: Run) -> dict[str, Any] | None:
    """The content of a run's ticket, None where there is none; InputError for one that is damaged."""
    if not run.ticket.is_file():
        return None
    try:
        ticket: dict[str, Any] = json.loads(run.ticket.read_text(encoding="utf-8"))
        ticket["attempts"][-1]["exit_code"], ticket["identity"]["config"]["algo.steps"], ticket["code"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{run.ticket}: not a ticket ({error!r}). Restore it, or remove it together with {run.directory}."
        ) from error
    return ticket


def code_digest() -> str:
    """sha256 over every module of r2m_ray but those that only look at runs."""
    package = Path(r2m_ray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(ONLOOKERS):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _write(run: Run, ticket: Mapping[str, Any]) -> None:
    replace_file(run.ticket, json.dumps(ticket, indent=1, ensure_ascii=False) + "\n")


def used(run: Run) -> bool:
    """Whether anything lies in its directory, but for a lock."""
    directory = run.directory
    return directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir())
