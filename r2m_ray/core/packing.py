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

    Rows are placed longest first into the first batch with room, so every batch but the last ones is nearly
    full and at most 11/9 of the optimal number (+1) are made. The batches' lengths depend only on the
    multiset of row lengths, not on the rows' order. A row longer than the budget gets a batch of its own.
    Rows of a batch are in ascending order; no rows give no batches.

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


def row_index(offsets: Tensor) -> Tensor:
    """The row each token belongs to, int64 [T], from offsets int64 [N+1]."""
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def position_ids(offsets: Tensor) -> Tensor:
    """Positions that restart at 0 with each row, int64 [T], from offsets int64 [N+1]."""
    positions_T = torch.arange(int(offsets[-1]), device=offsets.device)
    return positions_T - torch.repeat_interleave(offsets[:-1], offsets.diff())


def select_rows(offsets: Tensor, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of some rows, packed in the order given.

    Returns the token index, int64 [T'], to be used as `value_T[index]`, and the new offsets, int64 [M+1], of
    the M selected rows. Rows may repeat.
    """
    rows_M = torch.as_tensor(rows, dtype=torch.int64, device=offsets.device)
    lengths_M = offsets.diff()[rows_M]
    selected = torch.zeros(rows_M.numel() + 1, dtype=torch.int64, device=offsets.device)
    torch.cumsum(lengths_M, 0, out=selected[1:])
    start_T = torch.repeat_interleave(offsets[:-1][rows_M], lengths_M)
    return start_T + position_ids(selected), selected


def segment_sum(value_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each row's entries, value_T [T, …] → [N, …]; 0 for a row without tokens.

    Terms are added in token order without atomics, so a sum repeats to the last bit.
    """
    return torch.segment_reduce(value_T, "sum", offsets=offsets, axis=0, initial=0)
