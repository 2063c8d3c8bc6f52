"""From annotations to advantages: scale, shape, gold and KL, in this order."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from driver_fakes import annotated, ready, reference_two_nats_away, rows
from torch import Tensor

from r2m_ray.config.schema import (
    AlgoConfig,
    Config,
    KLEstimator,
    KLPlace,
    RewardConfig,
    RewardScale,
    RewardShape,
)
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.driver.loop import advantages
from r2m_ray.driver.metrics import step_metrics

K1_IN_REWARD = AlgoConfig(
    responses_per_prompt=2, kl_place=KLPlace.reward, kl_weight=0.5, kl_estimator=KLEstimator.k1
)
ONE_GROUP = SamplePlan(
    prompts=(Prompt(index=0, text="p"),), group_size=2, step=1, seed=0, temperature=1.0, max_new_tokens=2
)


def test_kl_in_the_reward_is_charged_before_the_advantage() -> None:
    shard = rows(ONE_GROUP, 0)
    records = shard, annotated(shard, [1.0, 3.0], [0.0, 0.0]), reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(Config(algo=K1_IN_REWARD), *([ready(r)] for r in records)))
    expected: Tensor = torch.tensor([-3.0, 3.0])  # Rewards 1 − 0.5·2 = 0 and 3.
    torch.testing.assert_close(advantage, expected)


def test_a_matched_scale_leaves_the_kl_in_the_reward_as_it_is() -> None:
    config = Config(algo=K1_IN_REWARD, reward=RewardConfig(scale=RewardScale.match_frozen))
    shard = rows(ONE_GROUP, 0)
    records = shard, annotated(shard, [0.0, 8.0], [0.0, 2.0]), reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records)))
    assert advantage.tolist() == [-3.0, 3.0]  # Rewards 0 − 0.5·2 and 8/4.


def test_a_matched_scale_multiplies_the_rewards_of_the_whole_step() -> None:
    shards = [rows(ONE_GROUP, 0), rows(ONE_GROUP, 0)]
    # Deviations within groups: own 1 and 3, frozen 0.5 and 0.5, so the factor is 1/4.
    notes = [annotated(shards[0], [1.0, 3.0], [7.0, 8.0]), annotated(shards[1], [4.0, -2.0], [7.0, 8.0])]
    references = [reference_two_nats_away(shard) for shard in shards]
    records = [[ready(record) for record in shard_records] for shard_records in (shards, notes, references)]
    found = {}
    for scale in RewardScale:
        config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=RewardConfig(scale=scale))
        found[scale.value] = torch.cat(asyncio.run(advantages(config, *records))).tolist()
    assert found == {"raw": [-2.0, 2.0, 6.0, -6.0], "match_frozen": [-0.5, 0.5, 1.5, -1.5]}

    metrics = {s: step_metrics(shards, notes, [torch.zeros(2)] * 2, 1.0, scale=s) for s in found}
    assert metrics["match_frozen"].pop("reward/scale_factor") == pytest.approx(0.25, rel=1e-12)
    assert metrics["raw"].pop("reward/scale_factor") == 1.0
    assert metrics["match_frozen"] == metrics["raw"], "what is reported of the rewards is what was annotated"


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
    reward = RewardConfig(gold_weight=weight, scale=scale)
    config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=reward)
    shard = rows(ONE_GROUP, 0)
    notes = replace(annotated(shard, [0.0, 8.0], [0.0, 2.0]), gold_N=torch.tensor([5.0, 0.0]))
    records = shard, notes, reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records)))
    assert advantage.tolist() == expected


def test_a_shape_is_of_the_scaled_reward_and_comes_before_gold() -> None:
    reward = RewardConfig(shape=RewardShape.par, scale=RewardScale.match_frozen, gold_weight=0.25)
    config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=reward)
    shard = rows(ONE_GROUP, 0)
    notes = replace(annotated(shard, [0.0, 8.0], [0.0, 2.0]), gold_N=torch.tensor([5.0, 0.0]))
    records = shard, notes, reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records), 1.0))
    # Scaled by 1/4, 0 and 2 around 1/4: 0.75·σ(−1/4, 7/4) + 0.25·(5, 0).
    low, high = 0.75 / (1 + math.exp(1 / 4)) + 1.25, 0.75 / (1 + math.exp(-7 / 4))
    assert advantage.tolist() == pytest.approx([low - high, high - low], rel=1e-6)
