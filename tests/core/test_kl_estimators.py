from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.policy_loss import kl_penalty, row_kl

OFFSETS = torch.tensor([0, 3, 5])
ACTION_T = torch.tensor([False, True, True, False, True])


def policies() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.log_softmax(torch.randn(6, dtype=torch.float64, generator=generator), 0)
    return logits, torch.log_softmax(logits, 0), reference


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    _, logp, reference = policies()
    kl = (logp.exp() * (logp - reference)).sum()
    torch.testing.assert_close((logp.exp() * kl_penalty(logp, reference, estimator)).sum(), kl)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradient_of_each_estimator(estimator: str) -> None:
    logits, logp, reference = policies()
    sampled = (logp.exp().detach() * kl_penalty(logp, reference, estimator)).sum()
    slope = torch.autograd.grad(sampled, logits, retain_graph=True)[0]
    target = {
        "k1": 0 * logits.sum(),
        "k2": (logp.exp() * (logp - reference)).sum(),
        "k3": (reference.exp() * (reference - logp)).sum(),
    }[estimator]
    torch.testing.assert_close(slope, torch.autograd.grad(target, logits)[0], rtol=1e-7, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e4, 1e4, width=32))
def test_k2_and_k3_are_never_negative_and_always_finite(delta: float) -> None:
    logp = torch.tensor(delta, requires_grad=True)
    for estimator in ("k2", "k3"):
        value = kl_penalty(logp, torch.tensor(0.0), estimator)
        # e^−Δ − 1 and Δ cancel to within one rounding of Δ.
        assert value.item() >= -1e-7 * abs(delta)
        assert value.isfinite()
        assert torch.autograd.grad(value, logp)[0].isfinite()


def test_estimators_by_hand() -> None:
    logp, reference = torch.tensor([-1.0, -1.0, -2.0]).double(), torch.tensor([-1.0, -2.0, -1.0]).double()
    assert kl_penalty(logp, reference, "k1").tolist() == [0, 1, -1]
    assert kl_penalty(logp, reference, "k2").tolist() == [0, 0.5, 0.5]
    assert kl_penalty(logp, reference, "k3").tolist() == pytest.approx([0, 1 / math.e, math.e - 2])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Row 0: Δ = ½ and −1; row 1: Δ = 2. What a prompt token holds does not matter.
        ("k1", [-0.5, 2.0]),
        ("k2", [0.125 + 0.5, 2.0]),
        ("k3", [math.exp(-0.5) - 0.5 + math.e - 2, math.exp(-2) + 1]),
    ],
)
def test_kl_of_rows_by_hand(estimator: str, expected: list[float]) -> None:
    logp_T = torch.tensor([torch.nan, -1.0, -2.0, torch.nan, -1.0])
    ref_logp_T = torch.tensor([0.0, -1.5, -1.0, 0.0, -3.0])
    kl_N = row_kl(logp_T, ref_logp_T, ACTION_T, OFFSETS, estimator)
    torch.testing.assert_close(kl_N, torch.tensor(expected))


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    """E_π[k1 ∇log π] = ∇KL(π‖π_ref), for one token from a small vocabulary, summed exactly."""
    generator = torch.Generator().manual_seed(0)
    logits_V, ref_V = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits_V.requires_grad_()
    logp_V, ref_logp_V = torch.log_softmax(logits_V, 0), torch.log_softmax(ref_V, 0)
    penalty_V = row_kl(logp_V.detach(), ref_logp_V, torch.ones(6, dtype=torch.bool), torch.arange(7), "k1")
    (in_reward,) = torch.autograd.grad(
        (logp_V.detach().exp() * penalty_V * logp_V).sum(), logits_V, retain_graph=True
    )
    (exact,) = torch.autograd.grad((logp_V.exp() * (logp_V - ref_logp_V)).sum(), logits_V)
    torch.testing.assert_close(in_reward, exact)
