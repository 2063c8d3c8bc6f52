"""The statistics of one policy update, equal on every rank.

Axes: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from r2m_ray.models.minibatch import MiniBatch
from r2m_ray.models.objective import LossSums


class OldPolicySums(NamedTuple):
    """Sums over the step's sampled response tokens, under the policy π_old that they are a sample of.

    kl: `log π_old − log π_ref` at temperature 1 (k1). surprisal: `−log π_old` as sampled. mismatch:
    |log π_old of the learner − of the rollout engine|; mismatch_kl: rollout minus learner (k1).
    """

    rows: Tensor
    tokens: Tensor
    kl: Tensor
    surprisal: Tensor
    mismatch: Tensor
    mismatch_kl: Tensor


def total(value: Tensor) -> Tensor:
    """Sum over ranks."""
    dist.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """Maximum over ranks."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


@dataclass(slots=True)
class UpdateStats:
    """Accumulates an update; steps that were skipped only count as such."""

    device: torch.device
    applied: int = 0
    skipped: int = 0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    sums: Tensor = field(init=False)
    ratio_max: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=self.device)
        self.ratio_max = torch.zeros((), device=self.device)

    def count(
        self, applied: bool, sums: Tensor, ratio_max: Tensor, grad_norm: float, learning_rate: float
    ) -> None:
        """Count one optimizer step with its `LossSums` [8] and its largest ratio."""
        if not applied:
            self.skipped += 1
            return
        self.applied += 1
        self.sums += sums
        self.ratio_max = torch.maximum(self.ratio_max, ratio_max)
        self.grad_norm += grad_norm
        self.learning_rate = learning_rate

    def result(self, minibatches: Sequence[MiniBatch], *, passes: int) -> dict[str, float]:
        """All statistics; loss, kl_loss and grad_norm are means over the optimizer steps taken."""
        old, mismatch_max = _old_policy(minibatches, self.device)
        sums = LossSums(*total(self.sums).tolist())
        steps = max(1, self.applied)
        units, passed = max(1.0, float(sums.units)), max(1.0, float(sums.tokens))
        return {
            "loss": float(sums.loss) / steps,
            "policy_loss": float(sums.loss - sums.kl_loss) / steps,
            "kl_loss": float(sums.kl_loss) / steps,
            "kl_token": float(old.kl / old.tokens),
            "kl_sequence": float(old.kl / old.rows),
            "entropy": float(old.surprisal / old.tokens),
            "mismatch_mean": float(old.mismatch / old.tokens),
            "mismatch_kl": float(old.mismatch_kl / old.tokens),
            "mismatch_max": mismatch_max,
            "ratio_mean": float(sums.ratio) / units,
            "ratio_max": float(largest(self.ratio_max)),
            "clip_fraction_low": float(sums.clipped_low) / units,
            "clip_fraction_high": float(sums.clipped_high) / units,
            "old_kl": float(sums.old_kl) / passed,
            "grad_norm": self.grad_norm / steps,
            "learning_rate": self.learning_rate,
            "tokens": float(old.tokens),
            "microbatches": float(passes),
            "optimizer_steps": float(self.applied),
            "skipped_steps": float(self.skipped),
        }


def _old_policy(minibatches: Sequence[MiniBatch], device: torch.device) -> tuple[OldPolicySums, float]:
    local = torch.zeros(len(OldPolicySums._fields), dtype=torch.float64, device=device)
    worst = torch.zeros((), device=device)
    for batch in minibatches:
        old, rollout = batch.old_T[batch.response_T], batch.rollout_T[batch.response_T]
        gap = old - rollout
        sums = OldPolicySums(
            rows=torch.tensor(batch.rows),
            tokens=batch.response_T.sum(),
            kl=(batch.old_unit_T - batch.reference_unit_T)[batch.response_T].sum(),
            surprisal=-old.sum(),
            mismatch=gap.abs().sum(),
            mismatch_kl=-gap.sum(),
        )
        local += torch.stack([value.to(local) for value in sums])
        if gap.numel():
            worst = torch.maximum(worst, gap.abs().max())
    return OldPolicySums(*total(local)), float(largest(worst))
