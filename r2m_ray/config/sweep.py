"""Sweeps: several values in an override become one run each, with a name of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from hydra.core.override_parser.types import Glob, Override

from r2m_ray.config.compose import groups, load_config, parse_overrides
from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError, Problem, refuse

NAME_LENGTH = 100
STOPPED = (75, 130)
"""Exit codes of a run that was told to stop: pre-empted and saved, or interrupted."""
_DIGEST_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep: its configuration, and the overrides that describe it."""

    config: Config
    overrides: tuple[str, ...]


def sweep(overrides: Sequence[str]) -> list[Job]:
    """The cross product of all overrides with several values, in order; the last one varies fastest.

    Job names are ``run.name`` followed by what distinguishes the job: ``demo-reward-vanilla-run.seed-1``.
    Raises InputError with every problem of every job, each once.
    """
    parsed, problems = parse_overrides(overrides)
    refuse(problems, "the sweep")
    swept = [override for override in parsed if override.is_sweep_override()]
    fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    jobs: list[Job] = []
    faults: dict[str, None] = {}
    for values in itertools.product(*[list(_values(override)) for override in swept]):
        chosen = [f"{o.get_key_element()}={value}" for o, value in zip(swept, values, strict=True)]
        try:
            config = load_config([*fixed, *chosen])
        except InputError as error:
            faults |= dict.fromkeys(str(error).splitlines()[1:])
            continue
        suffixes = [
            f"{override.key_or_group}-{value}"
            for override, value in zip(swept, values, strict=True)
            if override.key_or_group != "run.name"
        ]
        name = job_name(config.run.name, suffixes)
        if any(job.config.run.name == name for job in jobs):
            name = job_name(name, [str(len(jobs))])
        config.run.name = name
        jobs.append(Job(config, (*fixed, *chosen, f"run.name={name}")))
    if faults:
        raise InputError("\n".join(["problems in the sweep:", *faults]))
    return jobs


def job_name(base: str, suffixes: Sequence[str]) -> str:
    """A legal run name of at most 100 characters; a long one is cut and told apart by a digest."""
    words = (re.sub(r"[^A-Za-z0-9.-]+", "_", suffix.replace("'", "")) for suffix in suffixes)
    name = "-".join([base, *words])
    if len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{name[: NAME_LENGTH - _DIGEST_LENGTH - 1]}-{digest}"


def run_in_turn(commands: Sequence[Sequence[str]]) -> list[int]:
    """Run each command in a process of its own; returns the exit codes, negative for a signal.

    A command that fails does not stop those after it; one that was told to stop does. SIGTERM is passed on
    to the command that runs, which ends in order; a terminal's SIGINT reaches it anyway.
    """
    codes = []
    for command in commands:
        with subprocess.Popen(command) as process, _passing_on(process) as told:
            codes.append(process.wait())
        if told or codes[-1] in STOPPED:
            break
    return codes


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Within, signals to this process end the command; yields those that came."""
    told: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        told.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    former = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _values(override: Override) -> Iterator[str]:
    choices = override.value()
    if isinstance(choices, Glob):
        yield from choices.filter(groups().get(override.key_or_group, []))
    elif override.is_discrete_sweep():
        yield from override.sweep_string_iterator()
    else:
        problem = Problem(str(override.input_line), "an interval has no list of values; use choice or range")
        refuse([problem], "the sweep")
