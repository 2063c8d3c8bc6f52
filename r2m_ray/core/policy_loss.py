"""The policy's clipped objective and its KL penalty, as sums that any split of the batch leaves unchanged.

Axes: N rows, T packed tokens; row n is `offsets[n]:offsets[n+1]`. action_T is true where the label is a token
of the response; `clipped_surrogate` ignores log-probs elsewhere whatever they hold, `row_total` drops finite
ones.

Nothing here divides by the number of rows at hand. With R rows in the complete optimizer step, over all
micro-batches and ranks, the policy loss is

    loss = −(1/R) Σ_n objective_N[n]  +  (β/R) Σ_n row_total(kl_T)[n]

so each micro-batch adds its share of the two sums, divided by the global R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_ray.core.packing import row_index, segment_sum

MAX_LOG_RATIO = 20.0
RATIOS = ("sequence", "token", "geometric")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Each row's clipped objective, and detached scalar sums for the statistics.

    objective_N: to be maximised, with gradients. units: number of ratios, one per row or per response token.
    ratio: their sum; ratio_max: the largest of them, 0 of none. clipped_low, clipped_high: units whose
    gradient the lower or the upper clip removed. approx_kl: Σ over response tokens of the k3 estimate of
    KL(π_old‖π_θ). tokens: response tokens. Counts are in the log-probs' dtype.
    """

    objective_N: Tensor
    units: Tensor
    ratio: Tensor
    ratio_max: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    approx_kl: Tensor
    tokens: Tensor


def row_total(
    value_T: Tensor, action_T: Tensor, offsets: Tensor, token_scale_N: Tensor | None = None
) -> Tensor:
    """`scale_n · Σ_t value_t` over each row's response tokens, [N]; the scale is 1 where not given."""
    total_N = segment_sum(torch.where(action_T, value_T, 0), offsets)
    return total_N if token_scale_N is None else total_N * token_scale_N


def mean_token_scale(action_T: Tensor, offsets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`1 / response tokens` of each row, [N], which makes `row_total` a mean; 0 for a row without any."""
    count_N = segment_sum(action_T.to(dtype), offsets)
    return torch.where(count_N > 0, 1 / count_N.clamp(min=1), 0)


def importance_ratio(
    logp_T: Tensor, old_logp_T: Tensor, action_T: Tensor, offsets: Tensor, *, ratio: str
) -> Tensor:
    """`ρ = exp(log ρ)` of each unit; log ρ is Σ_t δ_t [N] for "sequence" (Eq. 2 as the paper writes it), the
    mean δ_t [N] for "geometric" (GSPO, arXiv:2507.18071), and δ_t [T] for "token".

    `δ_t = logp_t − old_logp_t` on response tokens, 0 elsewhere. log ρ is clamped to ±20 (ρ ≤ 4.9e8): the sum
    over a long row can exceed the 88 at which float32 overflows, and the clipped minimum would then multiply
    an infinite gradient by 0. Raises ValueError for other names.
    """
    delta_T = torch.where(action_T, logp_T - old_logp_T, 0)
    match ratio:
        case "token":
            log_ratio = delta_T
        case "sequence":
            log_ratio = row_total(delta_T, action_T, offsets)
        case "geometric":
            scale_N = mean_token_scale(action_T, offsets, delta_T.dtype)
            log_ratio = row_total(delta_T, action_T, offsets, scale_N)
        case _:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {ratio!r}")
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_surrogate(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage_N: Tensor,
    action_T: Tensor,
    offsets: Tensor,
    *,
    ratio: str,
    clip_low: float,
    clip_high: float,
    token_scale_N: Tensor | None = None,
    weight: Tensor | None = None,
) -> Surrogate:
    """`min(ρA, clip(ρ, 1−clip_low, 1+clip_high)·A)` of each row (Eq. 2).

    With ratio "sequence" or "geometric" a row has one ρ, and its objective is the minimum itself. With
    "token" every response token has one, and `objective_n = scale_n Σ_t min(ρ_t A_n, clip(ρ_t) A_n)`:

    - GRPO, each row's mean: scale_n = 1/tokens of row n, the default (`mean_token_scale`);
    - Dr. GRPO, no length bias: scale_n = 1/max response tokens;
    - one mean over all tokens of the step: scale_n = R/all tokens, with R the rows of the step.

    token_scale_N is not read by the row ratios. `weight` [N] or [T] multiplies each unit; it must be detached
    and non-negative.
    """
    ratios = importance_ratio(logp_T, old_logp_T, action_T, offsets, ratio=ratio)
    per_token = ratio == "token"
    advantage = advantage_N[row_index(offsets)] if per_token else advantage_N
    plain = ratios * advantage
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective = torch.minimum(plain, clipped)
    if weight is not None:
        objective = objective * weight
    if per_token:
        if token_scale_N is None:
            token_scale_N = mean_token_scale(action_T, offsets, logp_T.dtype)
        objective = row_total(objective, action_T, offsets, token_scale_N)
    unit = action_T if per_token else torch.ones_like(advantage_N, dtype=torch.bool)
    lost = unit & (clipped < plain)
    counted = torch.where(unit, ratios.detach(), 0)
    old_to_new_T = kl_penalty(old_logp_T.detach(), logp_T.detach(), "k3")
    return Surrogate(
        objective_N=objective,
        units=unit.sum().to(logp_T.dtype),
        ratio=counted.sum(),
        ratio_max=torch.cat([counted, counted.new_zeros(1)]).amax(),
        clipped_low=(lost & (advantage < 0)).sum().to(logp_T.dtype),
        clipped_high=(lost & (advantage > 0)).sum().to(logp_T.dtype),
        approx_kl=torch.where(action_T, old_to_new_T, 0).sum(),
        tokens=action_T.sum().to(logp_T.dtype),
    )


def kl_penalty(logp_T: Tensor, ref_logp_T: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(π_θ‖π_ref) at each sampled token, with `Δ = logp − ref_logp`, any shape.

    - k1 `Δ`: unbiased, either sign. Its gradient in a loss has expectation 0, so it penalises nothing there:
      use it for reports, or inside the reward.
    - k2 `Δ²/2`: biased in value; its gradient `Δ ∇logp` is, on policy, that of KL(π_θ‖π_ref).
    - k3 `e^−Δ − 1 + Δ`: unbiased, never negative, low variance; its gradient `(1 − e^−Δ) ∇logp` is, on
      policy, that of KL(π_ref‖π_θ), which agrees with the former to first order in Δ.

    k2 and k3 clamp Δ to ±20: e^−Δ overflows float32 at −88, and one token that the reference finds e^20 times
    likelier would outweigh every other gradient of the step. Raises ValueError for other names.
    """
    delta_T = logp_T - ref_logp_T
    bounded_T = delta_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return delta_T
        case "k2":
            return bounded_T.square() / 2
        case "k3":
            return torch.expm1(-bounded_T) + bounded_T
    raise ValueError(f"estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")


def row_kl(logp_T: Tensor, ref_logp_T: Tensor, action_T: Tensor, offsets: Tensor, estimator: str) -> Tensor:
    """`Σ_t kl_penalty(logp_t, ref_logp_t)` over each row's response tokens, float32 [N].

    With k1 and the log-probs of the policy that sampled, the expectation is the KL of complete responses; β
    times the sum, subtracted from the reward, gives the same expected gradient as the KL of Eq. 2.
    """
    return row_total(kl_penalty(logp_T, ref_logp_T, estimator), action_T, offsets)
