"""Shards for the reward engine, and Equations 3 and 4 written out.

Axes as in the package: K rows per group, N rows, T packed tokens, P policy width, D reward width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch
from r2m_ray.core.head import R2MHead

P, D, K = 64, 48, 4


def states(layout: Layout, *, seed: int = 0, width: int = P) -> Hidden:
    values = torch.randn(layout.tokens, width, generator=torch.Generator().manual_seed(seed))
    return Hidden(layout=layout, hidden_TP=values)


def random_batch(seed: int, *, groups: int = 2, size: int = K, width: int = P, tied: int = 0) -> RewardBatch:
    """A shard with made-up embeddings and rewards, rows of 1 … 12 tokens, all responses distinct.

    tied: the rows of so many groups, the first ones, are one and the same row.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, equal = groups * size, tied * size
    length_N = torch.randint(1, 13, (rows,), generator=generator)
    length_N[:equal] = 5
    layout = Layout.from_lengths(length_N.tolist(), size)
    annotation = Annotation(
        layout=layout,
        reward_N=torch.randn(rows, generator=generator),
        frozen_reward_N=torch.randn(rows, generator=generator),
        rte_ND=torch.randn(rows, D, generator=generator),
        gold_N=torch.randn(rows, generator=generator),
        response_id_N=torch.arange(rows),
    )
    hidden = states(layout, seed=seed, width=width)
    annotation.rte_ND[:equal] = annotation.rte_ND[0].clone()
    annotation.response_id_N[:equal] = 0
    hidden.hidden_TP[: 5 * equal] = hidden.hidden_TP[:5].repeat(equal, 1)
    return RewardBatch(hidden=hidden, annotation=annotation)


def with_hidden(batch: RewardBatch, hidden_TP: Tensor) -> RewardBatch:
    return replace(batch, hidden=replace(batch.hidden, hidden_TP=hidden_TP))


def broken_at(hidden: Hidden, token: int, value: float = math.nan) -> Hidden:
    """The hidden states with one feature of a token replaced by a value that is not finite."""
    hidden_TP = hidden.hidden_TP.clone()
    hidden_TP[token, 5] = value
    return replace(hidden, hidden_TP=hidden_TP)


def with_annotation(batch: RewardBatch, **fields: Tensor) -> RewardBatch:
    return replace(batch, annotation=replace(batch.annotation, **fields))


def literal_rewards(head: R2MHead, rte_ND: Tensor, hidden: Hidden, omega: float) -> Tensor:
    """The reward in float64 with keys and values formed as Equations 3 and 4 of the paper write them."""
    w = {name: value.detach().double() for name, value in head.named_parameters()}
    rewards = []
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)].double()
        last = rte_ND[n].double()
        scores = (last @ w["w_q"]) @ (h @ w["w_k"]).T / math.sqrt(w["w_q"].shape[1])
        feedback = torch.softmax(scores, 0) @ (h @ w["w_v"]) @ w["w_o"]
        rewards.append(((1 - omega) * feedback + omega * last) @ w["score_weight"])
    return torch.stack(rewards)


def parameters(head: R2MHead) -> dict[str, Tensor]:
    """A copy of the head's parameters."""
    return {name: value.detach().clone() for name, value in head.named_parameters()}
