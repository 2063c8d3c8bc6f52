from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_ray.core.advantages import ADVANTAGES, dr_grpo, reinforce_pp, rloo

REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
GROUPED = ["rloo", "grpo", "dr_grpo", "remax"]


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype))


# Deviations −2 −1 0 3 give Σ² = 14; −1 −1 −1 3 give 12; both over K − 1 = 3.
STD = [math.sqrt(14 / 3) + 1e-4] * 4 + [math.sqrt(12 / 3) + 1e-4] * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rloo", [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3, -4 / 3, -4 / 3, -4 / 3, 4.0]),
        ("grpo", [d / std for d, std in zip((-2, -1, 0, 3, -1, -1, -1, 3), STD, strict=True)]),
        ("dr_grpo", [-2, -1, 0, 3, -1, -1, -1, 3]),
        # Batch mean 2; deviations −1 0 1 4 −2 −2 −2 2 give Σ² = 34 over 8.
        ("reinforce_pp", [d / math.sqrt(34 / 8) for d in (-1, 0, 1, 4, -2, -2, -2, 2)]),
        ("remax", [0, 1, 2, 5, 0, 0, 0, 4]),
    ],
)
def test_advantages_by_hand(name: str, expected: list[float]) -> None:
    close(ADVANTAGES[name](REWARDS, 4), expected)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_is_a_constant_of_the_rewards_type(name: str, dtype: torch.dtype) -> None:
    rewards = REWARDS.to(dtype).requires_grad_()
    advantage = ADVANTAGES[name](rewards, 4)
    assert advantage.shape == rewards.shape
    assert advantage.dtype == dtype
    assert not advantage.requires_grad


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e4 / 7])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(name: str, value: float, size: int) -> None:
    assert ADVANTAGES[name](torch.full((3 * size,), value), size).count_nonzero() == 0


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce_pp"])
def test_rounding_noise_is_not_a_preference(name: str) -> None:
    rewards = torch.tensor([0.1, 0.1 + 1e-8, 0.1 + 2e-8, 0.1], dtype=torch.float64)
    assert ADVANTAGES[name](rewards, 4).count_nonzero() == 0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_not_a_number_is_not_swallowed(name: str) -> None:
    assert ADVANTAGES[name](torch.tensor([0.0, math.nan, 1.0, 2.0]), 2).isnan().any()


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_has_no_baseline(name: str) -> None:
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        ADVANTAGES[name](REWARDS, 1)


def test_reinforce_pp_needs_no_group() -> None:
    close(reinforce_pp(torch.tensor([1.0, 3.0]), 1), [-1, 1])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rows_that_form_no_groups_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not form groups of 3"):
        ADVANTAGES[name](REWARDS, 3)


rewards_of_groups = st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=50)
@given(rewards_of_groups, st.floats(-5, 5), st.floats(0.5, 5))
def test_shift_and_scale(groups: list[list[float]], shift: float, scale: float) -> None:
    reward_N = torch.tensor(groups, dtype=torch.float64).flatten()
    moved = scale * reward_N + shift
    for name in ("rloo", "dr_grpo", "remax"):
        expected = scale * ADVANTAGES[name](reward_N, 4)
        # The tie rule may zero a spread below 1e-6·max(1, |mean|) on one side only.
        torch.testing.assert_close(ADVANTAGES[name](moved, 4), expected, rtol=1e-9, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(rewards_of_groups)
def test_group_baselines_are_centred_and_local(groups: list[list[float]]) -> None:
    reward_GK = torch.tensor(groups, dtype=torch.float64)
    for name in GROUPED:
        whole = ADVANTAGES[name](reward_GK.flatten(), 4).reshape(-1, 4)
        alone = torch.stack([ADVANTAGES[name](group, 4) for group in reward_GK])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
        if name != "remax":
            assert whole.sum(1).abs().max() < 1e-9


@settings(deadline=None, max_examples=50)
@given(rewards_of_groups)
def test_rloo_is_dr_grpo_scaled(groups: list[list[float]]) -> None:
    reward_N = torch.tensor(groups, dtype=torch.float64).flatten()
    torch.testing.assert_close(rloo(reward_N, 4), dr_grpo(reward_N, 4) * 4 / 3)
