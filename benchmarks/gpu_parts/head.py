"""The R2M head against the memory of the device: forward and backward read every hidden state once each.

The share is the bytes of h that a forward and a backward pass must read, over their seconds and the speed of
a copy within the device. A head that waited for kernel launches or formed keys and values would be far below.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import head as benchmark
import measure
import torch
from gpu_parts import setup

AGREEMENT = 1e-3
"""Relative difference at most between the gradients of the head and of a literal Eq. 3."""
FEW_ROWS = 16


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Seconds, bytes and share of the bandwidth at each width."""
    copies = measure.alternating({"copy": _copy(sizes.copy_bytes)}, sizes.repeats)["copy"]
    # A copy reads and writes.
    bandwidth = [2 * sizes.copy_bytes / seconds for seconds in copies]
    best = measure.summary(bandwidth)["median"]
    cases = [_case(width, sizes, best) for width in sizes.head_widths]
    agrees = all(case["gradient_relative_difference"] < AGREEMENT for case in cases)
    return {"passed": agrees, "copy_bytes_per_second": measure.summary(bandwidth), "cases": cases}


def _copy(size: int) -> Any:
    source = torch.zeros(size, dtype=torch.uint8, device=setup.device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _case(width: int, sizes: setup.Sizes, bandwidth: float) -> dict[str, Any]:
    arguments = argparse.Namespace(
        rows=sizes.head_rows, tokens=sizes.head_tokens, device=setup.device(), dtype=sizes.dtype, repeats=1
    )
    case = benchmark.random_case(width, arguments)
    ours = benchmark.sides(case, omega=0.6)["r2m_head"]
    times = measure.alternating({"r2m_head": ours}, sizes.repeats)["r2m_head"]
    read = 2 * case.hidden_TP.numel() * case.hidden_TP.element_size()
    # The literal form keeps keys and values of all tokens, so it gets fewer rows.
    few = argparse.Namespace(**{**vars(arguments), "rows": min(FEW_ROWS, sizes.head_rows)})
    literal = benchmark.compared(width, few)
    return {
        "width": width,
        "rows": sizes.head_rows,
        "tokens": case.hidden_TP.shape[0],
        "seconds": measure.summary(times),
        "bytes_of_states_read": read,
        "share_of_bandwidth": measure.summary([read / seconds / bandwidth for seconds in times]),
        "operations": benchmark.operations(ours),
        "gradient_relative_difference": literal["gradient_relative_difference"],
    }
