"""Timing for the scripts of this folder: both sides of a comparison alternate within one run.

Alternation makes slow drifts of a shared machine (frequency, neighbours, caches) fall on every side
alike; the order is rotated each round, so none is always the one that follows the other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    """Wait until the accelerator, where there is one, has finished what was queued."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, queued accelerator work included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternating(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of every function, called in turn after `warmup` unmeasured rounds."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            functions[name]()
    for round_index in range(repeats):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(functions[name]))
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of the values, in their own unit."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, cores, load, accelerator, versions, threads."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    load = os.getloadavg()[0]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(load, 2),
        "accelerator": torch.get_device_module(accelerator).get_device_name() if accelerator else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write one result as indented JSON, creating its directory."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
