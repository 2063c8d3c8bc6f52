"""Rewards on their way to the advantages: the mixture with gold, and the factor of their scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from r2m_ray.config.schema import RewardScale, RewardShape
from r2m_ray.core.shaping import SCALES, SHAPES, gold_mixture, match_frozen, mean_group_std, par

OWN = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 6.0])  # Groups of 2: deviations 1, 0 and 3.
FROZEN = torch.tensor([0.0, 4.0, 2.0, 3.0, 7.0, 8.0])  # 2, 0.5 and 0.5.


def test_gold_mixture_by_hand() -> None:
    reward_N, gold_N = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 2.0, math.nan])
    assert gold_mixture(reward_N, gold_N, 0.25).tolist() == [1.5, -1.0, 4.0]
    assert gold_mixture(reward_N, gold_N, 1.0).tolist() == [3.0, 2.0, 4.0]


def test_weight_zero_leaves_every_bit_of_the_reward() -> None:
    reward_N = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    gold_N = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    gold_N[::3] = math.nan
    assert torch.equal(gold_mixture(reward_N, gold_N, 0.0).view(torch.int32), reward_N.view(torch.int32))


def test_every_scale_and_shape_of_the_configuration_is_computed() -> None:
    assert list(SCALES) == [scale.value for scale in RewardScale]
    assert list(SHAPES) == [shape.value for shape in RewardShape]


def test_par_by_hand() -> None:
    reward_N = torch.tensor([2.0, 2.0 + math.log(3), 2.0 - math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(par(reward_N, 2.0), torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64))


def test_par_keeps_the_order_and_bounds_what_an_exploit_can_gain() -> None:
    reward_N = torch.linspace(-5, 15, 201, dtype=torch.float64)
    shaped_N = par(reward_N, 1.0)
    assert (shaped_N.diff() > 0).all()
    # The slope σ(1 − σ) is largest, 1/4, at the initial policy's reward; 6 above it, a hundredth of that.
    slope_N = shaped_N.diff() / reward_N.diff()
    assert float(slope_N.max()) == pytest.approx(0.25, rel=1e-3)
    assert float(slope_N[reward_N[1:] > 7].max()) < 0.0025
    assert ((shaped_N > 0) & (shaped_N < 1)).all()


@pytest.mark.parametrize("level", [math.nan, math.inf])
def test_par_refuses_a_reference_that_is_no_number(level: float) -> None:
    with pytest.raises(ValueError, match="initial policy's mean reward"):
        par(OWN, level)


def test_no_shape_needs_no_reference_and_leaves_every_bit() -> None:
    assert SHAPES["raw"](OWN, math.nan) is OWN


def test_mean_group_std_by_hand() -> None:
    assert float(mean_group_std(OWN.view(-1, 2))) == 4 / 3
    assert math.isnan(float(mean_group_std(torch.zeros(0, 2))))


def test_match_frozen_is_the_ratio_of_the_mean_deviations() -> None:
    assert match_frozen(OWN, FROZEN, 2) == pytest.approx(3 / 4, rel=1e-12)
    assert SCALES["raw"](OWN, FROZEN, 2) == 1.0


@pytest.mark.parametrize("slope", [0.01, 1.0, 6.0])
def test_matched_rewards_have_the_frozen_spread_whatever_their_own(slope: float) -> None:
    generator = torch.Generator().manual_seed(2)
    frozen_N = torch.randn(40, generator=generator, dtype=torch.float64)
    own_N = slope * torch.randn(40, generator=generator, dtype=torch.float64) + 9
    matched_N = match_frozen(own_N, frozen_N, 4) * own_N
    spread, wanted = (float(mean_group_std(r.view(-1, 4))) for r in (matched_N, frozen_N))
    assert spread == pytest.approx(wanted, rel=1e-12)


def broken(row: int, value: float) -> Tensor:
    changed_N = OWN.clone()
    changed_N[row] = value
    return changed_N


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_groups_that_are_not_finite_do_not_count(value: float) -> None:
    # Without the last group: 1 and 0 against 2 and 0.5.
    assert match_frozen(broken(5, value), FROZEN, 2) == pytest.approx(2.5, rel=1e-12)
    assert match_frozen(OWN, broken(5, value), 2) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("own_N", "frozen_N"),
    [
        (torch.full((6,), 2.0), FROZEN),
        (OWN, torch.full((6,), 2.0)),
        (1e-8 * OWN, FROZEN),
        (torch.full((6,), math.nan), FROZEN),
    ],
)
def test_without_a_spread_there_is_no_scale(own_N: Tensor, frozen_N: Tensor) -> None:
    assert match_frozen(own_N, frozen_N, 2) == 1.0
