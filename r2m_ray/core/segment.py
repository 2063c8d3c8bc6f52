"""Reductions over packed rows: row n is `offsets[n]:offsets[n+1]` of the leading axis.

Axes: N rows, T packed tokens; a trailing `…` may hold anything. Sums run in token order with no
atomics, so they repeat to the last bit. A row without tokens sums to 0 and has mean 0.
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


def segment_mean(value_T: Tensor, offsets: Tensor) -> Tensor:
    """Mean of each row's entries, value_T [T, …] → [N, …]; 0 for an empty row."""
    lengths_N = offsets.diff().clamp(min=1).to(value_T.dtype)
    return segment_sum(value_T, offsets) / lengths_N.reshape(-1, *[1] * (value_T.ndim - 1))


def segment_softmax(score_T: Tensor, offsets: Tensor) -> Tensor:
    """Softmax within each row, score_T [T] → weights [T]; an empty row has no weights."""
    row_T = row_index(offsets)
    max_N = torch.segment_reduce(score_T.detach(), "max", offsets=offsets, axis=0)
    exp_T = torch.exp(score_T - max_N[row_T])
    return exp_T / segment_sum(exp_T, offsets)[row_T]
