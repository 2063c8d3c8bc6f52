"""All that the driver reads of a batch: numbers per row.

Axes: N rows of the batch, shard after shard; G groups (prompts), K rows per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from r2m_ray.core.batch import ReferenceKL, SampledRows, SamplePlan, Scores
from r2m_ray.errors import printable
from r2m_ray.run.vocabulary import TOTAL

PROMPT_SHOWN = 60
"""Characters of a prompt that a message shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The numbers of a batch.

    group_size: K. shard_sizes: rows of each shard. tokens: input tokens of all rows. Tensors are [N] and as
    in `SampledRows`, `Scores` and `ReferenceKL`. gold: float64 [N] by part of the gold score, if any.
    """

    group_size: int
    shard_sizes: tuple[int, ...]
    tokens: int
    length_N: Tensor
    truncated_N: Tensor
    finite_N: Tensor
    reward_N: Tensor
    frozen_reward_N: Tensor
    response_id_N: Tensor
    kl_N: Tensor
    kl_penalty_N: Tensor
    gold: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        sampled: Sequence[SampledRows],
        scores: Sequence[Scores],
        kl: Sequence[ReferenceKL],
        *,
        group_size: int,
    ) -> Rows:
        """The rows of all shards, in their order."""
        return cls(
            group_size=group_size,
            shard_sizes=tuple(len(shard.length_N) for shard in sampled),
            tokens=sum(shard.tokens for shard in sampled),
            length_N=torch.cat([shard.length_N for shard in sampled]),
            truncated_N=torch.cat([shard.truncated_N for shard in sampled]),
            finite_N=torch.cat([shard.finite_N for shard in sampled]),
            reward_N=torch.cat([shard.reward_N for shard in scores]),
            frozen_reward_N=torch.cat([shard.frozen_reward_N for shard in scores]),
            response_id_N=torch.cat([shard.response_id_N for shard in scores]),
            kl_N=torch.cat([shard.sampled_N for shard in kl]),
            kl_penalty_N=torch.cat([shard.penalty_N for shard in kl]),
            gold={part: torch.cat([shard.gold[part] for shard in scores]) for part in scores[0].gold},
        )

    @property
    def gold_N(self) -> Tensor:
        """float64 [N], the gold score; NaN where the task knows none."""
        unknown_N = torch.full((len(self.reward_N),), torch.nan, dtype=torch.float64)
        return self.gold[TOTAL] if self.gold else unknown_N

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers here."""
        tensors = [value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.gold.values()))

    def grouped(self, value_N: Tensor) -> Tensor:
        """Per-row values as float64 [G, K]: sums over many rows must not lose digits."""
        return value_N.double().view(-1, self.group_size)

    def broken(self, plans: Sequence[SamplePlan]) -> list[str]:
        """A label of each row whose reward or sampled log-prob is not finite, safe to print."""
        broken_N = ~(torch.isfinite(self.reward_N + self.frozen_reward_N) & self.finite_N)
        prompts = [prompt.text for plan in plans for prompt in plan.prompts]
        return [
            f"row {n}, prompt '{printable(prompts[n // self.group_size][:PROMPT_SHOWN])}'"
            for n in broken_N.nonzero()[:, 0].tolist()
        ]
