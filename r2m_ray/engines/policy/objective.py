"""The learner's loss on one block of rows, and what it measures on the way.

Axes: N rows of the block, A their response tokens; offsets [N+1] says which belong to each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r2m_ray.config.schema import Advantage, Config, KLPlace, OldLogprobs, Ratio
from r2m_ray.core.policy_loss import (
    clipped_surrogate,
    importance_ratio,
    kl_penalty,
    mean_token_scale,
    row_total,
)


class LossSums(NamedTuple):
    """Sums over a block, detached scalars that add up over blocks and ranks.

    loss and kl_loss are already divided by the optimizer step's rows; units are ratios, one per row or per
    response token; old_kl is Σ_t k3 of KL(π_old‖π_θ).
    """

    loss: Tensor
    kl_loss: Tensor
    units: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    old_kl: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Eq. 2 with the run's numbers: what a configuration says about the loss.

    importance_cap: None unless another engine's log-probs are corrected for. fixed_length: Dr. GRPO's divisor
    of a row's token sum, None for the others.
    """

    ratio: Ratio
    clip_low: float
    clip_high: float
    kl_weight: float
    kl_estimator: str
    importance_cap: float | None
    fixed_length: int | None

    @classmethod
    def of(cls, config: Config) -> Objective:
        algo = config.algo
        return cls(
            ratio=algo.ratio,
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            kl_weight=algo.kl_weight if algo.kl_place is KLPlace.loss else 0.0,
            kl_estimator=algo.kl_estimator.value,
            importance_cap=algo.importance_cap if algo.old_logp is OldLogprobs.rollout else None,
            fixed_length=config.task.max_new_tokens if algo.advantage is Advantage.dr_grpo else None,
        )

    def loss(
        self,
        logp_A: Tensor,
        *,
        old_A: Tensor,
        rollout_A: Tensor,
        reference_A: Tensor,
        advantage_N: Tensor,
        sampled_N: Tensor,
        offsets: Tensor,
        rows: int,
    ) -> tuple[Tensor, LossSums, Tensor]:
        """The block's share of the loss, its sums, and its largest ratio.

        `loss = (1/R) Σ_n [ −w·min(ρA, clip(ρ)A) + β Σ_t s_n·KL_t ]` (Eq. 2), R = `rows` that the
        complete optimizer step samples. The KL of a row is the sum over its tokens (s = 1) with the ratio
        "sequence", and is scaled like the surrogate with the two others. With `importance_cap` the weight is
        `w = min(π_old/π_rollout, cap)`, both of the same weights but of other engines; else 1. Rows outside
        `sampled_N` have no KL: they are no draw from the policy. Where any log-prob is not finite, the loss
        is NaN.
        """
        action_A = torch.ones_like(logp_A, dtype=torch.bool)
        ratio = self.ratio.value
        scale_N = self._token_scale(action_A, offsets)
        weight = None
        if self.importance_cap is not None:
            weight = importance_ratio(old_A, rollout_A, action_A, offsets, ratio=ratio)
            weight = weight.clamp(max=self.importance_cap)
        surrogate = clipped_surrogate(
            logp_A,
            old_A,
            advantage_N,
            action_A,
            offsets,
            ratio=ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            token_scale_N=scale_N,
            weight=weight,
        )
        loss = -surrogate.objective_N.sum() / rows
        kl_loss = torch.zeros_like(loss)
        if self.kl_weight:
            kl_A = kl_penalty(logp_A, reference_A, self.kl_estimator)
            kl_N = row_total(kl_A, action_A, offsets, scale_N)
            kl_loss = self.kl_weight / rows * (kl_N * sampled_N).sum()
        # A step on rows with a log-prob that is not finite must be skipped, although clamped ratios hide an
        # infinity and not every loss reads every log-prob.
        total = loss + kl_loss + 0 * (logp_A.detach() + old_A + rollout_A + reference_A).sum()
        sums = LossSums(
            loss=total.detach(),
            kl_loss=kl_loss.detach(),
            units=surrogate.units,
            ratio=surrogate.ratio,
            clipped_low=surrogate.clipped_low,
            clipped_high=surrogate.clipped_high,
            old_kl=surrogate.approx_kl,
            tokens=surrogate.tokens,
        )
        return total, sums, surrogate.ratio_max

    def _token_scale(self, action_A: Tensor, offsets: Tensor) -> Tensor | None:
        if self.ratio is Ratio.sequence:
            return None
        if self.ratio is Ratio.token and self.fixed_length is not None:
            return torch.full_like(offsets[1:], 1.0 / self.fixed_length, dtype=torch.float32)
        return mean_token_scale(action_A, offsets)
