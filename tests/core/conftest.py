"""Independent, literal forms of what core computes cleverly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from r2m_ray.core.head import R2MHead


def literal_equation_3(head: R2MHead, rte_ND: Tensor, hidden_TP: Tensor, offsets: Tensor) -> Tensor:
    """Ĥ row by row as the paper writes it: queries, keys and values are all formed."""
    rows = []
    for row, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        query_1E = rte_ND[row : row + 1] @ head.w_q
        key_SE = hidden_TP[start:stop] @ head.w_k
        value_SE = hidden_TP[start:stop] @ head.w_v
        weight_1S = torch.softmax(query_1E @ key_SE.T / math.sqrt(head.w_q.shape[1]), dim=1)
        rows.append(weight_1S @ value_SE @ head.w_o)
    return torch.cat(rows)


@pytest.fixture(scope="session")
def literal_feedback() -> Callable[[R2MHead, Tensor, Tensor, Tensor], Tensor]:
    return literal_equation_3


@pytest.fixture(scope="session")
def packed() -> Callable[[Sequence[int]], Tensor]:
    """Offsets int64 [N+1] of rows of the given lengths."""

    def offsets(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int64)

    return offsets
