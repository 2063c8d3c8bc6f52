"""KL of whole rows to the reference, for a penalty that is part of the reward.

Axes: N rows, T packed tokens; row n is `offsets[n]:offsets[n+1]`.
"""

from __future__ import annotations

from torch import Tensor

from r2m_ray.core.policy_loss import kl_penalty, row_total


def row_kl(logp_T: Tensor, ref_logp_T: Tensor, action_T: Tensor, offsets: Tensor, estimator: str) -> Tensor:
    """`Σ_t kl_penalty(logp_t, ref_logp_t)` over each row's response tokens, float32 [N].

    logp_T: log-probs under the policy that sampled the rows; ref_logp_T: under π_ref, same temperature.
    With k1 the sum is `log π_old(y|x) − log π_ref(y|x)`, whose expectation is the KL of whole responses; β
    times it, subtracted from the reward, gives the same expected gradient as the KL of Eq. 2.
    Raises ValueError for an estimator other than k1, k2 and k3.
    """
    return row_total(kl_penalty(logp_T, ref_logp_T, estimator), action_T, offsets)
