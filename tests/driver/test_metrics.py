"""Three hand-worked groups of four rows, in two shards: one ordered alike, one flipped, one all equal."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from r2m_ray.core.batch import Annotation, Layout, Trajectories, pack_rows
from r2m_ray.driver.metrics import group_correlation, mean, merge_stats, rollout_records, step_metrics

OWN = ([1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0])
FROZEN = ([2.0, 4.0, 6.0, 8.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
ADVANTAGE = (torch.tensor([1.0, -1.0] * 4), torch.tensor([3.0, -3.0, 0.0, 0.0]))
LENGTHS = (3, 1, 2, 2, 1, 1, 1, 1, 5, 2, 2, 3)
GOLD = [
    {"total": total, "correct": float(n % 2), "length": -0.5}
    for n, total in enumerate([1, 2, 3, 4, 1, 0, 0, 2, 7, 7, 7, 7])
]


@pytest.fixture
def trajectories() -> list[Trajectories]:
    def shard(first: int, groups: int) -> Trajectories:
        lengths = LENGTHS[first : first + 4 * groups]
        return pack_rows(
            [f"prompt {first // 4 + g}" for g in range(groups)],
            [[1, 2, 3]] * groups,
            [[7] * length for length in lengths],
            [f"response {first + n}" for n in range(len(lengths))],
            truncated=[length == 5 for length in lengths],
            version=4,
        )

    return [shard(0, 2), shard(8, 1)]


@pytest.fixture
def annotation() -> list[Annotation]:
    return [
        Annotation(
            layout=Layout.from_lengths([1] * len(own), 4),
            reward_N=torch.tensor(own),
            frozen_reward_N=torch.tensor(frozen),
            gold_N=torch.full((len(own),), math.nan),
            rte_ND=torch.zeros(len(own), 2),
            response_id_N=torch.arange(len(own)),
        )
        for own, frozen in zip(OWN, FROZEN, strict=True)
    ]


def test_step_metrics_equal_the_hand_worked_numbers(trajectories, annotation):
    metrics = step_metrics(trajectories, annotation, ADVANTAGE, 0.75, GOLD)

    group_stds = (math.sqrt(1.25), math.sqrt(0.5), 0.0)
    frozen_stds = (2 * math.sqrt(1.25), math.sqrt(6.75 / 4), 0.5)
    assert metrics == pytest.approx(
        {
            "omega": 0.75,
            "tokens": 24 + 12 * 2,
            "response/tokens": 24,
            "response/length_mean": 2.0,
            "response/length_max": 5.0,
            "response/truncated_fraction": 1 / 12,
            "response/empty_fraction": 5 / 12,
            "advantage/std": math.sqrt((8 + 18) / 12),
            "reward/mean": 30 / 12,
            "reward/std": math.sqrt((30 + 2 + 100) / 12 - 2.5**2),
            "reward/frozen_mean": 25 / 12,
            "reward/frozen_std": math.sqrt((120 + 9 + 2) / 12 - (25 / 12) ** 2),
            "reward/frozen_gap": 5 / 12,
            "reward/frozen_correlation": (1 - 3 / math.sqrt(2 * 6.75)) / 2,
            "reward/group_std": sum(group_stds) / 3,
            "reward/frozen_group_std": sum(frozen_stds) / 3,
            "reward/scale_ratio": sum(group_stds) / sum(frozen_stds),
            "reward/scale_factor": 1.0,
            "reward/group_entropy": (1.013082 + 0.988400) / 2,
            "reward/pair_flip_rate": 0.5,
            "reward/zero_std_groups": 1 / 3,
            "reward/nonfinite": 0.0,
            "hidden/nonfinite": 0.0,
            "gold/mean": 41 / 12,
            "gold/group_std": (math.sqrt(1.25) + math.sqrt(2.75 / 4)) / 3,
            # Within groups: 1 and 1/√(2·2.75); 1 and 0.25/√(6.75·2.75). The equal group has no correlation.
            "gold/correlation": (1 + 1 / math.sqrt(2 * 2.75)) / 2,
            "gold/frozen_correlation": (1 + 0.75 / math.sqrt(6.75 * 2.75)) / 2,
            "gold/pair_precision": 1.0,
            "gold/correct": 0.5,
            "gold/length": -0.5,
        },
        abs=1e-6,
    )


def test_a_batch_without_any_spread_is_undefined_not_wrong(trajectories, annotation):
    metrics = step_metrics(trajectories[1:], annotation[1:], ADVANTAGE[1:], 1.0)
    assert metrics["reward/zero_std_groups"] == 1
    assert math.isnan(metrics["reward/group_entropy"])
    assert math.isnan(metrics["reward/pair_flip_rate"])
    assert math.isnan(metrics["reward/frozen_correlation"])
    assert 0 < metrics["reward/scale_ratio"] < 1e-5
    assert not any(key.startswith("gold/") for key in metrics)


def test_a_vanilla_batch_reads_as_the_frozen_reward_model(trajectories, annotation):
    same = [
        Annotation(
            layout=shard.layout,
            reward_N=shard.frozen_reward_N,
            frozen_reward_N=shard.frozen_reward_N,
            gold_N=shard.gold_N,
            rte_ND=shard.rte_ND,
            response_id_N=shard.response_id_N,
        )
        for shard in annotation
    ]
    metrics = step_metrics(trajectories, same, ADVANTAGE, 1.0)
    assert metrics["reward/frozen_gap"] == 0
    assert metrics["reward/scale_ratio"] == 1
    assert metrics["reward/pair_flip_rate"] == 0
    assert metrics["reward/frozen_correlation"] == pytest.approx(1, abs=1e-12)


def test_equal_responses_make_no_pair(trajectories, annotation):
    twins = Annotation(
        layout=annotation[0].layout,
        reward_N=annotation[0].reward_N,
        frozen_reward_N=annotation[0].frozen_reward_N,
        gold_N=annotation[0].gold_N,
        rte_ND=annotation[0].rte_ND,
        response_id_N=torch.tensor([0, 1, 2, 0, 9, 5, 6, 7]),
    )
    records = rollout_records(1, trajectories[:1], [twins], ADVANTAGE[:1], 1.0, limit=8)
    assert [record["role"] for record in records] == ["none"] * 4 + ["loser", "none", "none", "winner"]


def test_rollout_records_are_the_first_rows_with_everything_a_reader_needs(trajectories, annotation):
    attention = {9: [("fox", 0.75), ("red", 0.25)]}
    records = rollout_records(
        3, trajectories, annotation, ADVANTAGE, 0.5, GOLD, limit=10, attention=attention
    )
    assert [record["row"] for record in records] == list(range(10))
    assert [record["group"] for record in records] == [0] * 4 + [1] * 4 + [2] * 2
    assert records[3]["role"] == "winner"
    assert records[0]["role"] == "loser"
    assert records[8] == {
        "step": 3,
        "group": 2,
        "row": 8,
        "prompt": "prompt 2",
        "response": "response 8",
        "role": "none",
        "reward": 5.0,
        "frozen_reward": 0.0,
        "omega": 0.5,
        "advantage": 3.0,
        "truncated": True,
        "tokens": 5,
        "gold": 7,
        "gold_parts": {"correct": 0.0, "length": -0.5},
        "attention": None,
    }
    assert records[9]["attention"] == [["fox", 0.75], ["red", 0.25]]
    assert json.loads(json.dumps(records)) == records


def test_no_rows_are_kept_when_none_are_wanted(trajectories, annotation):
    assert rollout_records(1, trajectories, annotation, ADVANTAGE, 1.0, limit=0) == []


def test_merged_stats_keep_machine_dependent_keys_apart():
    stats = {"loss": 1, "time/forward": 2.5, "memory/rss": 10, "timer": 3.0}
    assert merge_stats("policy", stats) == {
        "policy/loss": 1.0,
        "time/policy/forward": 2.5,
        "memory/policy/rss": 10.0,
        "policy/timer": 3.0,
    }


def test_group_correlation_ignores_shift_and_scale():
    generator = torch.Generator().manual_seed(0)
    x_GK, y_GK = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    expected_G = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x_GK, y_GK, strict=True)]
    )
    torch.testing.assert_close(group_correlation(x_GK, y_GK), expected_G, rtol=0, atol=1e-12)
    torch.testing.assert_close(group_correlation(3 * x_GK - 1, y_GK), expected_G, rtol=0, atol=1e-12)


def test_mean_of_nothing_is_undefined():
    assert mean(x for x in (1.0, 2.0, 6.0)) == 3.0
    assert math.isnan(mean([]))


def spoiled(annotation: list[Annotation], **values: dict[int, float]) -> list[Annotation]:
    """The first shard's scores with some of them replaced, by row."""
    scores = {field: getattr(annotation[0], field).clone() for field in values}
    for field, rows in values.items():
        for row, value in rows.items():
            scores[field][row] = value
    return [replace(annotation[0], **scores), *annotation[1:]]


def test_what_is_not_finite_is_counted_and_left_out(trajectories, annotation):
    broken = spoiled(annotation, reward_N={0: math.nan, 1: math.inf}, frozen_reward_N={1: math.nan})
    metrics = step_metrics(trajectories, broken, ADVANTAGE, 0.75, GOLD)
    assert (metrics["reward/nonfinite"], metrics["hidden/nonfinite"]) == (2, 1)
    # Rows 2 to 11 over rows; the second and third group over groups.
    assert metrics["reward/mean"] == pytest.approx(27 / 10)
    assert metrics["reward/frozen_mean"] == pytest.approx((25 - 6) / 10)
    assert metrics["reward/frozen_gap"] == pytest.approx((27 - 19) / 10)
    assert metrics["reward/group_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert metrics["reward/zero_std_groups"] == 0.5
    assert metrics["reward/pair_flip_rate"] == 1.0
    assert metrics["gold/mean"] == pytest.approx(41 / 12)
    assert metrics["gold/group_std"] == pytest.approx(math.sqrt(2.75 / 4) / 2)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_step_without_a_finite_reward_is_undefined_not_wrong(trajectories, annotation):
    nothing = [replace(shard, reward_N=shard.reward_N * math.nan) for shard in annotation]
    metrics = step_metrics(trajectories, nothing, ADVANTAGE, 0.75, GOLD)
    assert metrics["reward/nonfinite"] == metrics["hidden/nonfinite"] == 12
    for key in ("reward/mean", "reward/group_std", "reward/scale_ratio", "gold/pair_precision"):
        assert math.isnan(metrics[key]), key
    assert metrics["response/length_mean"] == 2


def test_a_group_with_a_broken_reward_has_no_winner(trajectories, annotation):
    broken = spoiled(annotation, reward_N={2: math.nan})
    records = rollout_records(1, trajectories[:1], broken[:1], ADVANTAGE[:1], 1.0, limit=8)
    assert [record["role"] for record in records] == ["none"] * 4 + ["loser", "none", "none", "winner"]


def test_greedy_rows_are_no_samples(trajectories, annotation):
    metrics = step_metrics(trajectories, annotation, ADVANTAGE, 0.75, GOLD, greedy_first=True)
    # Rows 0, 4 and 8 are greedy: rewards 1, −1, 5; frozen 2, 3, 0; 3, 1 and 5 tokens; gold 1, 1, 7.
    assert metrics["reward/greedy_mean"] == pytest.approx(5 / 3)
    assert metrics["reward/mean"] == pytest.approx(25 / 9)
    assert metrics["reward/frozen_mean"] == pytest.approx(20 / 9)
    assert metrics["response/length_mean"] == pytest.approx(15 / 9)
    assert metrics["response/truncated_fraction"] == 0
    assert metrics["response/empty_fraction"] == pytest.approx(4 / 9)
    assert metrics["gold/mean"] == pytest.approx(32 / 9)
    # Groups are whole: the reward head learns from all of their rows.
    whole = step_metrics(trajectories, annotation, ADVANTAGE, 0.75, GOLD)
    for key in ("reward/group_std", "reward/pair_flip_rate", "gold/correlation", "response/tokens"):
        assert metrics[key] == whole[key], key
