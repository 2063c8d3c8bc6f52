"""KL of rows, by hand and in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from r2m_ray.core.kl import row_kl

OFFSETS = torch.tensor([0, 3, 5])
ACTION_T = torch.tensor([False, True, True, False, True])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Row 0: Δ = ½ and −1; row 1: Δ = 2. What a prompt token holds does not matter.
        ("k1", [-0.5, 2.0]),
        ("k2", [0.125 + 0.5, 2.0]),
        ("k3", [math.exp(-0.5) - 0.5 + math.e - 2, math.exp(-2) + 1]),
    ],
)
def test_by_hand(estimator: str, expected: list[float]) -> None:
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
