"""Packed rows laid out for the forward passes of a causal language model.

Axes: N rows, T packed tokens, A response tokens among them, B×L the grid of one forward pass.

A forward pass runs over a `Block`: some rows of a record, laid out in one of two ways.

- Grid: one row per line, rows of similar length together, padding on the right. Causal attention never looks
  right, so no token sees padding and no mask is needed; attention costs B·L² instead of the T² of one line.
- Line: rows end to end as [1, T] with positions that restart at 0, for flash attention's kernels for rows of
  any length. transformers isolates such rows only without a cache: with one they read each other silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_ray.core.batch import Trajectories
from r2m_ray.core.packing import microbatches, offsets_of, position_ids, row_index, segment_sum, select_rows

PADDING_ID = 0  # Any id inside the vocabulary: nothing that counts attends to it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The tokens of some records, end to end: offsets [N+1] and input_T, label_T int64, action_T bool."""

    offsets: Tensor
    input_T: Tensor
    label_T: Tensor
    action_T: Tensor

    @classmethod
    def of(cls, records: Sequence[Trajectories]) -> Rows:
        """All rows of the records, in order; none for no records."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(
            offsets=offsets_of(torch.cat([empty, *(record.layout.lengths for record in records)])),
            input_T=torch.cat([empty, *(record.input_T for record in records)]),
            label_T=torch.cat([empty, *(record.label_T for record in records)]),
            action_T=torch.cat([empty.bool(), *(record.action_T for record in records)]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some rows laid out for one forward pass; every tensor on the model's device.

    input_BL, position_BL: the model's input. row_N: the rows' numbers in `Rows`. token_T, slot_T: where each
    token lies in `Rows` and in the flattened grid. action_A, pick_A: the same for the response tokens.
    label_A: what they are. offsets [N+1]: which of them belong to each row.
    """

    input_BL: Tensor
    position_BL: Tensor
    row_N: Tensor
    token_T: Tensor
    slot_T: Tensor
    action_A: Tensor
    pick_A: Tensor
    label_A: Tensor
    offsets: Tensor


def blocks(rows: Rows, *, token_budget: int, packed: bool, device: torch.device) -> list[Block]:
    """Lay all rows out in blocks of at most `token_budget` tokens, padding included, or of one longer row.

    The blocks depend on the rows alone, so a repeated pass repeats to the last bit.
    """
    lengths_N = rows.offsets.diff()
    batches = microbatches(lengths_N, token_budget) if packed else grids(lengths_N.tolist(), token_budget)
    return [_block(rows, batch, packed, device) for batch in batches]


def grids(lengths_N: Sequence[int], token_budget: int) -> list[list[int]]:
    """Partition rows, longest first, into batches whose padded grid has at most `token_budget` tokens."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths_N)), key=lambda row: (-lengths_N[row], row)):
        if not batches or (len(batches[-1]) + 1) * lengths_N[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def idle_block(device: torch.device) -> Block:
    """One token of no row, for a rank that joins a forward pass without rows of its own."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    return Block(
        input_BL=one[None],
        position_BL=one[None],
        row_N=nothing,
        token_T=nothing,
        slot_T=nothing,
        action_A=nothing,
        pick_A=one,
        label_A=one,
        offsets=one,
    )


def _block(rows: Rows, batch: Sequence[int], packed: bool, device: torch.device) -> Block:
    token_T, offsets = select_rows(rows.offsets, batch)
    position_T = position_ids(offsets)
    action_T = rows.action_T[token_T]
    if packed:
        shape, slot_T = (1, token_T.numel()), torch.arange(token_T.numel())
    else:
        length = int(offsets.diff().max())
        shape, slot_T = (len(batch), length), row_index(offsets) * length + position_T
    input_S = torch.full((shape[0] * shape[1],), PADDING_ID)
    input_S[slot_T] = rows.input_T[token_T]
    position_BL = position_T[None] if packed else torch.arange(shape[1]).expand(shape)
    return Block(
        input_BL=input_S.view(shape).to(device),
        position_BL=position_BL.to(device),
        row_N=torch.tensor(batch, device=device),
        token_T=token_T.to(device),
        slot_T=slot_T.to(device),
        action_A=token_T[action_T].to(device),
        pick_A=slot_T[action_T].to(device),
        label_A=rows.label_T[token_T][action_T].to(device),
        offsets=offsets_of(segment_sum(action_T.float(), offsets)).to(device),
    )
