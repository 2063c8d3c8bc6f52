"""The over-optimization lab, one command from nothing to tables, pictures and a page.

    python -m benchmarks.overoptimization smoke                   every part once, in minutes
    python -m benchmarks.overoptimization quick                   eight arms, two seeds
    python -m benchmarks.overoptimization control                 five arms whose h is noise
    python -m benchmarks.overoptimization doses                   more or less bias, and of what h knows
    python -m benchmarks.overoptimization full --jobs 2           every arm, both worlds
    python -m benchmarks.overoptimization quick --arms static_h refit --seeds 0 1 2
    python -m benchmarks.overoptimization quick --root runs/longer -- algo.steps=120

Run it again after an interruption: nothing that is finished is done twice. Overrides after `--` hold for
every run alike; runs of other settings or other code need another --root.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.overoptimization.arms import ARMS
from benchmarks.overoptimization.presets import PRESETS, chosen
from r2m_ray.errors import InputError, Preempted, RunError, printable, redacted, redacted_command
from r2m_ray.run.files import run_lock

PROGRAM = "python -m benchmarks.overoptimization"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arg = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=f"Arms: {' '.join(ARMS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arg.add_argument("preset", help=f"what to run: {', '.join(PRESETS)}")
    arg.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="in place of the preset's; rloo is always run"
    )
    arg.add_argument("--seeds", nargs="+", default=[], type=int, metavar="N", help="in place of the preset's")
    arg.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    arg.add_argument("--root", type=Path, default=Path("runs/overoptimization"), help="where runs lie")
    arg.add_argument("--out", type=Path, help="where results go (ROOT/results/PRESET)")
    arg.add_argument("--despite-gates", action="store_true", help="go on in a world that fails a gate")
    arg.add_argument("--report-only", action="store_true", help="start nothing, write what lies there")
    return arg


def run(arguments: Sequence[str]) -> int:
    """Conduct the schedule and write its results; returns the exit code."""
    words, extra = _split(arguments)
    parsed = parser().parse_args(words)
    if parsed.jobs < 1:
        raise InputError(f"--jobs {parsed.jobs}: give one or more")
    preset = chosen(parsed.preset, parsed.arms, parsed.seeds)
    out = parsed.out or parsed.root / "results" / preset.name

    # torch takes seconds to import, and a mistake above is reported without it.
    from benchmarks.overoptimization.lab import Conducted, Lab, check, conduct, summary
    from benchmarks.overoptimization.precheck import precheck
    from benchmarks.overoptimization.results import made_with, write_results

    lab = Lab(
        preset=preset,
        root=parsed.root,
        jobs=parsed.jobs,
        precheck=precheck,
        extra=tuple(extra),
        despite_gates=parsed.despite_gates,
    )
    done, stopped = Conducted(ended=(), failed=()), None
    if not parsed.report_only:
        check(lab)
        with run_lock(lab.root):
            try:
                done = conduct(lab)
            except Preempted as error:
                stopped = error
    command = shlex.join([*PROGRAM.split(), *redacted_command(arguments)])
    print(write_results(preset, lab.root, out, made_with(command)))
    if stopped is not None:
        raise stopped
    for line in summary(done):
        print(line, file=sys.stderr)
    return RunError.exit_code if done.ended or done.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as `r2m-ray` does."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except (InputError, RunError, Preempted) as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after ``--``."""
    words = list(arguments)
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
