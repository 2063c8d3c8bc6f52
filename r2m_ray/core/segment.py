"""Reductions over packed rows: row n is `offsets[n]:offsets[n+1]` of the leading axis.

Axes: N rows, T packed tokens; a trailing `…` may hold anything. Sums run in token order with no
atomics, so they repeat to the last bit. A row without tokens sums to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_index(offsets: Tensor) -> Tensor:
    """The row each token belongs to, int64 [T], from offsets int64 [N+1]."""
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def segment_sum(value_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each row's entries, value_T [T, …] → [N, …]; 0 for an empty row."""
    return torch.segment_reduce(value_T, "sum", offsets=offsets, axis=0, initial=0)
