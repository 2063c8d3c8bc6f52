"""What this machine offers: cores of this process, accelerators, and memory that they copy to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


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


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros on the CPU, in memory that ``device`` can write to while this process goes on."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type != "cpu")


def wait_for_copies(device: torch.device) -> None:
    """Wait until every copy to the host that was started on this device has arrived."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
