"""``r2m-ray compare``: finished runs of several arms beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from r2m_ray.cli.arguments import parser, run_directory
from r2m_ray.errors import InputError, printable

SUMMARY = "Compare finished runs of several arms: gold at matched KL, or what can be said without gold."
EXAMPLES = """\
Examples:
  r2m-ray compare vanilla=runs/v0,runs/v1 r2m=runs/r0,runs/r1 --baseline vanilla
  r2m-ray compare vanilla=runs/v0 r2m=runs/r0 anchor=runs/a0 --baseline vanilla --out comparison

Arms are paired by run.seed; every run has the same task, prepared models, budget and evaluation. Writes
comparison.md, comparison.json, pictures and comparison.html.
"""


def run(arguments: Sequence[str]) -> int:
    """Compare, and print the page's path."""
    arg = parser("compare", SUMMARY, EXAMPLES)
    arg.add_argument(
        "arms", nargs="+", metavar="ARM=RUN_DIR[,RUN_DIR…]", help="name of an arm, and its run of every seed"
    )
    arg.add_argument("--baseline", required=True, metavar="ARM", help="the arm that others are held against")
    arg.add_argument("--out", default="comparison", metavar="DIR", help="where to write (comparison)")
    parsed = arg.parse_args(arguments)
    runs = arms_of(parsed.arms)

    # matplotlib takes seconds to import, and a mistake above is told without it.
    from r2m_ray.report.compare.compare import write_comparison

    print(write_comparison(runs, parsed.baseline, Path(parsed.out)))
    return 0


def arms_of(words: Sequence[str]) -> Mapping[str, list[Path]]:
    """The run directories of each arm, in the order given; InputError for a word of another form."""
    runs: dict[str, list[Path]] = {}
    for word in words:
        arm, separator, directories = word.partition("=")
        if not (arm and separator and directories):
            raise InputError(f"{printable(word)}: not ARM=RUN_DIR, such as vanilla=runs/v0,runs/v1")
        runs.setdefault(arm, []).extend(run_directory(text) for text in directories.split(","))
    return runs
