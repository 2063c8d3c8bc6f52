"""``r2m-ray doctor``: whether this machine and its packages can run r2m_ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r2m_ray.cli.arguments import parser
from r2m_ray.config.schema import RunConfig
from r2m_ray.errors import InputError

SUMMARY = "Check this machine: packages, engines, cores, memory, disk, ports, GPUs, a 2-rank collective."
EXAMPLES = """\
Examples:
  r2m-ray doctor
  r2m-ray doctor run.root=/data/runs --json

Takes up to a minute; nothing is left behind. Exit codes: 0 nothing failed, 3 something did.
"""


def run(arguments: Sequence[str]) -> int:
    """Examine, print every check, and return 3 if one failed."""
    arg = parser("doctor", SUMMARY, EXAMPLES)
    arg.add_argument("root", nargs="?", metavar="run.root=DIR", help="where runs will be written")
    arg.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parsed = arg.parse_args(arguments)
    name, _, root = (parsed.root or f"run.root={RunConfig().root}").partition("=")
    if name != "run.root" or not root:
        raise InputError(f"{parsed.root}: doctor takes run.root=DIR alone, such as run.root=/data/runs")

    # torch takes seconds to import, and a mistake above is reported without it.
    from r2m_ray.cli.checks.doctor import diagnose

    return diagnose(Path(root), as_json=parsed.json)
