"""What the commands have in common: how they read arguments and where they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from r2m_ray.config.compose import groups
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config
from r2m_ray.config.sweep import STOPPED, Job, run_in_turn
from r2m_ray.errors import InputError, Preempted, Problem, RunError, hint, printable, refuse
from r2m_ray.run.files import CONFIG_FILE

OVERRIDES = """\
Overrides choose options and set fields, in hydra's grammar:
  experiment=demo                               an option of a group of conf/
  algo.steps=200                                a field of r2m_ray/config/schema.py
  +policy.deepspeed.wall_clock_breakdown=true   a key that DeepSpeed (or vLLM) knows
  hydra.searchpath=[file:///my/conf]            options of your own: /my/conf/experiment/mine.yaml
"""


def parser(command: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """An argument parser whose help keeps the epilog's line breaks."""
    return argparse.ArgumentParser(
        prog=f"r2m-ray {command}",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_overrides(arg: argparse.ArgumentParser) -> None:
    """The arguments of a command that takes a configuration, or several."""
    arg.add_argument("overrides", nargs="*", help="options and fields, as below")
    arg.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="once for each combination of values such as reward=vanilla,r2m; run.name tells them apart",
    )


def options() -> str:
    """The configuration groups and their options, one group per line."""
    width = max(map(len, groups()))
    lines = [f"  {name:<{width}}  {' '.join(choices)}" for name, choices in groups().items()]
    return "\n".join(["Groups and their options:", *lines])


def run_directory(text: str) -> Path:
    """The directory of an existing run; InputError names the nearest one where there is none."""
    path = Path(text)
    if (path / CONFIG_FILE).is_file():
        return path
    runs = [str(file.parent) for file in path.parent.glob(f"*/{CONFIG_FILE}")]
    remedy = hint(str(path), runs) or " Give one, such as runs/demo."
    raise InputError(f"{printable(text)}: not the directory of a run (no {CONFIG_FILE} in it).{remedy}")


def check(configs: Sequence[Config], preflight: Callable[[Config], Sequence[Problem]], subject: str) -> None:
    """Print the warnings about the configurations, and refuse what cannot work, for all of them at once."""
    problems = dict.fromkeys(p for config in configs for p in (*validate(config), *preflight(config)))
    for problem in problems:
        if problem.warning:
            print(f"warning: {problem}", file=sys.stderr)
    refuse(problems, subject)


def run_jobs(command: str, jobs: Sequence[Job]) -> int:
    """Run a command for one job after another, each in a process of its own; returns the exit code of all."""
    codes = run_in_turn([[sys.executable, "-m", "r2m_ray", command, *job.overrides] for job in jobs])
    for job, code in zip(jobs, codes, strict=False):
        print(f"{job.config.run.name}: {'done' if code == 0 else f'exit code {code}'}", file=sys.stderr)
    if codes[-1] in STOPPED:
        return codes[-1]
    if len(codes) < len(jobs):
        return Preempted.exit_code
    return RunError.exit_code if any(codes) else 0
