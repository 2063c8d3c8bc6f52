"""Commands whose jobs run through hydra's main: sweepers, launchers, ``--cfg``, ``--info`` and completion.

What is wrong with a configuration is found before hydra starts, all at once; of a grid, before its first job.
Of a single run hydra writes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType

import hydra
import psutil
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from r2m_ray.config.compose import (
    SweepPlugins,
    config_dir,
    config_of,
    for_hydra,
    load_config,
    parse_overrides,
    store_defaults,
)
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config
from r2m_ray.config.sweep import fixed_overrides, named, planned
from r2m_ray.errors import (
    ActorLost,
    InputError,
    Preempted,
    Problem,
    RunError,
    printable,
    redacted,
    redacted_command,
    refuse,
)

HELP = """\
hydra's own options:
  -m, --multirun          one job for each combination of values such as reward=vanilla,r2m, each under a
                          run.name of its own; hydra/launcher=joblib runs jobs side by side
  hydra/sweeper=optuna    a search instead; it sees gold/mean of the last evaluation, or, without gold,
                          reward/frozen_mean, so choose hydra.sweeper.direction=maximize
  --cfg job, --info       the configuration, and what it comes from
  --hydra-help            the others; `eval "$(r2m-ray -sc install=bash)"` completes words
"""

SHOWING = ("hydra_help", "cfg", "info", "shell_completion")
"""hydra's options that show something and run no job."""


@dataclass(frozen=True, slots=True)
class Work:
    """A command that goes through hydra: the checks of a configuration, and what it does with a valid one."""

    help: str
    subject: str
    problems: Callable[[Config], Sequence[Problem]]
    run: Callable[[Config], float | None]


def check(configs: Sequence[Config], problems: Callable[[Config], Sequence[Problem]], subject: str) -> None:
    """Print the warnings about the configurations, and refuse what cannot work, for all of them at once."""
    found = dict.fromkeys(p for config in configs for p in (*validate(config), *problems(config)))
    for problem in found:
        if problem.warning:
            print(f"warning: {problem}", file=sys.stderr)
    refuse(found, subject)


def through_hydra(command: str, arguments: Sequence[str], work: Work) -> int:
    """Run a command line of one job or several; returns 0, or raises what ended the first job that failed."""
    parser = get_args_parser()
    parser.prog = f"r2m-ray {command}"
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.help:
        print(f"usage: {parser.prog} [hydra's options] [overrides …]\n\n{work.help}\n{HELP}")
        return 0
    for flag in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if vars(parsed)[flag] is not None:
            name = f"--{flag.replace('_', '-')}"
            raise InputError(f"{name}: not taken; add options of your own by hydra.searchpath=[file:///dir]")
    overrides = [*parsed.overrides]
    if parsed.multirun and redacted_command(overrides) != overrides:
        raise InputError(
            "an override holds a secret, and a sweep's own files keep overrides as they are; give it by an "
            "environment variable"
        )
    flags = [word for word in arguments if word not in overrides]
    fixed, plugins = fixed_overrides(parse_overrides(overrides)[0]), SweepPlugins()
    if parsed.multirun:
        plugins, jobs = planned(overrides)
        if plugins.sweeper == "basic":
            check(jobs, work.problems, work.subject)
        _refuse_one_process(command, jobs)
    elif not any(vars(parsed)[flag] for flag in SHOWING):
        check([load_config(overrides)], work.problems, work.subject)
    ended: list[Exception] = []

    def job(tree: DictConfig) -> float | None:
        config = config_of(tree)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            return _one_of_many(named(config, _distinguishing(fixed)), work, ended)
        try:
            return work.run(config)
        except (InputError, RunError, Preempted) as error:
            # hydra would add lines of its own.
            ended.append(error)
            return None

    with _passing_on(plugins.launcher) if parsed.multirun else nullcontext():
        _hydra(f"r2m-ray {command}", [*flags, *for_hydra(overrides)], job)
    if ended:
        raise ended[0]
    return 0


def _refuse_one_process(command: str, jobs: Sequence[Config]) -> None:
    """One process holds the engines of one run, so a sweep cannot train in it."""
    if command == "train" and any(job.cluster.address == "none" for job in jobs):
        message = "none holds one run, and a sweep has several; use local, or start each run by itself"
        refuse([Problem("cluster.address", message)], "the sweep")


def complete(arguments: Sequence[str], commands: Sequence[str]) -> int:
    """Answer a shell that asks how a command line goes on, or install the completion: ``-sc`` alone."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    command = words[1] if len(words) > 2 else ""
    if words != [""] and command not in ("train", "prepare"):
        print(" ".join(name for name in commands if len(words) == 2))
        return 0
    os.environ["COMP_LINE"] = " ".join(["r2m-ray", *words[2:]])
    return _hydra("r2m-ray", arguments, lambda tree: None)


@contextmanager
def _passing_on(launcher: str) -> Iterator[None]:
    """Within, SIGTERM ends the sweep: its worker processes get it, or this process where there are none."""

    def on_signal(number: int, _: FrameType | None) -> None:
        workers = [] if launcher == "basic" else psutil.Process().children()
        for worker in workers:
            worker.terminate()
        if not workers:
            raise Preempted(f"stopped by {signal.Signals(number).name}")

    former = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _one_of_many(config: Config, work: Work, ended: list[Exception]) -> float | None:
    """Run one job of a sweep; after one that a signal stopped, those that follow do not start."""
    if ended:
        raise ended[0]
    try:
        check([config], work.problems, work.subject)
        result = work.run(config)
    except (InputError, RunError, Preempted) as error:
        print(printable(redacted(f"{config.run.name}: {error}"), lines=True), file=sys.stderr)
        if isinstance(error, Preempted):
            ended.append(error)
        if isinstance(error, ActorLost):
            # A launcher's worker process sends the error by its text alone.
            raise RunError(str(error)) from error
        raise
    print(f"{config.run.name}: done", file=sys.stderr)
    return result


def _distinguishing(fixed: Sequence[str]) -> list[str]:
    """What distinguishes the job that runs from the others of its sweep."""
    chosen = HydraConfig.get()
    known = {line.partition("=")[0] for line in for_hydra(fixed)}
    words = [str(word) for word in chosen.overrides.task if str(word).partition("=")[0] not in known]
    # A search may draw one point twice.
    is_search = chosen.runtime.choices["hydra/sweeper"] != "basic"
    return [*words, f"trial={chosen.job.num}"] if is_search else words


def _hydra(program: str, arguments: Sequence[str], job: Callable[[DictConfig], float | None]) -> int:
    """Hand a command line to hydra's main; what it refuses is an InputError."""
    store_defaults()
    # Errors arrive here as they were raised, instead of as hydra's text and exit code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv = [program, *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error
    return 0
