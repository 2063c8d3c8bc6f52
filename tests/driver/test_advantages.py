"""From rows to advantages: scale, shape, gold and KL, in this order, and ReMax's greedy rows."""

from __future__ import annotations

import math

import pytest
import torch
from fake_roles import FakeRoles, Verdict, World, rows_of

from r2m_ray.config.schema import (
    Advantage,
    AlgoConfig,
    Config,
    KLPlace,
    RewardConfig,
    RewardScale,
    RewardShape,
)
from r2m_ray.driver.rows import Rows
from r2m_ray.driver.step import advantages

IN_REWARD = AlgoConfig(responses_per_prompt=2, kl_place=KLPlace.reward, kl_weight=0.5)
TWO_NATS = torch.tensor([2.0, 0.0])


def found(config: Config, rows: Rows, initial_reward: float = math.nan) -> list[float]:
    return torch.cat(advantages(config, rows, initial_reward)).tolist()


def settings(algo: AlgoConfig | None = None, **reward: object) -> Config:
    return Config(algo=algo or AlgoConfig(responses_per_prompt=2), reward=RewardConfig(**reward))  # type: ignore[arg-type]


def test_kl_in_the_reward_is_charged_before_the_advantage() -> None:
    rows = rows_of([1.0, 3.0], group_size=2, kl_penalty_N=TWO_NATS)
    assert found(settings(IN_REWARD), rows) == [-3.0, 3.0]  # Rewards 1 − 0.5·2 = 0 and 3.
    assert found(settings(), rows) == [-2.0, 2.0]  # As a term of the loss it leaves rewards alone.


def test_a_matched_scale_leaves_the_kl_in_the_reward_as_it_is() -> None:
    rows = rows_of([0.0, 8.0], [0.0, 2.0], group_size=2, kl_penalty_N=TWO_NATS)
    matched = settings(IN_REWARD, scale=RewardScale.match_frozen)
    assert found(matched, rows) == [-3.0, 3.0]  # Rewards 0 − 0.5·2 and 8/4.


def test_a_matched_scale_multiplies_the_rewards_of_the_complete_step() -> None:
    # Deviations within groups: own 1 and 3, frozen 0.5 and 0.5, so the factor is 1/4.
    rows = rows_of([1.0, 3.0, 4.0, -2.0], [7.0, 8.0, 7.0, 8.0], group_size=2, shard_sizes=(2, 2))
    assert found(settings(), rows) == [-2.0, 2.0, 6.0, -6.0]
    shards = advantages(settings(scale=RewardScale.match_frozen), rows)
    assert [shard.tolist() for shard in shards] == [[-0.5, 0.5], [1.5, -1.5]]


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        (0.0, RewardScale.raw, [-8.0, 8.0]),
        (1.0, RewardScale.raw, [5.0, -5.0]),
        (1.0, RewardScale.match_frozen, [5.0, -5.0]),
        # 0.75·(0, 8) + 0.25·(5, 0), and with the reward's spread first brought from 4 to 1.
        (0.25, RewardScale.raw, [-4.75, 4.75]),
        (0.25, RewardScale.match_frozen, [-0.25, 0.25]),
    ],
)
def test_gold_is_mixed_with_scaled_rewards_before_the_advantages(
    weight: float, scale: RewardScale, expected: list[float]
) -> None:
    rows = rows_of([0.0, 8.0], [0.0, 2.0], gold=[5.0, 0.0], group_size=2)
    assert found(settings(gold_weight=weight, scale=scale), rows) == expected


def test_a_shape_is_of_the_scaled_reward_and_comes_before_gold() -> None:
    shaped = settings(shape=RewardShape.par, scale=RewardScale.match_frozen, gold_weight=0.25)
    rows = rows_of([0.0, 8.0], [0.0, 2.0], gold=[5.0, 0.0], group_size=2)
    # Scaled by 1/4, 0 and 2 around 1/4: 0.75·σ(−1/4, 7/4) + 0.25·(5, 0).
    low, high = 0.75 / (1 + math.exp(1 / 4)) + 1.25, 0.75 / (1 + math.exp(-7 / 4))
    assert found(shaped, rows, 1.0) == pytest.approx([low - high, high - low], rel=1e-6)


def test_remax_charges_no_kl_to_the_greedy_row() -> None:
    algo = AlgoConfig(
        responses_per_prompt=2, advantage=Advantage.remax, kl_place=KLPlace.reward, kl_weight=0.5
    )
    rows = rows_of([1.0, 3.0], group_size=2, kl_penalty_N=torch.tensor([8.0, 2.0]))
    assert found(settings(algo), rows) == [0.0, 1.0]  # 3 − 0.5·2 − 1.
    assert rows.kl_penalty_N.tolist() == [8.0, 2.0], "records are never written to"


def test_remax_samples_a_greedy_row_and_leaves_it_out_of_averages(config: Config, world: World) -> None:
    config.algo.advantage = Advantage.remax
    fake = FakeRoles(judge=lambda word: Verdict(own=float(word[1:]) + 1))
    run = world.train(config, fake)
    assert fake.of("policy")[0] == ([[0.0, 1.0, 0.0, 1.0]] * 2,)
    row = run.rows("step")[0]
    assert (row["reward/greedy_mean"], row["reward/mean"]) == (1.0, 2.0)
