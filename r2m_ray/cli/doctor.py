"""``r2m-ray doctor``: whether this machine and its packages can run r2m_ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r2m_ray.cli.arguments import parser
from r2m_ray.cli.checks.doctor_check import Check, Outcome
from r2m_ray.config.schema import RunConfig
from r2m_ray.errors import InputError, RunError, printable, redacted

SUMMARY = "Check this machine: packages, engines, cores, memory, disk, ports, GPUs, a 2-rank collective."
EXAMPLES = """\
Examples:
  r2m-ray doctor
  r2m-ray doctor run.root=/data/runs --json

Takes up to a minute; nothing is left behind. Exit codes: 0 nothing failed, 3 something did.
"""
STYLES = {Outcome.ok: "green", Outcome.warning: "yellow", Outcome.failed: "bold red"}


def run(arguments: Sequence[str]) -> int:
    """Examine, print every check, and return 3 if one failed."""
    arg = parser("doctor", SUMMARY, EXAMPLES)
    arg.add_argument("root", nargs="?", metavar="run.root=DIR", help="where runs will be written")
    arg.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parsed = arg.parse_args(arguments)
    root = _root(parsed.root)

    # torch takes seconds to import, and a mistake above is told without it.
    from r2m_ray.cli.checks.doctor import examine

    with Console(stderr=True).status("examining this machine …"):
        checks = [_clean(check) for check in examine(root)]
    failures = sum(check.outcome is Outcome.failed for check in checks)
    if parsed.json:
        print(json.dumps({"failed": failures, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        console = Console(highlight=False)
        console.print(_table(checks))
        counts = {outcome: sum(check.outcome is outcome for check in checks) for outcome in Outcome}
        console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    return RunError.exit_code if failures else 0


def _root(argument: str | None) -> Path:
    if argument is None:
        return Path(RunConfig().root)
    name, _, value = argument.partition("=")
    if name != "run.root" or not value:
        raise InputError(f"{argument}: doctor takes run.root=DIR alone, such as run.root=/data/runs")
    return Path(value)


def _clean(check: Check) -> Check:
    """A check whose text is safe to print: libraries' messages are in it."""
    value = printable(redacted(check.value))
    return Check(check.name, check.outcome, value, printable(redacted(check.remedy)))


def _table(checks: Sequence[Check]) -> Table:
    table = Table("check", "", "found", "remedy")
    for check in checks:
        outcome = Text(check.outcome.value, STYLES[check.outcome])
        table.add_row(check.name, outcome, Text(check.value), Text(check.remedy))
    return table
