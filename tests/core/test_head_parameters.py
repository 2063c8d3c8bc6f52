"""The parameters of the R2M head: their names, how they start, and what training does to them."""

from __future__ import annotations

import pytest
import torch
from heads import CROSS_ATTENTION, D, E, P, gradients, grebt, head, packed, random
from torch import Tensor

from r2m_ray.core.head import R2MHead


def test_parameters_and_their_names() -> None:
    shapes = {name: list(value.shape) for name, value in head().state_dict().items()}
    assert shapes == {
        "w_q": [D, E],
        "w_k": [P, E],
        "w_v": [P, E],
        "w_o": [E, D],
        "score_weight": [D],
        "score_bias": [1],
    }
    assert "score_bias" not in head(bias=False).state_dict()


def test_initialisation_is_repeatable_and_of_the_given_scale() -> None:
    first, second = head(300, 200, 100, std=0.02), head(300, 200, 100, std=0.02)
    for name in CROSS_ATTENTION:
        value = first.get_parameter(name)
        assert torch.equal(value, second.get_parameter(name))
        # 20 000 draws or more: the sample std is within 2.5 % at five standard errors.
        assert value.std().item() == pytest.approx(0.02, rel=0.025)
        assert abs(value.mean().item()) < 0.001


def test_phi_starts_as_a_copy_in_float32() -> None:
    weight = random(1, D).bfloat16()
    module = R2MHead(P, D, E, weight)
    assert module.score_weight.dtype == torch.float32
    assert module.score_weight.tolist() == weight[0].tolist()
    with torch.no_grad():
        module.score_weight.zero_()
    assert weight.count_nonzero() == D


def test_zero_output_projection_starts_without_feedback() -> None:
    module = R2MHead(P, D, E, random(D), wo_init="zero", init_std=0.4)
    rte_ND = random(2, D)
    torch.autograd.backward(module(rte_ND, random(5, P), packed([2, 3]), 0.6).sum())
    assert module.feedback(random(2, P)).count_nonzero() == 0
    grads = gradients(module)
    assert grads["w_o"] is not None
    assert grads["w_o"].count_nonzero() == E * D


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_weight": torch.zeros(2, D)}, "must hold reward_width = 7 numbers"),
        ({"score_bias": torch.zeros(2)}, "score_bias must be one number"),
        ({"wo_init": "ones"}, "wo_init must be random or zero"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R2MHead(P, D, E, **{"score_weight": torch.zeros(D), **arguments})  # type: ignore[arg-type]


def trained_loss(module: R2MHead, rte_ND: Tensor, hidden_TP: Tensor) -> Tensor:
    rows = rte_ND.shape[0]
    offsets = packed([hidden_TP.shape[0] // rows] * rows)
    reward_GK = module(rte_ND, hidden_TP, offsets, 0.6).reshape(-1, 4)
    return grebt(reward_GK, reward_GK.detach(), entropy_weight=0.3)[0]


def test_only_cross_attention_and_phi_receive_gradients() -> None:
    module, rte_ND, hidden_TP = head(), random(8, D), random(40, P, seed=1)
    torch.autograd.backward(trained_loss(module, rte_ND, hidden_TP))
    grads = gradients(module)
    assert set(grads) == CROSS_ATTENTION | {"score_weight", "score_bias"}
    # A common bias cancels in every pair and in every standardised reward.
    largest = {name: grad.abs().max().item() for name, grad in grads.items() if grad is not None}
    assert largest.pop("score_bias") < 1e-6
    assert min(largest.values()) > 1e-5
    assert rte_ND.grad is None
    assert hidden_TP.grad is None


@pytest.mark.parametrize("flat", ["all", "one"])
def test_equal_rewards_put_no_nan_into_any_parameter(flat: str) -> None:
    module, rte_ND, hidden_TP = head(), random(8, D), random(40, P, seed=1)
    last = 8 if flat == "all" else 4
    rte_ND[:last] = rte_ND[0]
    hidden_TP[: 5 * last] = hidden_TP[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0)
    loss = trained_loss(module, rte_ND, hidden_TP)
    torch.autograd.backward(loss)
    assert (loss.item() == 0) == (flat == "all")
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0.99, 1.0), (torch.bfloat16, 0.0, 0.05)])
def test_small_learning_rates_need_float32(dtype: torch.dtype, low: float, high: float) -> None:
    module = head(64, 48, 32, bias=False, std=0.16)
    torch.autograd.backward(trained_loss(module, random(8, 48), random(40, 64, seed=1)))
    module.to(dtype)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])
    torch.optim.Adam(module.parameters(), lr=1e-6).step()
    after = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert low < (before != after).float().mean().item() <= high
