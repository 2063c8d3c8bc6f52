"""What this machine offers: cores that this process may use, and accelerators."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def usable_cores() -> int:
    """Cores that this process may run on; all of the machine's where the system does not tell."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def accelerators() -> list[str]:
    """Name of each accelerator here, from the driver's files: asking torch would allocate memory on each."""
    reports = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [
        line.partition(":")[2].strip()
        for r in reports
        for line in r.read_text().splitlines()
        if line.startswith("Model:")
    ]
    if names or not torch.accelerator.is_available():
        return names
    kind = torch.accelerator.current_accelerator()
    return [str(kind)] * torch.accelerator.device_count()
