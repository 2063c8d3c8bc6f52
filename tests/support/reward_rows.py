"""Shards for the reward engine, and the literal form of what it computes.

Axes as in the package: G groups, K rows per group, N rows, T packed tokens, P policy width, D reward width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch
from r2m_ray.core.head import R2MHead

P, D, K = 64, 48, 4


def make_states(layout: Layout, *, seed: int, width: int = P) -> Hidden:
    values = torch.randn(layout.tokens, width, generator=torch.Generator().manual_seed(seed))
    return Hidden(layout=layout, hidden_TP=values)


def make_batch(seed: int, *, groups: int = 2, size: int = K, width: int = P) -> RewardBatch:
    """A shard with made-up embeddings and rewards, rows of 1 … 12 tokens, all responses distinct."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, 13, (rows,), generator=generator).tolist()
    layout = Layout.from_lengths(lengths, size)
    annotation = Annotation(
        layout=layout,
        reward_N=torch.randn(rows, generator=generator),
        frozen_reward_N=torch.randn(rows, generator=generator),
        rte_ND=torch.randn(rows, D, generator=generator),
        gold_N=torch.randn(rows, generator=generator),
        response_id_N=torch.arange(rows),
    )
    return RewardBatch(hidden=make_states(layout, seed=seed, width=width), annotation=annotation)


def with_equal_rows(batch: RewardBatch, rows: int) -> RewardBatch:
    """The batch with its first rows equal: the same 5 states, embedding and response."""
    lengths = batch.hidden.layout.lengths.clone()
    lengths[:rows] = 5
    layout = Layout.from_lengths(lengths.tolist(), batch.hidden.layout.group_size)
    hidden_TP = make_states(layout, seed=0).hidden_TP
    hidden_TP[: 5 * rows] = hidden_TP[:5].repeat(rows, 1)
    rte_ND, response_id_N = batch.annotation.rte_ND.clone(), batch.annotation.response_id_N.clone()
    rte_ND[:rows], response_id_N[:rows] = rte_ND[0].clone(), 0
    annotation = replace(batch.annotation, layout=layout, rte_ND=rte_ND, response_id_N=response_id_N)
    return RewardBatch(hidden=Hidden(layout=layout, hidden_TP=hidden_TP), annotation=annotation)


def with_nan(batch: RewardBatch, token: int) -> RewardBatch:
    """The batch with a NaN in one hidden state."""
    hidden_TP = batch.hidden.hidden_TP.clone()
    hidden_TP[token, 5] = math.nan
    return replace(batch, hidden=replace(batch.hidden, hidden_TP=hidden_TP))


def literal_rewards(head: R2MHead, rte_ND: Tensor, hidden: Hidden, omega: float) -> Tensor:
    """The reward in float64 with keys and values formed as the paper writes them."""
    w = {name: value.detach().double() for name, value in head.named_parameters()}
    rewards = []
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)].double()
        last = rte_ND[n].double()
        scores = (last @ w["w_q"]) @ (h @ w["w_k"]).T / math.sqrt(w["w_q"].shape[1])
        feedback = torch.softmax(scores, 0) @ (h @ w["w_v"]) @ w["w_o"]
        rewards.append(((1 - omega) * feedback + omega * last) @ w["score_weight"])
    return torch.stack(rewards)
