"""``r2m-ray checkpoint``: whether the checkpoints of a run are valid, and their models for use elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r2m_ray.cli.arguments import parser, run_directory
from r2m_ray.errors import InputError, RunError, printable
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, export, fault, step_of

SUMMARY = "Verify the checkpoints of a run, or export the models of one."
EXAMPLES = """\
Examples:
  r2m-ray checkpoint verify runs/demo
  r2m-ray checkpoint verify runs/demo 20
  r2m-ray checkpoint export runs/demo models/demo --step 20
"""


def run(arguments: Sequence[str]) -> int:
    """Verify or export; 0, or RunError where a checkpoint that is asked for is damaged."""
    arg = parser("checkpoint", SUMMARY, EXAMPLES)
    actions = arg.add_subparsers(dest="action", required=True, metavar="verify | export")
    summary = "compare every file with its manifest, by size and sha256"
    verify = actions.add_parser("verify", help=summary, description=summary)
    summary = "copy the policy (Hugging Face format) and the R2M head of a checkpoint that verifies"
    exported = actions.add_parser("export", help=summary, description=summary)
    for action in (verify, exported):
        action.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, such as runs/demo")
    verify.add_argument("step", metavar="STEP", type=int, nargs="?", help="one step; all if left out")
    exported.add_argument("out_dir", metavar="OUT_DIR", help="directory to make; it may not exist")
    exported.add_argument("--step", type=int, help="one step; the newest that verifies if left out")
    parsed = arg.parse_args(arguments)
    directory = run_directory(parsed.run_dir) / CHECKPOINTS
    chosen = checkpoints_of(directory, parsed.step)
    if parsed.action == "verify":
        verify_all(chosen)
        return 0
    newest = chosen[0] if parsed.step is not None else Checkpoints(directory, keep=1).newest()
    assert newest is not None
    export(newest, Path(parsed.out_dir))
    print(parsed.out_dir)
    return 0


def verify_all(checkpoints: Sequence[Path]) -> None:
    """Print each valid checkpoint with its size; RunError names every damaged one, its file and the fault."""
    damaged = []
    for path in checkpoints:
        if reason := fault(path):
            damaged.append(f"{path}: {reason}")
            continue
        print(f"{path}: valid, {commit.read_manifest(path).bytes:,} bytes")
        for name in commit.unlisted(path):
            print(f"{path}: {printable(name)} is not part of the checkpoint, and never read")
    if damaged:
        raise RunError("\n".join(damaged))


def checkpoints_of(directory: Path, step: int | None) -> list[Path]:
    """The checkpoints of a run, oldest first, or that of one step; InputError where there is none."""
    found = Checkpoints(directory, keep=1).committed()
    if not found:
        raise InputError(f"{directory}: no checkpoint; the run has not committed one yet")
    chosen = [path for path in found if step in (None, step_of(path))]
    if not chosen:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise InputError(f"{directory}: no checkpoint of step {step}; there are those of {steps}")
    return chosen
