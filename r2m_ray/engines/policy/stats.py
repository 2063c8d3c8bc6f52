"""The statistics of one policy update, equal on every rank.

Axes: N rows, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from r2m_ray.engines.policy.minibatch import MiniBatch
from r2m_ray.engines.policy.objective import LossSums
from r2m_ray.engines.policy.zero import largest, total


class OldPolicySums(NamedTuple):
    """Sums over the step's sampled response tokens, under the policy π_old that they are a sample of.

    nonfinite_rows: rows with a log-prob that is not finite, under any policy; all other sums leave them out.
    kl: `log π_old − log π_ref` at temperature 1 (k1). surprisal: `−log π_old` as sampled. compared: tokens
    that the learner scored with the same weights that sampled them; over those, mismatch: |log π_old of the
    learner − of the rollout engine|, and mismatch_kl: rollout minus learner (k1).
    """

    nonfinite_rows: Tensor
    rows: Tensor
    tokens: Tensor
    kl: Tensor
    surprisal: Tensor
    compared: Tensor
    mismatch: Tensor
    mismatch_kl: Tensor


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

    def result(self, minibatches: Sequence[MiniBatch], *, unmoved: int, passes: int) -> dict[str, float]:
        """All statistics; loss, kl_loss and grad_norm are means over the optimizer steps taken.

        The first `unmoved` mini-batches were scored before any of these steps, so that their mismatch to the
        engine that sampled them is arithmetic alone; the others take no part in it.
        """
        old, mismatch_max = _old_policy(minibatches, unmoved, self.device)
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
            "mismatch_mean": float(old.mismatch / old.compared),
            "mismatch_kl": float(old.mismatch_kl / old.compared),
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
            "nonfinite_rows": float(old.nonfinite_rows),
        }


def _old_policy(
    minibatches: Sequence[MiniBatch], unmoved: int, device: torch.device
) -> tuple[OldPolicySums, float]:
    local = torch.zeros(len(OldPolicySums._fields), dtype=torch.float64, device=device)
    worst = torch.zeros((), device=device)
    for m, batch in enumerate(minibatches):
        broken_N = _broken_rows(batch)
        known_T = batch.response_T & ~broken_N[batch.row_T]
        gap = (batch.old_T - batch.rollout_T)[known_T if m < unmoved else known_T & False]
        sums = OldPolicySums(
            nonfinite_rows=broken_N.sum(),
            rows=(batch.sampled_N & ~broken_N).sum(),
            tokens=known_T.sum(),
            kl=(batch.old_unit_T - batch.reference_unit_T)[known_T].sum(),
            surprisal=-batch.old_T[known_T].sum(),
            compared=torch.tensor(gap.numel()),
            mismatch=gap.abs().sum(),
            mismatch_kl=-gap.sum(),
        )
        local += torch.stack([value.to(local) for value in sums])
        if gap.numel():
            worst = torch.maximum(worst, gap.abs().max())
    return OldPolicySums(*total(local)), float(largest(worst))


def _broken_rows(batch: MiniBatch) -> Tensor:
    """bool [N], sampled rows with a response token that has a NaN or infinite log-prob under any policy."""
    finite_T = torch.isfinite(batch.old_T + batch.old_unit_T + batch.rollout_T)
    finite_T &= torch.isfinite(batch.reference_T + batch.reference_unit_T)
    count_N = torch.zeros_like(batch.advantage_N)
    count_N.index_add_(0, batch.row_T, (batch.response_T & ~finite_T).to(count_N.dtype))
    return count_N > 0
