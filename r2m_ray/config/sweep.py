"""What a sweep adds to hydra's: the jobs of a grid before the first one starts, and their run names."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hydra.core.override_parser.types import Glob, Override

from r2m_ray.config.compose import SweepPlugins, groups, load_config, parse_overrides, sweep_plugins
from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError, Problem, refuse

NAME_LENGTH = 100
_DIGEST_LENGTH = 8


def planned(overrides: Sequence[str]) -> tuple[SweepPlugins, list[Config]]:
    """hydra's plug-ins of a sweep, and what is known of its jobs: those of a grid, what a search starts from.

    Raises InputError with every problem.
    """
    fixed = fixed_overrides(parse_overrides(overrides)[0])
    plugins = sweep_plugins(fixed)
    grid = plugins.sweeper == "basic"
    return plugins, sweep([*plugins.overrides, *overrides]) if grid else [load_config(fixed)]


def sweep(overrides: Sequence[str]) -> list[Config]:
    """The jobs of the cross product of all overrides with several values, in order; the last varies fastest.

    A job's name is ``run.name`` followed by what distinguishes it: ``demo-reward-vanilla-run.seed-1``.
    Raises InputError with every problem of every job, each once.
    """
    parsed, problems = parse_overrides(overrides)
    refuse(problems, "the sweep")
    swept = [override for override in parsed if override.is_sweep_override()]
    fixed = fixed_overrides(parsed)
    jobs: list[Config] = []
    faults: dict[str, None] = {}
    for values in itertools.product(*[list(_values(override)) for override in swept]):
        chosen = [f"{o.get_key_element()}={value}" for o, value in zip(swept, values, strict=True)]
        try:
            jobs.append(named(load_config([*fixed, *chosen]), chosen))
        except InputError as error:
            faults |= dict.fromkeys(str(error).splitlines()[1:])
    if faults:
        raise InputError("\n".join(["problems in the sweep:", *faults]))
    names = [job.run.name for job in jobs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    both = {o.key_or_group for o in swept} & {o.key_or_group for o in parsed if not o.is_sweep_override()}
    problems = [Problem(name, "is the name of two jobs; leave out one of the equal values") for name in twice]
    problems += [Problem(field, "has one value and several; give it once") for field in sorted(both)]
    refuse(problems, "the sweep")
    return jobs


def named(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a job under the name that distinguishes it."""
    return replace(config, run=replace(config.run, name=job_name(config.run.name, overrides)))


def fixed_overrides(parsed: Sequence[Override]) -> list[str]:
    """The overrides with one value."""
    return [str(override.input_line) for override in parsed if not override.is_sweep_override()]


def job_name(base: str, overrides: Sequence[str]) -> str:
    """``base`` and what distinguishes a job, as a legal run name of at most 100 characters.

    A name that had to lose characters ends in a digest of what it stands for.
    """
    words = sorted(o.lstrip("+").replace("=", "-", 1) for o in overrides if not o.startswith("run.name="))
    full = "-".join([base, *words])
    name = "-".join([base, *(re.sub(r"[^A-Za-z0-9._-]+", "_", word) for word in words)])
    if name == full and len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(full.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{name[: NAME_LENGTH - _DIGEST_LENGTH - 1]}-{digest}"


def _values(override: Override) -> Iterator[str]:
    choices = override.value()
    if isinstance(choices, Glob):
        yield from choices.filter(groups().get(override.key_or_group, []))
    elif override.is_discrete_sweep():
        yield from override.sweep_string_iterator()
    else:
        problem = Problem(str(override.input_line), "an interval has no list of values; use choice or range")
        refuse([problem], "the sweep")
