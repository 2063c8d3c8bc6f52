"""Everything `r2m-ray doctor` looks at; it starts processes of its own, but no Ray, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r2m_ray.cli.checks.doctor_check import Check
from r2m_ray.cli.checks.doctor_machine import machine_checks
from r2m_ray.cli.checks.doctor_processes import collective_check, import_checks
from r2m_ray.cli.checks.doctor_software import secret_checks, software_checks


def examine(root: Path) -> Iterator[Check]:
    """Every check, in the order of the table; ``root`` is where runs are to be written."""
    yield from software_checks()
    yield from import_checks()
    yield from machine_checks(root)
    yield collective_check()
    yield from secret_checks()
