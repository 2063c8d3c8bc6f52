"""The R2M head: one cross-attention from the reward token embedding to the policy's hidden states, and φ.

Axes: N rows, T packed tokens (row n is `offsets[n]:offsets[n+1]`), P policy width, D reward-model width,
E attention width; B rows of about one length, padded to L states.

A row asks a single query, so keys and values of the T states need never be formed: with
`u = (H_last W_q) W_kᵀ / √E`, the scores are `h u` and the feedback is `(a h) W_v W_o`, which is Eq. 3
with its products in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from r2m_ray.core.packing import segment_sum

STATES_AT_ONCE, STATES_AT_ONCE_ON_CPU = 2**26, 2**20
"""Numbers of hidden states that are copied at a time, in float32 256 MiB and 4 MiB: an accelerator needs
large blocks to be busy, a CPU reads a block again while its caches hold it."""


def omega(step: int, total_steps: int, floor: float) -> float:
    """Weight of the original embedding, `max((cos(π t/T) + 1)/2, Ω)` (Eq. 4), for t = 0 … T.

    Training steps are t = 1 … T; evaluation uses t = T; t = 0 gives 1, the reward model untouched.
    Raises ValueError for a step outside 0 … T or a floor outside [0, 1].
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step {step} is outside 0 … total_steps = {total_steps}")
    if not 0 <= floor <= 1:
        raise ValueError(f"omega floor must be in [0, 1], got {floor}")
    return max((math.cos(math.pi * step / total_steps) + 1) / 2, floor)


@dataclass(frozen=True, slots=True)
class _Block:
    """B rows of about one length, padded to L states: row_B their numbers, token_BL where each state lies in
    the packed axis, real_BL false where a row has ended; there token_BL repeats the row's own last state."""

    row_B: Tensor
    token_BL: Tensor
    real_BL: Tensor


def _blocks(offsets: Tensor, width: int) -> Iterator[_Block]:
    """All rows that have states, in blocks of at most `STATES_AT_ONCE` numbers or of one longer row each.

    A row is padded to a multiple of 16, or of an eighth of its length where that is more. So its padding
    depends on its own length alone, and no sum runs over several rows: its numbers are the same whatever lies
    beside it.
    """
    lengths_N = offsets.diff()
    padded: dict[int, list[int]] = {}
    for row, length in enumerate(lengths_N.tolist()):
        if length:
            step = 2 ** max(4, length.bit_length() - 4)
            padded.setdefault(math.ceil(length / step) * step, []).append(row)
    order = torch.tensor([row for rows in padded.values() for row in rows], dtype=torch.int64)
    order = order.to(offsets.device)
    limit = STATES_AT_ONCE_ON_CPU if offsets.device.type == "cpu" else STATES_AT_ONCE
    start = 0
    for length, rows in padded.items():
        at_once = max(1, limit // (length * max(1, width)))
        for row_B in order[start : start + len(rows)].split(at_once):
            step_L = torch.arange(length, device=offsets.device)
            last_B1 = lengths_N[row_B, None] - 1
            token_BL = offsets[row_B, None] + torch.minimum(step_L, last_B1)
            yield _Block(row_B=row_B, token_BL=token_BL, real_BL=step_L <= last_B1)
        start += len(rows)


def attention(u_NP: Tensor, hidden_TP: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`a = softmax(h u)` over each row's states and `c = a h`, without gradients.

    Args:
        u_NP: queries in the policy's space, as `R2MHead.query` returns them.
        hidden_TP: states of any float type; a block of rows at a time is widened to u's dtype, in which all
            arithmetic is done.
        offsets: int64 [N+1].

    Returns weight_T and context_NP in u's dtype. A row without states has context 0. No row reads another's
    states, and at the widths of real models (multiples of 16) a row's result is the same to the last bit
    whatever lies beside it.
    """
    tokens = hidden_TP.shape[0]
    # What lies beyond a row's end is written behind the last token.
    weight_T = u_NP.new_empty(tokens + 1)
    context_NP = torch.zeros_like(u_NP)
    for block in _blocks(offsets, u_NP.shape[1]):
        state_BLP = _states(hidden_TP, block, u_NP.dtype)
        score_BL = torch.bmm(u_NP[block.row_B, None], state_BLP.transpose(1, 2))[:, 0]
        weight_BL = torch.softmax(score_BL.masked_fill(~block.real_BL, -torch.inf), 1)
        weight_T[torch.where(block.real_BL, block.token_BL, tokens)] = weight_BL
        context_NP[block.row_B] = torch.bmm(weight_BL[:, None], state_BLP)[:, 0]
    return weight_T[:tokens], context_NP


def _states(hidden_TP: Tensor, block: _Block, dtype: torch.dtype) -> Tensor:
    """The block's states [B, L, P]."""
    state_SP = hidden_TP.index_select(0, block.token_BL.flatten())
    return state_SP.view(*block.token_BL.shape, -1).to(dtype)


class _Attend(torch.autograd.Function):
    """`c = softmax(h u) h`, differentiable in u alone: h is data, kept as it came for the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, u_NP: Tensor, hidden_TP: Tensor, offsets: Tensor) -> Tensor:
        weight_T, context_NP = attention(u_NP, hidden_TP, offsets)
        ctx.save_for_backward(hidden_TP, offsets, weight_T)
        return context_NP

    @staticmethod
    def backward(ctx: FunctionCtx, grad_NP: Tensor) -> tuple[Tensor, None, None]:
        """`∂u = Σ_t a_t (s_t − a·s) h_t` with `s = h g`, g the gradient of c."""
        hidden_TP, offsets, weight_T = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_u_NP = torch.zeros_like(grad_NP)
        for block in _blocks(offsets, grad_NP.shape[1]):
            state_BLP = _states(hidden_TP, block, grad_NP.dtype)
            weight_BL = torch.where(block.real_BL, weight_T[block.token_BL], 0)
            slope_BL = torch.bmm(grad_NP[block.row_B, None], state_BLP.transpose(1, 2))[:, 0]
            mean_B1 = (weight_BL * slope_BL).sum(1, keepdim=True)
            descent_BL = weight_BL * (slope_BL - mean_B1)
            grad_u_NP[block.row_B] = torch.bmm(descent_BL[:, None], state_BLP)[:, 0]
        return grad_u_NP, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDiagnostics:
    """What the attention looked at. weight_T: attention per token, sums to 1 in each row. entropy_N: of those
    weights, in nats. norm_ratio_N: `‖Ĥ‖ / ‖H_last‖`. All detached."""

    weight_T: Tensor
    entropy_N: Tensor
    norm_ratio_N: Tensor


class R2MHead(nn.Module):
    """Cross-attention and scoring head, `r = φ((1−ω) Ĥ + ω H_last)` (Eqs. 3–4); all of R2M that is trained.

    policy_width P may be 0, for a run without feedback: then hidden_TP is [T, 0] and Ĥ is 0.
    score_weight ([D] or [1, D]) and score_bias (one number or None) are the reward model's own. W_q, W_k, W_v
    and W_o are drawn from N(0, init_std), W_o is 0 with wo_init "zero". Parameters are float32 whatever the
    reward model's type: at learning rates near 1e-6 bfloat16 would round most updates away.

    Raises ValueError where score_weight does not have D numbers, score_bias not one, or wo_init is unknown.
    """

    def __init__(
        self,
        policy_width: int,
        reward_width: int,
        width: int,
        score_weight: Tensor,
        score_bias: Tensor | None = None,
        *,
        wo_init: str = "random",
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if score_weight.numel() != reward_width:
            raise ValueError(
                f"score_weight {list(score_weight.shape)} must hold reward_width = {reward_width} numbers: "
                "the reward model's final layer must have one output"
            )
        if score_bias is not None and score_bias.numel() != 1:
            raise ValueError(f"score_bias must be one number, got {list(score_bias.shape)}")
        if wo_init not in ("random", "zero"):
            raise ValueError(f"wo_init must be random or zero, got {wo_init!r}")

        def drawn(rows: int, columns: int, std: float = init_std) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * std)

        self.w_q = drawn(reward_width, width)
        self.w_k = drawn(policy_width, width)
        self.w_v = drawn(policy_width, width)
        self.w_o = drawn(width, reward_width, init_std if wo_init == "random" else 0.0)
        self.score_weight = nn.Parameter(score_weight.detach().float().flatten().clone())
        self.score_bias = (
            None if score_bias is None else nn.Parameter(score_bias.detach().float().reshape(1).clone())
        )

    def query(self, rte_ND: Tensor) -> Tensor:
        """`u = H_last W_q W_kᵀ / √E`, [N, P]: the query, carried into the policy's space."""
        return (rte_ND.to(self.w_q.dtype) @ self.w_q) @ self.w_k.T / math.sqrt(self.w_q.shape[1])

    def attend(self, u_NP: Tensor, hidden_TP: Tensor, offsets: Tensor) -> Tensor:
        """`c = softmax(h u) h`, [N, P]: the only part that reads the hidden states, and it has no parameters.

        hidden_TP may be of any float type and must not require gradients.
        """
        if hidden_TP.requires_grad:
            raise ValueError("hidden_TP must be detached: the head sends no gradient to the policy")
        context_NP: Tensor = _Attend.apply(u_NP, hidden_TP, offsets)  # type: ignore[no-untyped-call]
        return context_NP

    def feedback(self, context_NP: Tensor) -> Tensor:
        """`Ĥ = c W_v W_o`, [N, D] (Eq. 3); 0 where P is 0."""
        return context_NP @ self.w_v @ self.w_o

    def score(self, embedding_ND: Tensor) -> Tensor:
        """`φ(H)`, [N]: the reward model's final layer."""
        return nn.functional.linear(embedding_ND, self.score_weight[None], self.score_bias)[:, 0]

    def output(self, rte_ND: Tensor, context_NP: Tensor, omega: float) -> Tensor:
        """`r = φ((1−ω) Ĥ + ω H_last)`, [N] (Eq. 4).

        At ω = 1 this is φ(H_last) to the last bit, and the cross-attention takes no part: its gradients are
        None.
        """
        if not 0 <= omega <= 1:
            raise ValueError(f"omega must be in [0, 1], got {omega}")
        rte_ND = rte_ND.to(self.score_weight.dtype)
        # 0·Ĥ would be NaN where Ĥ overflows.
        if omega == 1:
            return self.score(rte_ND)
        return self.score((1 - omega) * self.feedback(context_NP) + omega * rte_ND)

    def forward(self, rte_ND: Tensor, hidden_TP: Tensor, offsets: Tensor, omega: float) -> Tensor:
        """Reward of each row, [N] (Eqs. 3–4): query, attend, output."""
        return self.output(rte_ND, self.attend(self.query(rte_ND), hidden_TP, offsets), omega)

    @torch.no_grad()
    def diagnostics(self, rte_ND: Tensor, hidden_TP: Tensor, offsets: Tensor) -> HeadDiagnostics:
        """Attention per token, its entropy, and the size of Ĥ beside H_last; reads h once more."""
        weight_T, context_NP = attention(self.query(rte_ND), hidden_TP, offsets)
        smallest = torch.finfo(weight_T.dtype).tiny
        return HeadDiagnostics(
            weight_T=weight_T,
            entropy_N=segment_sum(-weight_T * weight_T.clamp(min=smallest).log(), offsets),
            norm_ratio_N=self.feedback(context_NP).norm(dim=1)
            / rte_ND.to(weight_T.dtype).norm(dim=1).clamp(min=smallest),
        )
