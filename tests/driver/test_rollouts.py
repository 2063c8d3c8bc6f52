"""The rows of rollouts.jsonl: their texts, scores and roles, and what the head attended to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_roles import World, rows_of

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import RowText
from r2m_ray.driver.rollouts import Example, rollout_records
from r2m_ray.driver.rows import Rows

OWN = [1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0]


def records(rows: Rows, attention: Sequence[tuple[float, ...] | None]) -> list[dict[str, Any]]:
    advantage = [torch.arange(8.0), torch.arange(8.0, 12.0)]
    examples = [
        Example(RowText(prompt=f"prompt {n // 4}", response=f"response {n}", tokens=("fox", "red")), weights)
        for n, weights in enumerate(attention)
    ]
    return [*rollout_records(3, 0.5, rows, advantage, examples)]


def roles(rows: Rows) -> list[str]:
    return [record["role"] for record in records(rows, [None] * len(rows.reward_N))]


def test_records_have_everything_a_reader_needs() -> None:
    rows = rows_of(
        OWN, group_size=4, gold=[7.0] * 12, truncated_N=torch.arange(12) == 8, length_N=torch.arange(12)
    )
    rows = replace(rows, gold={**rows.gold, "correct": torch.zeros(12)})
    found = records(rows, [None] * 9 + [(0.75, 0.25)])
    assert [record["row"] for record in found] == list(range(10))
    assert [record["group"] for record in found] == [0] * 4 + [1] * 4 + [2] * 2
    assert found[8] == {
        "step": 3, "group": 2, "row": 8, "prompt": "prompt 2", "response": "response 8", "role": "none",
        "reward": 5.0, "frozen_reward": 0.0, "omega": 0.5, "advantage": 8.0, "truncated": True, "tokens": 8,
        "gold": 7.0, "gold_parts": {"correct": 0.0}, "attention": None,
    }  # fmt: skip
    assert found[9]["attention"] == [["fox", 0.75], ["red", 0.25]]
    assert json.loads(json.dumps(found)) == found
    unknown = records(rows_of(OWN, group_size=4), [None])
    assert unknown[0]["gold"] is unknown[0]["gold_parts"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"response_id_N": torch.tensor([0, 1, 2, 0, *range(8)])},
        {"reward_N": torch.tensor([1, 2, math.nan, *OWN[3:]])},
    ],
    ids=["equal tokens", "broken reward"],
)
def test_winner_and_loser_are_those_of_the_bradley_terry_pair(changes: dict[str, torch.Tensor]) -> None:
    pair = ["loser", "none", "none", "winner"]
    assert roles(rows_of(OWN, group_size=4)) == [*pair, *pair, *["none"] * 4]
    assert roles(rows_of(OWN, group_size=4, **changes)) == [*["none"] * 4, *pair, *["none"] * 4]


def test_the_first_rows_of_a_step_are_kept_with_the_attention_behind_their_rewards(
    config: Config, world: World
) -> None:
    """The head is read before its update, on the h of the annotation."""
    config.logging.rollouts_per_step = 5  # One more than a shard has.
    run = world.train(config)
    found = [row for row in run.rollouts if row["step"] == 2]
    assert [(row["row"], row["group"], row["response"]) for row in found] == [
        (0, 0, "w0"), (1, 0, "w1"), (2, 1, "w0"), (3, 1, "w1"), (4, 2, "w0"),
    ]  # fmt: skip
    assert len(run.rollouts) == 3 * 5
    assert [row["prompt"] for row in found[::2]] == run.fake.of("sample")[1][2][:3]
    # One update of the head moves its attention by one token.
    assert found[0]["attention"] == [["t0", 0.0], ["t1", 1.0], ["t2", 0.0]]
    assert run.fake.of("attention") == [(f"h of step {t}",) for t in (1, 1, 2, 2, 3, 3)]
    # 5 rows: prompt, 2 characters of response, 3 tokens of 2 characters, 3 weights of 8 bytes.
    text = sum(len(row["prompt"]) for row in found)
    assert run.rows("step")[1]["bytes/records"] == text + 5 * (2 + 3 * 2 + 3 * 8)


def test_nothing_is_read_where_no_rows_are_wanted(config: Config, world: World) -> None:
    config.logging.rollouts_per_step = 0
    run = world.train(config)
    assert run.rollouts == run.fake.of("texts") == run.fake.of("attention") == []
    assert [row["bytes/records"] for row in run.rows("step")] == [0, 0, 0]


def test_without_feedback_no_attention_is_read(config: Config, world: World) -> None:
    config.reward.omega_floor = 1.0
    run = world.train(config)
    assert run.fake.of("attention") == []
    assert [row["attention"] for row in run.rollouts] == [None] * 9
