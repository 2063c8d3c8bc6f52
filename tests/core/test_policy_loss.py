from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from heads import packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.packing import select_rows
from r2m_ray.core.policy_loss import (
    Surrogate,
    clipped_surrogate,
    importance_ratio,
    kl_penalty,
    mean_token_scale,
    row_total,
)

# Three rows: a prompt token each, then ratios 1.5 and 1.1, then 0.5, then 1.5.
LENGTHS = (3, 2, 2)
ACTION_T = torch.tensor([False, True, True, False, True, False, True])
DELTA_T = torch.tensor([9.0, math.log(1.5), math.log(1.1), 9.0, math.log(0.5), 9.0, math.log(1.5)]).double()
OLD_T = torch.linspace(-3, -0.5, 7, dtype=torch.float64)
ADVANTAGE_N = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)


def clipped(logp_T: Tensor, ratio: str, **changes: Any) -> Surrogate:
    """The surrogate of these three rows, or of what the changes say, clipped at 0.2."""
    arguments = {
        "old_logp_T": OLD_T,
        "advantage_N": ADVANTAGE_N,
        "action_T": ACTION_T,
        "offsets": packed(LENGTHS),
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    return clipped_surrogate(logp_T, ratio=ratio, **(arguments | changes))


def surrogate(ratio: str, **options: Tensor) -> tuple[Surrogate, list[float]]:
    """The same, and its slope."""
    logp_T = (OLD_T + DELTA_T).requires_grad_()
    result = clipped(logp_T, ratio, **options)
    return result, torch.autograd.grad(result.objective_N.sum(), logp_T)[0].tolist()


def counts(result: Surrogate) -> tuple[float, ...]:
    counted = (result.units, result.clipped_low, result.clipped_high, result.tokens)
    return tuple(count.item() for count in counted)


def test_sequence_ratio_by_hand() -> None:
    result, slope = surrogate("sequence")
    # ρ = 1.65, 0.5, 1.5 against advantages 2, −1, −1: only the last is outside the clip on its cheap side.
    assert result.objective_N.tolist() == pytest.approx([2.4, -0.8, -1.5])
    assert slope == pytest.approx([0, 0, 0, 0, 0, 0, -1.5])
    assert counts(result) == (3, 1, 1, 4)
    assert result.ratio.item() == pytest.approx(1.65 + 0.5 + 1.5)
    assert result.ratio_max.item() == pytest.approx(1.65)


def test_geometric_ratio_by_hand() -> None:
    result, slope = surrogate("geometric")
    assert result.ratio.item() == pytest.approx(math.sqrt(1.65) + 0.5 + 1.5)
    assert result.objective_N.tolist() == pytest.approx([2.4, -0.8, -1.5])
    assert slope == pytest.approx([0, 0, 0, 0, 0, 0, -1.5])


def test_token_ratio_by_hand() -> None:
    result, slope = surrogate("token")
    assert result.objective_N.tolist() == pytest.approx([(2.4 + 2.2) / 2, -0.8, -1.5])
    assert slope == pytest.approx([0, 0, 2.2 / 2, 0, 0, 0, -1.5])
    assert counts(result) == (4, 1, 1, 4)
    assert result.ratio.item() == pytest.approx(1.5 + 1.1 + 0.5 + 1.5)
    assert result.ratio_max.item() == pytest.approx(1.5)


def test_constant_token_scale_by_hand() -> None:
    result, slope = surrogate("token", token_scale_N=torch.full((3,), 1 / 8, dtype=torch.float64))
    assert result.objective_N.tolist() == pytest.approx([(2.4 + 2.2) / 8, -0.8 / 8, -1.5 / 8])
    assert slope[2] == pytest.approx(2.2 / 8)


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
def test_approximate_kl_by_hand(ratio: str) -> None:
    expected = sum(rho - 1 - math.log(rho) for rho in (1.5, 1.1, 0.5, 1.5))
    assert surrogate(ratio)[0].approx_kl.item() == pytest.approx(expected)


def test_clip_bounds_are_separate() -> None:
    result = clipped(OLD_T + DELTA_T, "sequence", clip_low=0.4, clip_high=0.3)
    assert result.objective_N.tolist() == pytest.approx([2.6, -0.6, -1.5])


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
def test_on_policy_the_gradient_is_that_of_reinforce(ratio: str) -> None:
    logp_T = OLD_T.clone().requires_grad_()
    result = clipped(logp_T, ratio)
    assert result.objective_N.tolist() == pytest.approx(ADVANTAGE_N.tolist())
    first = 2.0 if ratio == "sequence" else 1.0
    slope = torch.autograd.grad(result.objective_N.sum(), logp_T)[0]
    assert slope.tolist() == pytest.approx([0, first, first, 0, -1, 0, -1])
    assert counts(result)[1:3] == (0, 0)
    assert result.approx_kl.item() == 0


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
@pytest.mark.parametrize("garbage", [math.nan, -math.inf, 1e30])
def test_prompt_tokens_are_never_read(ratio: str, garbage: float) -> None:
    clean, clean_slope = surrogate(ratio)
    logp_T = torch.where(ACTION_T, OLD_T + DELTA_T, garbage).requires_grad_()
    dirty = clipped(logp_T, ratio)
    assert torch.equal(dirty.objective_N, clean.objective_N)
    assert dirty.approx_kl == clean.approx_kl
    assert torch.autograd.grad(dirty.objective_N.sum(), logp_T)[0].tolist() == clean_slope


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
@pytest.mark.parametrize("delta", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_far_policies_stay_finite_in_float32(ratio: str, delta: float, advantage: float) -> None:
    logp_T = torch.full((4,), delta, requires_grad=True)
    result = clipped(
        logp_T,
        ratio,
        old_logp_T=torch.zeros(4),
        advantage_N=torch.tensor([advantage]),
        action_T=torch.ones(4, dtype=torch.bool),
        offsets=packed([4]),
    )
    assert result.objective_N.isfinite().all()
    assert torch.autograd.grad(result.objective_N.sum(), logp_T)[0].isfinite().all()


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
def test_a_row_without_response_adds_nothing(ratio: str) -> None:
    logp_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    result = clipped(
        logp_T,
        ratio,
        old_logp_T=torch.tensor([-1.5, -1.5]),
        advantage_N=torch.zeros(2),
        action_T=torch.zeros(2, dtype=torch.bool),
        offsets=packed([2, 0]),
    )
    assert result.objective_N.tolist() == [0, 0]
    assert torch.autograd.grad(result.objective_N.sum(), logp_T)[0].tolist() == [0, 0]
    assert (result.tokens.item(), result.approx_kl.item()) == (0, 0)


@settings(deadline=None, max_examples=30)
@given(
    ratio=st.sampled_from(["sequence", "token", "geometric"]),
    seed=st.integers(0, 99),
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
)
def test_microbatches_add_up_to_the_whole(ratio: str, seed: int, order: list[int], cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = packed([4, 1, 7, 3, 5, 2])
    logp_T = torch.randn(22, dtype=torch.float64, generator=generator).requires_grad_()
    old_T = logp_T.detach() + 0.3 * torch.randn(22, dtype=torch.float64, generator=generator)
    ref_T = torch.randn(22, dtype=torch.float64, generator=generator)
    action_T = torch.rand(22, generator=generator) < 0.7
    advantage_N = torch.randn(6, dtype=torch.float64, generator=generator)

    def loss(rows: Sequence[int]) -> Tensor:
        index, selected = select_rows(offsets, rows)
        part = clipped(
            logp_T[index],
            ratio,
            old_logp_T=old_T[index],
            advantage_N=advantage_N[list(rows)],
            action_T=action_T[index],
            offsets=selected,
        )
        kl_T = kl_penalty(logp_T[index], ref_T[index], "k3")
        return (0.04 * row_total(kl_T, action_T[index], selected) - part.objective_N).sum() / 6

    whole, split = loss(range(6)), loss(order[:cut]) + loss(order[cut:])
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(
        torch.autograd.grad(split, logp_T)[0], torch.autograd.grad(whole, logp_T, retain_graph=True)[0]
    )


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
def test_gradcheck_away_from_the_clip(ratio: str) -> None:
    def objective(logp_T: Tensor) -> Tensor:
        return clipped(logp_T, ratio).objective_N

    assert torch.autograd.gradcheck(objective, ((OLD_T + DELTA_T).requires_grad_(),))
    assert torch.autograd.gradcheck(objective, ((OLD_T + 0.01 * DELTA_T).requires_grad_(),))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ("token", [1, 1.5, 1.1, 1, 0.5, 1, 1.5]),
        ("sequence", [1.65, 0.5, 1.5]),
        ("geometric", [math.sqrt(1.65), 0.5, 1.5]),
    ],
)
def test_importance_ratios_by_hand(ratio: str, expected: list[float]) -> None:
    ratios = importance_ratio(OLD_T + DELTA_T, OLD_T, ACTION_T, packed(LENGTHS), ratio=ratio)
    assert ratios.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])
def test_weights_scale_each_unit_and_its_gradient(ratio: str) -> None:
    plain, plain_slope = surrogate(ratio)
    units = 7 if ratio == "token" else 3
    weighted, slope = surrogate(ratio, weight=torch.full((units,), 0.5, dtype=torch.float64))
    assert weighted.objective_N.tolist() == pytest.approx((plain.objective_N / 2).tolist())
    assert slope == pytest.approx([value / 2 for value in plain_slope])
    assert counts(weighted) == counts(plain)


def test_row_totals_by_hand() -> None:
    value_T = torch.tensor([9.0, 1, 2, 9, 4, 9, 8])
    offsets = packed(LENGTHS)
    assert row_total(value_T, ACTION_T, offsets).tolist() == [3, 4, 8]
    scale_N = mean_token_scale(ACTION_T, offsets)
    assert scale_N.tolist() == [0.5, 1, 1]
    assert row_total(value_T, ACTION_T, offsets, scale_N).tolist() == [1.5, 4, 8]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="ratio must be one of sequence, token, geometric"):
        importance_ratio(OLD_T, OLD_T, ACTION_T, packed(LENGTHS), ratio="row")
    with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3"):
        kl_penalty(OLD_T, OLD_T, "k4")
