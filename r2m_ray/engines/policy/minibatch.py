"""One optimizer step's rows on one rank, and the shards they came from.

Axes: N rows, T packed tokens, P policy width.

A shard's number alone says which mini-batch it belongs to, on whatever rank it lies, so the content of an
optimizer step does not depend on the number of ranks. A rank may hold no shard of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_ray.config.schema import Advantage, Config
from r2m_ray.core.batch import Hidden, PolicyBatch, Trajectories
from r2m_ray.core.packing import row_index
from r2m_ray.engines.hardware import host_buffer, wait_for_copies
from r2m_ray.engines.policy.blocks import Block, Rows
from r2m_ray.engines.policy.causal import CausalScorer
from r2m_ray.engines.policy.zero import largest


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """Shards end to end, laid out once for every pass over them; tensors on the learner's device.

    order: which of the update's batches it holds. row_T: the row of each token. sampled_N: false for the
    greedy baselines of ReMax, which are no draw from the policy; rows counts the others. response_T:
    response tokens of sampled rows. rollout_T, reference_T, old_T: log-probs at the sampling temperature;
    …_unit_T: at temperature 1. Those of π_old are written by the first pass.
    """

    order: tuple[int, ...]
    blocks: tuple[Block, ...]
    tokens: int
    rows: int
    row_T: Tensor
    advantage_N: Tensor
    sampled_N: Tensor
    response_T: Tensor
    rollout_T: Tensor
    reference_T: Tensor
    reference_unit_T: Tensor
    old_T: Tensor
    old_unit_T: Tensor


def minibatches(
    batches: Sequence[PolicyBatch], shard_ids: Sequence[int], *, config: Config, scorer: CausalScorer
) -> list[MiniBatch]:
    """This rank's part of each of the step's mini-batches, the shards in ascending order."""
    algo = config.algo
    shards = algo.minibatch_prompts // algo.prompts_per_shard
    count = largest(torch.tensor(max(shard_ids, default=-1) // shards + 1, device=scorer.model.device))
    parts: list[list[int]] = [[] for _ in range(int(count))]
    for i in sorted(range(len(batches)), key=lambda i: shard_ids[i]):
        parts[shard_ids[i] // shards].append(i)
    greedy_every = algo.responses_per_prompt if algo.advantage is Advantage.remax else None
    return [_minibatch(batches, part, greedy_every, scorer) for part in parts]


def split_hidden(records: Sequence[Trajectories], hidden_TP: Tensor) -> list[Hidden]:
    """The states of records that lie end to end, as one `Hidden` each, on the CPU with memory of its own."""
    hidden = []
    for record, part in zip(records, hidden_TP.split([r.layout.tokens for r in records]), strict=True):
        host = host_buffer(part.shape, part.dtype, part.device)
        hidden.append(Hidden(layout=record.layout, hidden_TP=host.copy_(part, non_blocking=True)))
    wait_for_copies(hidden_TP.device)
    return hidden


def _minibatch(
    batches: Sequence[PolicyBatch], part: Sequence[int], greedy_every: int | None, scorer: CausalScorer
) -> MiniBatch:
    chosen = [batches[i] for i in part]
    records = [batch.trajectories for batch in chosen]
    rows, device = Rows.of(records), scorer.model.device
    sampled_N = torch.ones(rows.offsets.numel() - 1, dtype=torch.bool)
    if greedy_every:
        sampled_N[::greedy_every] = False
    row_T = row_index(rows.offsets)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0), *tensors]).to(device)

    return MiniBatch(
        order=tuple(part),
        blocks=tuple(scorer.blocks(rows)),
        tokens=rows.input_T.numel(),
        rows=int(sampled_N.sum()),
        row_T=row_T.to(device),
        advantage_N=joined([batch.advantage_N for batch in chosen]),
        sampled_N=sampled_N.to(device),
        response_T=(rows.action_T & sampled_N[row_T]).to(device),
        rollout_T=joined([record.rollout_logp_T for record in records]),
        reference_T=joined([batch.reference.tempered_T for batch in chosen]),
        reference_unit_T=joined([batch.reference.unit_T for batch in chosen]),
        old_T=torch.zeros(rows.input_T.numel(), device=device),
        old_unit_T=torch.zeros(rows.input_T.numel(), device=device),
    )
