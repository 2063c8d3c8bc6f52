"""What one check of `r2m-ray doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Fine; worth knowing, though a run may work; or something that no run works with."""

    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table: what was looked at, what was found, and what to do about it."""

    name: str
    outcome: Outcome
    value: str
    remedy: str = ""


def judged(name: str, value: str, problem: Outcome | None, remedy: str) -> Check:
    """A check that is ok, without a remedy, where there is no problem."""
    return Check(name, problem or Outcome.ok, value, remedy if problem else "")
