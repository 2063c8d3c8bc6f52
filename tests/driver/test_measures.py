"""Measures of a reward model by hand-worked groups and pairs."""

from __future__ import annotations

import math

import pytest
import torch
from r2m_ray.driver.measures import (
    calibration_error,
    gold_measures,
    group_measures,
    group_skew,
    order_accuracy,
    pair_accuracy,
)

OWN = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
FROZEN = torch.tensor([[2.0, 4.0, 6.0, 8.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
GOLD = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 0.0, 0.0, 2.0], [7.0, 7.0, 7.0, 7.0]], dtype=torch.float64)
IDENTITY = torch.arange(4).expand(3, 4)
QUARTER = math.log(3.0)  # A margin at which the worse response is preferred once in four times.


def test_groups_by_hand() -> None:
    own_stds = (math.sqrt(1.25), math.sqrt(0.5), 0.0)
    frozen_stds = (2 * math.sqrt(1.25), math.sqrt(6.75 / 4), 0.5)
    assert group_measures(OWN, FROZEN, IDENTITY) == pytest.approx(
        {
            "group_std": sum(own_stds) / 3,
            "group_std_frozen": sum(frozen_stds) / 3,
            "scale_ratio": sum(own_stds) / sum(frozen_stds),
            "group_entropy": (1.013082 + 0.988400) / 2,
            "group_skew": 0.0,
            "pair_flip_rate": 0.5,
        },
        abs=1e-6,
    )


def test_order_by_gold_by_hand() -> None:
    # Second group: gold tells rows 0 and 3 from all others, and from each other.
    own, frozen = GOLD[1] - 1.25, FROZEN[1] - 0.75
    of_gold = float(own.square().sum())
    left = float((own * (OWN[1])).sum()) / math.sqrt(of_gold * 2.0)
    right = float((own * frozen).sum()) / math.sqrt(of_gold * 6.75)
    assert gold_measures(GOLD, OWN, FROZEN, IDENTITY) == pytest.approx(
        {
            "gold_correlation": (1 + left) / 2,
            "gold_correlation_frozen": (1 + right) / 2,
            "rm_accuracy_on_policy": (6 + 2) / 11,
            "rm_accuracy_on_policy_frozen": (6 + 3) / 11,
            "pseudo_label_precision": 0.5,
        },
        abs=1e-12,
    )


def test_a_tie_of_the_reward_is_wrong_and_one_of_gold_is_no_pair() -> None:
    reward_GK = torch.tensor([[1.0, 1.0, 2.0]])
    assert order_accuracy(reward_GK, torch.tensor([[0.0, 1.0, 1.0]])) == 0.5
    # As floating-point sums of tenths have it.
    gold_GK = torch.tensor([[0.1 + 0.2, 0.3, 1.0]], dtype=torch.float64)
    assert float(gold_GK[0, 0]) != float(gold_GK[0, 1])
    assert order_accuracy(torch.tensor([[0.0, 1.0, 2.0]]), gold_GK) == 1.0
    assert math.isnan(order_accuracy(reward_GK, torch.zeros(1, 3)))


def test_a_group_with_a_broken_reward_takes_no_part() -> None:
    broken = OWN.clone()
    broken[1, 2] = math.nan
    assert group_measures(broken, FROZEN, IDENTITY)["pair_flip_rate"] == 0.0
    assert gold_measures(GOLD, broken, FROZEN, IDENTITY)["rm_accuracy_on_policy_frozen"] == 1.0
    nothing = group_measures(OWN * math.nan, FROZEN, IDENTITY)
    assert all(math.isnan(value) for value in nothing.values())


def test_equal_tokens_make_no_pseudo_label() -> None:
    twins = IDENTITY.clone()
    twins[1, 3] = twins[1, 0]
    assert gold_measures(GOLD, OWN, FROZEN, twins)["pseudo_label_precision"] == 1.0


@pytest.mark.parametrize("size", [3, 4, 8, 16])
def test_one_stand_out_has_the_greatest_skew(size: int) -> None:
    rewards = torch.zeros(1, size)
    rewards[0, 1] = 5.0
    bound = (size - 2) / math.sqrt(size - 1)
    assert float(group_skew(rewards)) == pytest.approx(bound, abs=1e-9)
    assert float(group_skew(-3 * rewards + 1)) == pytest.approx(-bound, abs=1e-9)
    draws = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    assert group_skew(draws).abs().max() <= bound + 1e-9


def test_skew_without_spread_is_undefined() -> None:
    assert group_skew(torch.ones(2, 4)).isnan().all()


def margins(*values: float) -> torch.Tensor:
    return torch.tensor([[value, 0.0] for value in values])


def test_accuracy_counts_the_first_response_as_the_better_one() -> None:
    assert pair_accuracy(margins(1.0, -1.0, 0.0, 2.0)) == 0.5


def test_confidence_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    assert calibration_error(margins(QUARTER, QUARTER, QUARTER, -QUARTER)) == pytest.approx(0.0, abs=1e-7)
    assert calibration_error(margins(0.0, 0.0)) == 0.0


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    # Four pairs at ¾ are all right: off by ¼. One is sure and wrong: off by 1.
    found = calibration_error(margins(QUARTER, QUARTER, QUARTER, QUARTER, -50.0))
    assert found == pytest.approx((4 * 0.25 + 1.0) / 5, abs=1e-7)
    # In one bin errors of opposite sign cancel: sure, and right one time in two.
    assert calibration_error(margins(50.0, -50.0)) == pytest.approx(0.5, abs=1e-12)


def test_a_scale_spoils_calibration_and_leaves_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    margin_M = torch.randn(20_000, generator=generator) * 2
    is_right_M = torch.rand(20_000, generator=generator) < torch.sigmoid(margin_M)
    true_M2 = torch.stack([torch.where(is_right_M, margin_M, -margin_M), torch.zeros(20_000)], 1)
    assert calibration_error(true_M2) < 0.02
    assert calibration_error(6 * true_M2) > 0.12
    assert pair_accuracy(6 * true_M2) == pair_accuracy(true_M2)


def test_broken_pairs_are_left_out_of_calibration() -> None:
    assert calibration_error(margins(math.nan, math.inf, 50.0)) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(calibration_error(margins(math.nan)))
