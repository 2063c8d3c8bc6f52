"""What a rule between configuration fields is, and how the modules that hold rules collect them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from r2m_ray.config.schema import Config
from r2m_ray.errors import Problem

Check = Callable[[Config], Iterator[Problem]]
Rule = tuple[tuple[str, ...], Check]
"""The dotted paths that a check reads, and the check."""


def registrar(rules: list[Rule]) -> Callable[..., Callable[[Check], Check]]:
    """The decorator ``@rule("algo.steps", …)`` that adds a check, with the paths it reads, to ``rules``."""

    def rule(*reads: str) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            rules.append((reads, check))
            return check

        return register

    return rule


def near(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, at least one unit."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
