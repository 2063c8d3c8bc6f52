"""Evaluation: which rows are sampled and how they are grouped, and what held-out pairs say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from fake_roles import FakeRoles, Verdict, World, opened

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Prompt
from r2m_ray.tasks.data import PreferencePair

VERDICTS = {
    "good": Verdict(own=3.0, frozen=0.0, gold=2.0),
    "fair": Verdict(own=1.0, frozen=1.0, gold=1.0),
    "bad": Verdict(own=0.0, frozen=2.0, gold=-1.0),
    "broken": Verdict(own=math.inf, frozen=2.0, kl=math.nan),
}
WORDS = ("good", "bad", "fair", "good")


def words(step: int, prompt: Prompt, row: int) -> str:
    return WORDS[(prompt.index + row) % 4]


@pytest.fixture
def fake() -> FakeRoles:
    return FakeRoles(respond=words, judge=VERDICTS.__getitem__)


@pytest.fixture
def world(world: World) -> World:
    return replace(world, eval_prompts=[f"w{i}" for i in range(5)])


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt="w1 w2", chosen=f"w3 {chosen}", rejected=f"w3 {rejected}")


def test_single_responses_fill_a_shard_of_training(config: Config, world: World, fake: FakeRoles) -> None:
    found = world.measure(config, fake)
    shards = [(len(shard.layout.row_T), shard.layout.group_size) for shard in opened(fake.given["sample"])]
    # A shard of training has 2 groups of 2 rows; a row has 3 input tokens.
    assert shards == [(4 * 3, 1), (1 * 3, 1)]
    # good, bad, fair, good, good
    assert found["gold/mean"] == pytest.approx((3 * 2 + 1 - 1) / 5)
    assert found["reward/frozen_gap"] == pytest.approx((3 * 3 + 0 - 2) / 5)
    assert not {"gold/correlation", "reward/group_std"} & set(found)


def test_several_responses_are_compared_within_their_prompt(
    config: Config, world: World, fake: FakeRoles
) -> None:
    config.evaluate.prompts, config.evaluate.responses_per_prompt = 3, 3
    found = world.measure(config, fake)
    # A shard has four rows in training, and one complete group here.
    assert [shard.layout.group_size for shard in opened(fake.given["sample"])] == [3, 3, 3]
    # Groups good bad fair, bad fair good, fair good good: the own order is gold's, the frozen one not.
    assert found["gold/order_accuracy"] == found["gold/pair_precision"] == 1.0
    assert found["gold/frozen_order_accuracy"] == 0.0
    assert found["reward/pair_flip_rate"] == 1.0
    own, frozen = [math.sqrt(14 / 9)] * 2 + [math.sqrt(8 / 9)], [math.sqrt(2 / 3)] * 2 + [math.sqrt(2 / 9)]
    assert found["reward/group_std"] == pytest.approx(sum(own) / 3)
    assert found["reward/scale_ratio"] == pytest.approx(sum(own) / sum(frozen))
    assert found["gold/mean"] == pytest.approx((2 + 2 + 5) / 9)


def test_averages_are_over_what_is_finite(config: Config, world: World) -> None:
    verdicts = {
        "a": Verdict(own=1.0, frozen=1.0, kl=1.0),
        "": Verdict(own=math.inf, frozen=2.0, kl=1.0),
        "b…": Verdict(own=3.0, frozen=6.0, kl=math.nan),
    }
    texts = ("a", "", "w7 b…")
    fake = FakeRoles(respond=lambda _step, prompt, _row: texts[prompt.index], judge=verdicts.__getitem__)
    found = replace(world, eval_prompts=["w1", "w2", "w3"]).measure(config, fake)
    expected = {
        "reward/mean": 2.0, "reward/nonfinite": 1.0, "hidden/nonfinite": 1.0, "reward/frozen_mean": 3.5,
        "reward/frozen_gap": -1.5, "kl/sequence": 1.0, "kl/token": 2 / 3, "response/length_mean": 5 / 3,
        "response/truncated_fraction": 1 / 3, "response/empty_fraction": 1 / 3,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_every_evaluation_samples_the_same_rows_at_the_final_omega(config: Config, world: World) -> None:
    fake = world.train(config).fake
    asked = [call for call in fake.of("sample") if call[0] == 0]
    assert [call[1] for call in asked] == [0, 2, 3]
    assert [call[2] for call in asked] == [[f"w{i}" for i in range(5)]] * 3
    assert {omega for step, omega, _ in fake.of("annotate") if step == 0} == {0.6}


def test_pairs_and_their_counterfactual_kinds_are_measured_apart(
    config: Config, world: World, fake: FakeRoles
) -> None:
    config.evaluate.pairs = 3
    kinds = {
        "style": [pair("fair", "good")] * 2 + [pair("good", "fair")],
        "value": [pair("good", "bad")] * 2,
        "none": [],
    }
    pairs = [pair("good", "bad"), pair("fair", "bad"), pair("bad", "fair"), pair("good", "fair")]
    found = replace(world, eval_prompts=[], eval_pairs=pairs, counterfactual_pairs=kinds).measure(
        config, fake
    )
    # Margins of three of the four pairs, as ``evaluate.pairs`` says: 3, 1 and −1, frozen −2, −1 and 1, in the
    # bins of σ(1), σ(2) and σ(3).
    one, two, three = (1 / (1 + math.exp(-m)) for m in (1, 2, 3))
    assert found == pytest.approx(
        {
            "pairs/accuracy": 2 / 3,
            "pairs/frozen_accuracy": 1 / 3,
            "pairs/style_accuracy": 1 / 3,
            "pairs/frozen_style_accuracy": 2 / 3,
            "pairs/value_accuracy": 1.0,
            "pairs/frozen_value_accuracy": 0.0,
            "pairs/calibration_error": (1 - three + 2 * abs(0.5 - one)) / 3,
            "pairs/frozen_calibration_error": (two + 2 * abs(0.5 - one)) / 3,
        }
    )
    # Shards of two pairs; the held-out ones come alone, so that their numbers do not depend on the others.
    assert [[len(prompts) for prompts in shards] for (shards,) in fake.of("states")] == [[2, 1], [2, 2, 1]]
