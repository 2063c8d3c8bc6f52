"""One kill −9 of the rollout actor in a tiny run: the run recovers, and ends like an undisturbed one."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_parts import setup

from r2m_ray.run.files import METRICS_FILE, read_steps
from r2m_ray.run.vocabulary import MACHINE_PREFIXES

FAULT = "rollout-0@2:sample:kill"
DEADLINE_S = 300.0


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Seconds that the loss cost, and the largest relative difference of any metric of the two runs."""
    del sizes  # The actor's start is what a recovery costs; the models are tiny on every machine.
    quiet, killed = (_trained(scratch, name, fault) for name, fault in (("quiet", ""), ("killed", FAULT)))
    difference, where = largest_difference(quiet["rows"], killed["rows"])
    replaced = re.search(r"rollout-0 replaced after ([\d.]+) s", killed["text"])
    return {
        "passed": killed["struck"] and replaced is not None,
        "fault": FAULT,
        "seconds_of_replacement": float(replaced.group(1)) if replaced else None,
        "seconds_of_sampling": {"quiet": quiet["sampling"], "killed": killed["sampling"]},
        "largest_relative_difference": {"value": difference, "metric": where},
    }


def _trained(scratch: Path, name: str, fault: str) -> dict[str, Any]:
    """A run in a process of its own: its rows, seconds of sampling in step 2, its output, and the fault's."""
    evidence = scratch / f"faults-{name}"
    evidence.mkdir()
    overrides = setup.run_overrides(
        scratch / "tiny",
        setup.DRY,
        *(f"run.name={name}", f"run.root={scratch / 'runs'}"),
        "++rollout.engine_args.enforce_eager=true",
        *("algo.steps=3", "evaluate.every=0", "evaluate.prompts=4", "evaluate.pairs=4", "checkpoint.every=0"),
    )
    faults = {"R2M_TESTING": "1", "R2M_FAULTS": fault, "R2M_FAULTS_DIR": str(evidence)} if fault else {}
    done = subprocess.run(
        [sys.executable, "-m", "r2m_ray", "train", *overrides],
        env=os.environ | faults,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    if done.returncode:
        raise RuntimeError(f"the {name} run ended with {done.returncode}:\n{done.stderr[-2000:]}")
    rows = [*read_steps(scratch / "runs" / name / METRICS_FILE)]
    sampling = [row["time/sample"] for row in rows if row["kind"] == "step" and row["step"] == 2]
    return {"rows": rows, "sampling": sampling[0], "text": done.stderr, "struck": any(evidence.iterdir())}


def largest_difference(quiet: list[dict[str, Any]], killed: list[dict[str, Any]]) -> tuple[float, str]:
    """Of all metrics that the machine does not decide: the largest relative difference, and its name."""
    largest, where = 0.0, ""
    for one, other in zip(quiet, killed, strict=True):
        for name, value in one.items():
            if name.startswith(MACHINE_PREFIXES) or value == other.get(name):
                continue
            numbers = isinstance(value, float) and isinstance(other.get(name), float)
            difference = abs(value - other[name]) / max(abs(value), abs(other[name])) if numbers else math.inf
            if difference > largest:
                largest, where = difference, name
    return largest, where
