from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from heads import grebt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.reward_loss import (
    GrebtSums,
    bradley_terry,
    grebt_sums,
    group_pairs,
    group_reward_entropy,
    human_sums,
    mixed_means,
)


def group(*rewards: float) -> Tensor:
    return torch.tensor([rewards], dtype=torch.float64)


def response_ids(reward_GK: Tensor) -> Tensor:
    return torch.arange(reward_GK.numel()).reshape(reward_GK.shape)


def test_bradley_terry_at_margin_zero() -> None:
    winner, loser = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    loss = bradley_terry(winner, loser)
    assert loss.item() == pytest.approx(math.log(2))
    assert [slope.item() for slope in torch.autograd.grad(loss, (winner, loser))] == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("margin", "loss", "slope"), [(1e4, 0, 0), (-1e4, 1e4, -1), (2.0, 0.126928, -0.119203)]
)
def test_bradley_terry_at_any_margin(margin: float, loss: float, slope: float) -> None:
    winner = torch.tensor(margin, requires_grad=True)
    value = bradley_terry(winner, torch.tensor(0.0))
    torch.autograd.backward(value)
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert winner.grad is not None
    assert winner.grad.item() == pytest.approx(slope, rel=1e-5)


def test_pairs_are_best_and_worst() -> None:
    winner_G, loser_G, valid_G = group_pairs(group(0.5, -1, 3, 2), torch.tensor([[0, 1, 2, 3]]))
    assert (winner_G.item(), loser_G.item(), valid_G.item()) == (2, 1, True)


@pytest.mark.parametrize(
    ("rewards", "ids", "valid"),
    [
        ([1.0, 1.0, 1.0], [0, 1, 2], False),
        ([1.0, 1.0 + 9e-7, 1.0], [0, 1, 2], False),
        ([1.0, 1.0 + 2e-6, 1.0], [0, 1, 2], True),
        ([1000.0, 1000.0009, 1000.0], [0, 1, 2], False),
        ([1000.0, 1000.002, 1000.0], [0, 1, 2], True),
        ([1.0, 2.0, 3.0], [7, 8, 7], False),
        ([1.0, 2.0, 3.0], [7, 7, 8], True),
    ],
)
def test_which_pairs_are_skipped(rewards: list[float], ids: list[int], valid: bool) -> None:
    assert group_pairs(group(*rewards), torch.tensor([ids]))[2].item() is valid


@pytest.mark.parametrize(("margin", "valid"), [(0.0, True), (2.0, True), (2.0 + 1e-9, False)])
def test_pairs_closer_than_the_margin_are_skipped(margin: float, valid: bool) -> None:
    assert group_pairs(group(1, 3, 2), torch.tensor([[0, 1, 2]]), min_margin=margin)[2].item() is valid


def test_the_margin_is_of_the_rewards_that_pick_and_masks_the_pair_alone() -> None:
    reward_GK = torch.tensor([[0, 0.1, 0.2, 0.3], [1, 5, 9, 2]], dtype=torch.float64, requires_grad=True)
    # Group 0 is picked by a wide margin and group 1 by a narrow one, whatever the rewards that are fitted.
    pair_reward_GK = torch.tensor([[4, 0, 0, 1], [0, 0.5, 0, 0]], dtype=torch.float64)
    _, sums = grebt(reward_GK, pair_reward_GK, entropy_weight=0.3, min_margin=1.0)
    assert (sums.pairs.item(), sums.groups.item()) == (1, 2)
    assert sums.bradley_terry.item() == pytest.approx(math.log(1 + math.exp(0.1)), rel=1e-12)
    slope_GK = torch.autograd.grad(sums.bradley_terry, reward_GK)[0]
    assert slope_GK[1].count_nonzero() == 0


def test_grebt_by_hand() -> None:
    reward_GK = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 1], [2, 2, 2, 2]], dtype=torch.float64)
    # Group 0: row 0 over row 3, against the current order; group 1: row 3 over row 0; group 2: tied.
    pair_reward_GK = torch.tensor([[9, 1, 1, 0], [0, 1, 1, 5], [3, 3, 3, 3]], dtype=torch.float64)
    loss, sums = grebt(reward_GK, pair_reward_GK, entropy_weight=0.3)
    bt = math.log(1 + math.exp(3)) + math.log(1 + math.exp(-1))
    assert sums.bradley_terry.item() == pytest.approx(bt, rel=1e-12)
    assert sums.entropy.item() == pytest.approx(1.013082 + 0.790945, abs=1e-6)
    assert loss.item() == pytest.approx(0.7 * bt / 2 + 0.3 * (1.013082 + 0.790945) / 2, abs=1e-6)
    assert (sums.pairs.item(), sums.groups.item(), sums.all_groups.item()) == (2, 2, 3)
    assert (sums.margin.item(), sums.flips.item()) == (-3 + 1, 1)
    assert sums.std.item() == pytest.approx(math.sqrt(1.25) + math.sqrt(3) / 4, rel=1e-12)


def test_recomputed_pairs_never_flip() -> None:
    reward_GK = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    sums = grebt_sums(reward_GK, reward_GK, response_ids(reward_GK))
    assert sums.flips.item() == 0
    assert sums.margin.item() > 0


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_of_the_mixture_are_the_single_losses(weight: float) -> None:
    reward_GK = torch.randn(20, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    pairs = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    loss, sums = grebt(reward_GK, pairs, entropy_weight=weight)
    winner_G, loser_G, _ = group_pairs(pairs, response_ids(pairs))
    rows = torch.arange(20)
    bt_only = bradley_terry(reward_GK[rows, winner_G], reward_GK[rows, loser_G]).sum() / 20
    single = bt_only if weight == 0 else group_reward_entropy(reward_GK)[0].sum() / 20
    assert sums.pairs.item() == sums.groups.item() == 20
    assert torch.equal(loss, single)
    assert torch.equal(torch.autograd.grad(loss, reward_GK)[0], torch.autograd.grad(single, reward_GK)[0])


def test_no_valid_group_gives_loss_and_gradient_zero() -> None:
    reward_GK = torch.full((3, 4), 0.7, requires_grad=True)
    loss, sums = grebt(reward_GK, reward_GK, entropy_weight=0.3)
    assert (loss.item(), sums.pairs.item(), sums.groups.item()) == (0, 0, 0)
    assert torch.autograd.grad(loss, reward_GK)[0].count_nonzero() == 0


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, 11), max_size=3), masked=st.sets(st.integers(0, 11), max_size=11))
def test_shards_with_global_counts_add_up_to_the_whole(cuts: set[int], masked: set[int]) -> None:
    values = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    values[sorted(masked)] = 0.3
    pairs = values + torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pairs[sorted(masked)] = 0.3
    reward_GK = values.clone().requires_grad_()
    whole, total = grebt(reward_GK, pairs, entropy_weight=0.3)
    whole_grad = torch.autograd.grad(whole, reward_GK)[0]
    bounds = [0, *sorted(cuts), 12]
    shards = [grebt_sums(reward_GK[a:b], pairs[a:b], response_ids(pairs[a:b])) for a, b in pairwise(bounds)]
    added = GrebtSums(
        **{field.name: sum(getattr(shard, field.name) for shard in shards) for field in fields(GrebtSums)}
    )
    counts = (added.pairs, added.groups)
    summed = torch.stack(
        [mixed_means(s.bradley_terry, s.entropy, counts=counts, weight=0.3) for s in shards]
    ).sum()
    torch.testing.assert_close(summed, whole)
    mixed = mixed_means(added.bradley_terry, added.entropy, counts=counts, weight=0.3)
    torch.testing.assert_close(mixed, whole)
    torch.testing.assert_close(torch.autograd.grad(summed, reward_GK)[0], whole_grad)
    for field in fields(GrebtSums):
        torch.testing.assert_close(getattr(added, field.name), getattr(total, field.name))


def test_masked_groups_leave_the_mean_unchanged() -> None:
    reward_GK = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    flat = torch.full((5, 4), 2.0, dtype=torch.float64)
    both = torch.cat([reward_GK, flat])
    alone, _ = grebt(reward_GK, reward_GK, entropy_weight=0.3)
    padded, _ = grebt(both, both, entropy_weight=0.3)
    torch.testing.assert_close(padded, alone, rtol=1e-14, atol=0)


def test_human_pairs_teach_their_own_order_whatever_the_rewards_say() -> None:
    # Right by 2, wrong by 1, undecided, and the same tokens twice.
    reward_G2 = torch.tensor([[3.0, 1.0], [0.0, 1.0], [5.0, 5.0], [9.0, -9.0]], requires_grad=True)
    sums = human_sums(reward_G2, torch.tensor([[0, 1], [2, 3], [4, 5], [6, 6]]))
    assert sums.bradley_terry.item() == pytest.approx(0.126928 + 1.313262 + math.log(2), abs=1e-5)
    assert (sums.pairs.item(), sums.correct.item(), sums.nonfinite.item()) == (3, 1, 0)
    (slope_G2,) = torch.autograd.grad(sums.bradley_terry, reward_G2)
    expected_G = torch.tensor([-0.119203, -0.731059, -0.5, 0.0])
    torch.testing.assert_close(slope_G2, torch.stack([expected_G, -expected_G], 1), atol=1e-5, rtol=0)


def test_rows_of_human_pairs_that_are_not_finite_are_counted() -> None:
    reward_G2 = torch.tensor([[math.inf, 1.0], [math.nan, -math.inf]])
    assert human_sums(reward_G2, torch.tensor([[0, 1], [2, 2]])).nonfinite.item() == 3


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 2.0), (0.25, 3.0), (1.0, 6.0)])
def test_an_anchor_mixes_means_not_sums(fraction: float, expected: float) -> None:
    # 8 over 4 pairs of the head's own, 12 over 2 of people's: (1−a)·2 + a·6.
    mixed = mixed_means(torch.tensor(8.0), torch.tensor(12.0), counts=(4.0, 2.0), weight=fraction)
    assert mixed.item() == pytest.approx(expected)
    assert mixed_means(torch.zeros(()), torch.zeros(()), counts=(0.0, 0.0), weight=0.5).item() == 0.0
