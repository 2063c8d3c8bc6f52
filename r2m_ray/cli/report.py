"""``r2m-ray report``: the page about a run."""

from __future__ import annotations

from collections.abc import Sequence

from r2m_ray.cli.arguments import parser, run_directory

SUMMARY = "Write the report of a run from its files; also works while the run goes on."
EXAMPLES = """\
Example:
  r2m-ray report runs/demo
"""


def run(arguments: Sequence[str]) -> int:
    """Write the report and print its path."""
    arg = parser("report", SUMMARY, EXAMPLES)
    arg.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, such as runs/demo")
    directory = run_directory(arg.parse_args(arguments).run_dir)

    from r2m_ray.report.run_page import write_report

    print(write_report(directory))
    return 0
