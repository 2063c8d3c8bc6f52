"""R2M heads of a few numbers, what they are fed, and their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_ray.core.head import R2MHead
from r2m_ray.core.reward_loss import GrebtSums, grebt_sums, mixed_means

CROSS_ATTENTION = {"w_q", "w_k", "w_v", "w_o"}

P, D, E = 11, 7, 5


def packed(lengths: Sequence[int]) -> Tensor:
    """Offsets int64 [N+1] of rows of the given lengths."""
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int64)


def grebt(
    reward_GK: Tensor, pair_reward_GK: Tensor, *, entropy_weight: float, min_margin: float = 0.0
) -> tuple[Tensor, GrebtSums]:
    """GREBT of a full batch whose responses all differ (Eq. 7), and the sums that it was made of."""
    ids_GK = torch.arange(reward_GK.numel()).reshape(reward_GK.shape)
    sums = grebt_sums(reward_GK, pair_reward_GK, ids_GK, min_margin=min_margin)
    counts = (sums.pairs, sums.groups)
    return mixed_means(sums.bradley_terry, sums.entropy, counts=counts, weight=entropy_weight), sums


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


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(
    policy_width: int = P, reward_width: int = D, width: int = E, *, bias: bool = True, std: float = 0.4
) -> R2MHead:
    return R2MHead(
        policy_width,
        reward_width,
        width,
        random(1, reward_width, seed=1),
        random(1, seed=2) if bias else None,
        init_std=std,
        generator=torch.Generator().manual_seed(3),
    )


def gradients(module: R2MHead) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}
