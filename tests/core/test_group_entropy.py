from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.reward_loss import group_reward_entropy


def group(*rewards: float) -> Tensor:
    return torch.tensor([rewards], dtype=torch.float64)


def entropy(reward_GK: Tensor, *, detach_stats: bool = False) -> Tensor:
    return group_reward_entropy(reward_GK, detach_stats=detach_stats)[0]


def gradient(reward_GK: Tensor, *, detach_stats: bool = False) -> Tensor:
    leaf = reward_GK.clone().requires_grad_()
    return torch.autograd.grad(entropy(leaf, detach_stats=detach_stats).sum(), leaf)[0]


# A spread far above rounding, so that float64 differences are about the formula.
spread_groups = (
    st.lists(st.floats(-5, 5), min_size=3, max_size=9)
    .filter(lambda rewards: max(rewards) - min(rewards) > 0.1)
    .map(lambda rewards: group(*rewards))
)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 1], 0.790945),
        ([1, 1, 1, 0], 1.205190),
        ([0, 0, 1, 1], 1.058481),
        ([1, 2, 3, 4], 1.013082),
        ([3, -1, 0.5, 2], 1.052318),
        (list(range(8)), 1.696409),
    ],
)
def test_entropy_by_hand(rewards: list[float], expected: float) -> None:
    assert entropy(group(*rewards)).item() == pytest.approx(expected, abs=5e-7)


def test_entropy_gradients_by_hand() -> None:
    full = gradient(group(1, 2, 3, 4))[0].tolist()
    detached = gradient(group(1, 2, 3, 4), detach_stats=True)[0].tolist()
    assert full == pytest.approx([-0.08666, 0.06001, 0.13996, -0.11331], abs=5e-6)
    assert detached == pytest.approx([0.08057, 0.11575, 0.08421, -0.28054], abs=5e-6)


@pytest.mark.parametrize(
    ("size", "smallest", "largest", "tolerance"),
    [
        (3, 0.6251, 0.8713, 5e-5),
        (4, 0.790945, 1.205190, 5e-7),
        (8, 1.060711, 1.973689, 5e-7),
        (16, 1.0180, 2.7135, 5e-5),
    ],
)
def test_one_stand_out_bounds_the_entropy(
    size: int, smallest: float, largest: float, tolerance: float
) -> None:
    one_high = group(1, *[0] * (size - 1))
    assert entropy(one_high).item() == pytest.approx(smallest, abs=tolerance)
    assert entropy(-one_high).item() == pytest.approx(largest, abs=tolerance)
    random_groups = torch.randn(500, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    assert entropy(random_groups).min() > entropy(one_high)
    assert entropy(random_groups).max() < entropy(-one_high)


@pytest.mark.parametrize("size", [3, 4, 8, 16])
def test_minimum_in_closed_form(size: int) -> None:
    p_high = 1 / (1 + (size - 1) * math.exp(-size / math.sqrt(size - 1)))
    p_low = (1 - p_high) / (size - 1)
    expected = -p_high * math.log(p_high) - (size - 1) * p_low * math.log(p_low)
    assert entropy(group(1, *[0] * (size - 1))).item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(spread_groups, st.floats(0.1, 100), st.floats(-100, 100))
def test_entropy_ignores_shift_and_positive_scale(rewards: Tensor, scale: float, shift: float) -> None:
    torch.testing.assert_close(entropy(scale * rewards + shift), entropy(rewards), rtol=1e-8, atol=0)


@settings(deadline=None, max_examples=50)
@given(spread_groups, st.randoms(use_true_random=False))
def test_entropy_ignores_the_rows_order(rewards: Tensor, rng) -> None:  # type: ignore[no-untyped-def]
    order = rng.sample(range(rewards.shape[1]), rewards.shape[1])
    torch.testing.assert_close(entropy(rewards[:, order]), entropy(rewards))


@settings(deadline=None, max_examples=50)
@given(spread_groups, st.floats(0.1, 100))
def test_the_full_gradient_keeps_mean_and_spread(rewards: Tensor, scale: float) -> None:
    slope = gradient(rewards)
    assert slope.sum().abs() < 1e-9
    assert (rewards * slope).sum().abs() < 1e-9
    # The norm is below rounding where the group sits at an extremum of the entropy.
    torch.testing.assert_close(gradient(scale * rewards).norm(), slope.norm() / scale, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(spread_groups)
def test_descent_with_detached_statistics_widens_the_group(rewards: Tensor) -> None:
    deviation = rewards - rewards.mean()
    assert (deviation * -gradient(rewards, detach_stats=True)).sum() > 0


def test_full_descent_raises_the_loser_as_well_as_the_winner() -> None:
    step = -gradient(group(1, 2, 3, 4))[0]
    assert step[0] > 0
    assert step[3] > 0
    assert (step[1:3] < 0).all()


def test_entropy_gradcheck() -> None:
    leaf = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(entropy, (leaf,))


def test_detached_gradient_is_that_of_fixed_statistics() -> None:
    leaf = group(3, -1, 0.5, 2).requires_grad_()
    mean, std = leaf.detach().mean(), leaf.detach().std(correction=0)

    def fixed(reward: Tensor) -> Tensor:
        logp = torch.log_softmax((reward - mean) / std, 1)
        return -(logp.exp() * logp).sum(1)

    assert torch.autograd.gradcheck(fixed, (leaf,))
    torch.testing.assert_close(
        gradient(leaf.detach(), detach_stats=True), torch.autograd.grad(fixed(leaf).sum(), leaf)[0]
    )


def test_two_rows_have_constant_entropy() -> None:
    pairs = torch.tensor([[0.0, 1.0], [5.0, -3.0]], dtype=torch.float64)
    assert entropy(pairs).tolist() == pytest.approx([0.365334, 0.365334], abs=5e-7)
    assert gradient(pairs).abs().max() < 1e-15


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_one_row_has_no_entropy(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        group_reward_entropy(torch.zeros(shape))


@pytest.mark.parametrize("detach_stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_groups_are_masked_and_leave_their_neighbours_alone(
    detach_stats: bool, dtype: torch.dtype
) -> None:
    rewards = torch.tensor(
        [[0.1] * 4, [1, 1 + 1e-7, 1, 1 - 1e-7], [1, 2, 3, 4], [-1e4] * 4], dtype=dtype, requires_grad=True
    )
    loss_G, valid_G = group_reward_entropy(rewards, detach_stats=detach_stats)
    assert valid_G.tolist() == [False, False, True, False]
    assert loss_G[[0, 1, 3]].tolist() == [0, 0, 0]
    slope = torch.autograd.grad(loss_G.sum(), rewards)[0]
    assert slope[[0, 1, 3]].count_nonzero() == 0
    alone = gradient(group(1, 2, 3, 4).to(dtype), detach_stats=detach_stats)
    torch.testing.assert_close(slope[2:3], alone)


def test_not_a_number_is_not_masked() -> None:
    loss_G, valid_G = group_reward_entropy(group(1, math.nan, 2))
    assert valid_G.tolist() == [True]
    assert loss_G.isnan().all()
