"""``r2m-ray checkpoint``: what a run has committed, whether it is whole, and its models for use elsewhere."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from r2m_ray.cli.arguments import parser, run_directory
from r2m_ray.errors import InputError, RunError, printable
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, fault, step_of
from r2m_ray.run.checkpoint_export import export

SUMMARY = "List and verify the checkpoints of a run, or export the models of one."
EXAMPLES = """\
Examples:
  r2m-ray checkpoint list runs/demo
  r2m-ray checkpoint verify runs/demo
  r2m-ray checkpoint verify runs/demo 20
  r2m-ray checkpoint export runs/demo models/demo --step 20
"""
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def run(arguments: Sequence[str]) -> int:
    """List, verify or export; 0, or RunError where a checkpoint that is asked for is damaged."""
    arg = parser("checkpoint", SUMMARY, EXAMPLES)
    actions = arg.add_subparsers(dest="action", required=True, metavar="list | verify | export")
    for name, summary in (
        ("list", "step, size, age and state of each checkpoint"),
        ("verify", "compare every file with its manifest, by size and sha256"),
        ("export", "copy the policy (Hugging Face format) and the R2M head of a checkpoint that verifies"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, such as runs/demo")
        _add_own(name, action)
    parsed = arg.parse_args(arguments)
    directory = run_directory(parsed.run_dir) / CHECKPOINTS
    match parsed.action:
        case "list":
            _list(directory, hashed=parsed.verify)
        case "verify":
            _verify(_chosen(directory, parsed.step))
        case "export":
            source = _newest(directory) if parsed.step is None else _chosen(directory, parsed.step)[0]
            export(source, Path(parsed.out_dir))
            print(parsed.out_dir)
    return 0


def _add_own(name: str, action: argparse.ArgumentParser) -> None:
    match name:
        case "list":
            action.add_argument("--verify", action="store_true", help="read every file, not only sizes")
        case "verify":
            action.add_argument("step", metavar="STEP", type=int, nargs="?", help="one step; all if left out")
        case "export":
            action.add_argument("out_dir", metavar="OUT_DIR", help="directory to make; it may not exist")
            action.add_argument("--step", type=int, help="one step; the newest that verifies if left out")


def _list(directory: Path, *, hashed: bool) -> None:
    print(f"{'step':>8}  {'bytes':>15}  {'age':>8}  state")
    for path in _committed(directory):
        reason = fault(path, hashed=hashed)
        state = f"damaged: {reason}" if reason else "valid" if hashed else "complete"
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        age = _age(time.time() - path.lstat().st_mtime)
        print(f"{step_of(path):>8}  {size:>15,}  {age:>8}  {state}")


def _verify(checkpoints: Sequence[Path]) -> None:
    reasons = {}
    for path in checkpoints:
        if reason := fault(path):
            reasons[path] = reason
        else:
            print(f"{path}: valid")
            for name in commit.unlisted(path):
                print(f"{path}: {printable(name)} is not of the checkpoint, and never read")
    if reasons:
        raise RunError("\n".join(f"{path}: {reason}" for path, reason in reasons.items()))


def _newest(directory: Path) -> Path:
    _committed(directory)
    newest = Checkpoints(directory, keep=1).newest()
    assert newest is not None
    return newest


def _chosen(directory: Path, step: int | None) -> list[Path]:
    found = _committed(directory)
    chosen = [path for path in found if step in (None, step_of(path))]
    if not chosen:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise InputError(f"{directory}: no checkpoint of step {step}; there are those of {steps}")
    return chosen


def _committed(directory: Path) -> list[Path]:
    found = Checkpoints(directory, keep=1).committed()
    if not found:
        raise InputError(f"{directory}: no checkpoint; the run has not committed one yet")
    return found


def _age(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"
