"""Packed rows: micro-batches by a token budget, the indices that packing needs, and sums over each row.

Axes: N rows, T packed tokens; a trailing `…` may hold anything. Row n is `offsets[n]:offsets[n+1]` of the
packed axis, offsets int64 [N+1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def microbatches(lengths_N: Sequence[int] | Tensor, token_budget: int) -> list[list[int]]:
    """Partition the rows into few batches of at most `token_budget` tokens: first-fit decreasing.

    At most 11/9 of the optimal number (+1) are made, of lengths that do not depend on the rows' order. A row
    longer than the budget gets a batch of its own. Rows of a batch are in ascending order.

    Raises ValueError for a budget below 1 or a negative length.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    lengths = [int(length) for length in lengths_N]
    if min(lengths, default=0) < 0:
        raise ValueError(f"row {lengths.index(min(lengths))} has negative length {min(lengths)}")
    batches: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fitting = (index for index, free in enumerate(room) if free >= lengths[row])
        index = next(fitting, len(batches))
        if index == len(batches):
            batches.append([])
            # An oversized row leaves negative room, which closes its batch even to empty rows.
            room.append(token_budget)
        batches[index].append(row)
        room[index] -= lengths[row]
    return [sorted(batch) for batch in batches]


def offsets_of(lengths_N: Sequence[int] | Tensor) -> Tensor:
    """Where rows of these lengths start, and where the last ends: int64 [N+1], from 0."""
    lengths_N = torch.as_tensor(lengths_N, dtype=torch.int64)
    return torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])


def row_index(offsets: Tensor) -> Tensor:
    """The row each token belongs to, int64 [T]."""
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def position_ids(offsets: Tensor) -> Tensor:
    """Positions that restart at 0 with each row, int64 [T]."""
    positions_T = torch.arange(int(offsets[-1]), device=offsets.device)
    return positions_T - torch.repeat_interleave(offsets[:-1], offsets.diff())


def select_rows(offsets: Tensor, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of some rows, packed in the order given.

    Returns the token index, int64 [T'], for `value_T[index]`, and the new offsets, int64 [M+1]. Rows may
    repeat.
    """
    rows_M = torch.as_tensor(rows, dtype=torch.int64, device=offsets.device)
    lengths_M = offsets.diff()[rows_M]
    selected = offsets_of(lengths_M)
    start_T = torch.repeat_interleave(offsets[:-1][rows_M], lengths_M)
    return start_T + position_ids(selected), selected


def segment_sum(value_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each row's entries, value_T [T, …] → [N, …]; 0 for a row without tokens.

    Terms are added in token order without atomics, so a sum repeats to the last bit.
    """
    return torch.segment_reduce(value_T, "sum", offsets=offsets, axis=0, initial=0)
