"""Every problem of a configuration: numbers out of range, and rules between fields that are broken.

Rules are pure: they look at values only, never at files or the machine (``preflight`` does that), and
they return problems instead of raising, so that all of them reach the user at once. A rule names
the fields it reads, and is skipped where one of them is already known to be wrong.
"""

from __future__ import annotations

from collections.abc import Collection

from r2m_ray.config import checks_cluster, checks_method, checks_prepare
from r2m_ray.config.read import range_problems
from r2m_ray.config.rule import Rule
from r2m_ray.config.schema import Config
from r2m_ray.errors import Problem

RULES: tuple[Rule, ...] = (
    *checks_method.RULES,
    *checks_prepare.RULES,
    *checks_cluster.RULES,
)


def validate(config: Config, wrong: Collection[str] = ()) -> list[Problem]:
    """Every problem of a configuration: numbers out of range, then rules that are broken.

    ``wrong`` are paths of fields that could not be read, whose values in ``config`` nobody wrote.
    """
    problems = [problem for problem in range_problems(config) if problem.path not in wrong]
    excluded = {*wrong, *(problem.path for problem in problems)}
    for reads, check in RULES:
        if excluded.isdisjoint(reads):
            problems += check(config)
    return problems
