"""Prepared models of the lab's worlds: made as `r2m-ray prepare` makes them, with what the lab alone adds.

    python -m benchmarks.overoptimization.worlds experiment=overoptimization lab.reward_auxiliary_steps=600

A world is written as overrides of a configuration, and overrides that begin with ``lab.`` for the rest.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.overoptimization.additions import HELP, POLICY, PREFIX, Additions
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines.model_files import WEIGHTS
from r2m_ray.errors import InputError, Problem, RunError, hint, printable, redacted, refuse
from r2m_ray.tasks.prepare import store
from r2m_ray.tasks.prepare.store import Prepared, source_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a world's models are made from."""

    config: Config
    additions: Additions

    def settings(self) -> dict[str, Any]:
        """What the models depend on beyond the configuration; a copied policy counts by its content."""
        settings = self.additions.model_dump()
        if copied := settings.pop("policy"):
            settings["policy"] = _policy_digests(Path(copied))
        return settings


def run_overrides(words: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a world that are a run's as well."""
    return tuple(word for word in words if not word.startswith(PREFIX))


@cache
def recipe(words: tuple[str, ...]) -> Recipe:
    """Compose and check a world, once; InputError with every problem of its configuration or additions."""
    config = load_config(run_overrides(words))
    lab = dict(word.removeprefix(PREFIX).partition("=")[::2] for word in words if word.startswith(PREFIX))
    try:
        additions = Additions.model_validate(lab)
    except ValidationError as error:
        refuse([_problem(detail) for detail in error.errors()], "the lab's overrides")
        raise
    refuse(_problems(config, additions), "the world")
    return Recipe(config=config, additions=additions)


def find(words: Sequence[str]) -> Prepared | None:
    """The prepared models of a world, None where they are not made yet."""
    made_of = recipe(tuple(words))
    return store.find(made_of.config, added=made_of.settings())


def locate(words: Sequence[str]) -> Prepared:
    """The prepared models of a world; InputError with the command to run where they are not made yet."""
    found = find(words)
    if found is None:
        command = shlex.join(["python", "-m", "benchmarks.overoptimization.worlds", *words])
        raise InputError(f"no prepared models of this world; make them by: {command}")
    return found


def prepare(words: Sequence[str]) -> Prepared:
    """The prepared models of a world, made where they are missing; errors of `r2m-ray prepare`."""
    made_of = recipe(tuple(words))

    def build(config: Config, directory: Path) -> dict[str, Any]:
        # TRL takes seconds to import, and a schedule that only looks for its models would pay them.
        from benchmarks.overoptimization.pretraining import build

        return build(config, made_of.additions, directory)

    return store.prepare(made_of.config, added=made_of.settings(), build=build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare a world and return the exit code, as `r2m-ray prepare` does."""
    # Threads that spin while they wait make training several times slower where another process is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        prepare(sys.argv[1:] if arguments is None else arguments)
    except (InputError, RunError) as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code
    return 0


def _problem(detail: Mapping[str, Any]) -> Problem:
    name = ".".join(map(str, detail["loc"]))
    message = f"{detail['msg']}.{hint(name, [*Additions.model_fields])}"
    return Problem(f"{PREFIX}{name}", f"{detail['input']}: {message}")


def _problems(config: Config, additions: Additions) -> Iterator[Problem]:
    """How a configuration and additions contradict each other."""
    make, steps = config.prepare, additions.reward_auxiliary_steps
    if steps and config.task.name is not TaskName.note2answer:
        yield Problem(
            f"{PREFIX}reward_auxiliary_steps",
            f"{steps}, but only responses of note2answer can be counted exactly; use 0",
        )
    elif additions.reward_auxiliary_truth and not steps:
        yield Problem(
            f"{PREFIX}reward_auxiliary_truth",
            f"true, but there is no step to count in; give {PREFIX}reward_auxiliary_steps",
        )
    elif additions.reward_auxiliary_truth and not config.task.reward_reads_prompt:
        yield Problem(
            f"{PREFIX}reward_auxiliary_truth",
            "true, but a response alone does not show right and wrong; use task.reward_reads_prompt=true",
        )
    if not additions.reward_from_policy or additions.policy:
        return  # The shape of a copied policy is its own, and is compared where it is read.
    for name, policy, reward in (
        ("layers", make.policy_layers, make.reward_layers),
        ("width", make.policy_width, make.reward_width),
        ("heads", make.policy_heads, make.reward_heads),
    ):
        if reward < policy if name == "layers" else reward != policy:
            yield Problem(
                f"prepare.reward_{name}",
                f"{reward}, but with {PREFIX}reward_from_policy=true the trunk is a copy of the policy's; "
                f"use {policy}",
            )


def _policy_digests(directory: Path) -> dict[str, str]:
    """Digests of a policy to copy, by file; its other files are checked when it is copied."""
    files = [directory / name for name in ("config.json", WEIGHTS)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{POLICY}={directory}: there is no {file.name}; {HELP}")
    return {file.name: source_digest(str(file)) for file in files}


if __name__ == "__main__":
    sys.exit(main())
