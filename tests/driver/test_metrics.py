"""Metrics by hand-worked numbers: three groups of rows, one ordered alike, one flipped, one all equal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_roles import PROMPTS, FakeRoles, Verdict, World, rows_of

from r2m_ray.config.schema import Advantage, Config, RewardScale
from r2m_ray.driver.metrics import (
    batch_metrics,
    calibration_error,
    group_correlation,
    group_skew,
    kl_metrics,
    mean,
    merge_stats,
    order_accuracy,
    pair_metrics,
    step_metrics,
)
from r2m_ray.driver.rows import Rows
from r2m_ray.run.vocabulary import REGISTRY, Source, metric

OWN = [1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0]
FROZEN = [2.0, 4.0, 6.0, 8.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
GOLD = [1.0, 2.0, 3.0, 4.0, 3.0, 0.0, 0.0, 2.0, 7.0, 7.0, 7.0, 7.0]
LENGTHS = torch.tensor([3, 1, 2, 2, 1, 1, 1, 1, 5, 2, 2, 3])
ADVANTAGE = (torch.tensor([1.0, -1.0] * 4), torch.tensor([3.0, -3.0, 0.0, 0.0]))
QUARTER = math.log(3.0)  # A margin at which the worse response is preferred once in four times.


def rows(**changes: Any) -> Rows:
    found = rows_of(
        OWN, FROZEN, gold=GOLD, group_size=4, length_N=LENGTHS, truncated_N=LENGTHS == 5, tokens=48, **changes
    )
    parts = {"correct": torch.arange(12.0).double() % 2, "length": torch.full((12,), -0.5).double()}
    return replace(found, gold={**found.gold, **parts})


def changed(field: str, values: dict[int, float]) -> Rows:
    """The rows with some values of one field replaced, by row."""
    tensor = getattr(rows(), field).clone()
    for row, value in values.items():
        tensor[row] = value
    return replace(rows(), **{field: tensor})


def test_metrics_of_a_batch_equal_the_hand_worked_numbers() -> None:
    own_stds = (math.sqrt(1.25), math.sqrt(0.5), 0.0)
    frozen_stds = (2 * math.sqrt(1.25), math.sqrt(6.75 / 4), 0.5)
    # Gold of the second group separates rows 0 and 3 from all others, and from each other.
    gold = torch.tensor([1.75, -1.25, -1.25, 0.75])
    of_gold = float(gold.square().sum())
    own_correlation = float(gold @ torch.tensor([-1.0, 0.0, 0.0, 1.0])) / math.sqrt(of_gold * 2.0)
    frozen_correlation = float(gold @ torch.tensor([2.25, -0.75, -0.75, -0.75])) / math.sqrt(of_gold * 6.75)
    assert batch_metrics(rows()) == pytest.approx(
        {
            "response/tokens": 24,
            "response/length_mean": 2.0,
            "response/length_max": 5.0,
            "response/truncated_fraction": 1 / 12,
            "response/empty_fraction": 5 / 12,
            "reward/mean": 30 / 12,
            "reward/std": math.sqrt((30 + 2 + 100) / 12 - 2.5**2),
            "reward/frozen_mean": 25 / 12,
            "reward/frozen_std": math.sqrt((120 + 9 + 2) / 12 - (25 / 12) ** 2),
            "reward/frozen_gap": 5 / 12,
            "reward/frozen_correlation": (1 - 3 / math.sqrt(2 * 6.75)) / 2,
            "reward/group_std": sum(own_stds) / 3,
            "reward/frozen_group_std": sum(frozen_stds) / 3,
            "reward/scale_ratio": sum(own_stds) / sum(frozen_stds),
            "reward/group_entropy": (1.013082 + 0.988400) / 2,
            "reward/group_skew": 0.0,
            "reward/pair_flip_rate": 0.5,
            "reward/zero_std_groups": 1 / 3,
            "reward/nonfinite": 0.0,
            "hidden/nonfinite": 0.0,
            "gold/mean": 43 / 12,
            "gold/group_std": (math.sqrt(1.25) + math.sqrt(of_gold / 4)) / 3,
            "gold/correlation": (1 + own_correlation) / 2,
            "gold/frozen_correlation": (1 + frozen_correlation) / 2,
            "gold/order_accuracy": (6 + 2) / 11,
            "gold/frozen_order_accuracy": (6 + 3) / 11,
            "gold/pair_precision": 0.5,
            "gold/correct": 0.5,
            "gold/length": -0.5,
        },
        abs=1e-6,
    )


def test_a_step_adds_its_own_numbers_and_those_of_the_roles() -> None:
    config = Config()
    config.reward.scale = RewardScale.match_frozen
    stats = {"loss": 1, "time/forward": 2.5, "memory/rss": 10, "timer": 3.0}
    found = step_metrics(config, 0.75, rows(), ADVANTAGE, [], stats, {"loss": 2.0}, {"bytes": 3.0})
    own_std, frozen_std = found["reward/group_std"], found["reward/frozen_group_std"]
    added = {
        "omega": 0.75,
        "tokens": 48.0,
        "advantage/std": math.sqrt((8 + 18) / 12),
        "reward/scale_factor": frozen_std / own_std,
        # 12 rows of 3 integers of 8 bytes, or 2; 2 flags of 1; 4 float32; and 3 parts of gold in float64.
        "bytes/driver": 12 * (2 * 8 + 2 + 4 * 4 + 3 * 8),
        "bytes/records": 0.0,
        "policy/loss": 1.0,
        "time/policy/forward": 2.5,
        "memory/policy/rss": 10.0,
        "policy/timer": 3.0,
        "rm/loss": 2.0,
        "sync/bytes": 3.0,
    }
    assert found == pytest.approx(batch_metrics(rows()) | added, rel=1e-6)
    assert merge_stats("policy", stats)["time/policy/forward"] == 2.5
    config.reward.scale = RewardScale.raw
    unscaled = step_metrics(config, 0.75, rows(), ADVANTAGE, [], stats, {"loss": 2.0}, {"bytes": 3.0})
    assert unscaled == found | {"reward/scale_factor": 1.0}, "what is reported is what was annotated"


def test_step_and_evaluation_give_the_same_rows_the_same_numbers_under_names_of_the_registry(
    config: Config, world: World
) -> None:
    """Both read four groups of the same responses, and every name that they log is known for its kind."""

    def judge(word: str) -> Verdict:
        n = float(word[1:])
        return Verdict(own=n * n, frozen=3 - n, gold=n / 3, kl=0.25)

    config.algo.prompts_per_step, config.algo.responses_per_prompt = 4, 4
    config.evaluate.responses_per_prompt = 4
    world = replace(world, eval_prompts=PROMPTS[:4], eval_pairs=world.train_pairs)
    run = world.train(config, FakeRoles(judge=judge, respond=lambda _step, prompt, j: f"w1 w{j}"))
    step, evaluation = run.rows("step")[0], run.rows("eval")[0]
    shared = {name for name, known in REGISTRY.items() if known.source is Source.both} | {"gold/right"}
    assert shared <= set(step), shared - set(step)
    assert {name: step[name] for name in shared} == {name: evaluation[name] for name in shared}
    for row, other in ((step, Source.evaluation), (evaluation, Source.step)):
        for name in set(row) - {"step", "kind"}:
            assert name not in REGISTRY or REGISTRY[metric(name)].source is not other, name
    assert evaluation["kl/sequence"] == 0.25


def test_kl_is_over_rows_that_have_one() -> None:
    found = rows_of(
        [0.0] * 3, group_size=1, length_N=torch.tensor([2, 1, 2]), kl_N=torch.tensor([1.0, 1.0, math.nan])
    )
    assert kl_metrics(found) == pytest.approx({"kl/sequence": 1.0, "kl/token": 2 / 3})


def test_a_batch_without_any_spread_is_undefined_not_wrong() -> None:
    found = batch_metrics(rows_of(OWN[8:], FROZEN[8:], group_size=4))
    assert found["reward/zero_std_groups"] == 1
    for name in ("group_entropy", "pair_flip_rate", "frozen_correlation", "group_skew"):
        assert math.isnan(found[f"reward/{name}"]), name
    assert 0 < found["reward/scale_ratio"] < 1e-5
    assert not any(key.startswith("gold/") for key in found)


def test_a_vanilla_batch_reads_as_the_frozen_reward_model() -> None:
    found = batch_metrics(rows_of(FROZEN, FROZEN, group_size=4))
    assert (found["reward/frozen_gap"], found["reward/scale_ratio"]) == (0, 1)
    assert found["reward/pair_flip_rate"] == 0
    assert found["reward/frozen_correlation"] == pytest.approx(1, abs=1e-12)


def test_single_responses_have_no_quantities_of_groups() -> None:
    found = batch_metrics(rows_of(OWN, FROZEN, gold=GOLD, group_size=1))
    assert (found["reward/mean"], found["gold/mean"]) == pytest.approx((30 / 12, 43 / 12))
    groups = ("group_std", "scale_ratio", "group_entropy", "correlation", "accuracy", "precision", "flip")
    assert [name for name in found if any(word in name for word in groups)] == []


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    broken = replace(
        changed("reward_N", {0: math.nan, 1: math.inf}),
        frozen_reward_N=changed("frozen_reward_N", {1: math.nan}).frozen_reward_N,
    )
    found = batch_metrics(broken)
    assert (found["reward/nonfinite"], found["hidden/nonfinite"]) == (2, 1)
    # Rows 2 to 11 over rows; the second and third group over groups.
    assert found["reward/mean"] == pytest.approx(27 / 10)
    assert found["reward/frozen_mean"] == pytest.approx((25 - 6) / 10)
    assert found["reward/frozen_gap"] == pytest.approx((27 - 19) / 10)
    assert found["reward/group_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert (found["reward/zero_std_groups"], found["reward/pair_flip_rate"]) == (0.5, 1.0)
    assert found["gold/mean"] == pytest.approx(43 / 12)
    assert found["gold/frozen_order_accuracy"] == 3 / 5
    assert all(math.isfinite(value) for value in found.values())


def test_a_batch_without_a_finite_reward_is_undefined_not_wrong() -> None:
    found = batch_metrics(replace(rows(), reward_N=torch.full((12,), math.nan)))
    assert found["reward/nonfinite"] == found["hidden/nonfinite"] == 12
    for key in ("reward/mean", "reward/group_std", "reward/scale_ratio", "gold/pair_precision"):
        assert math.isnan(found[key]), key
    assert math.isnan(mean([]))
    assert found["response/length_mean"] == 2


def test_equal_tokens_make_no_pair() -> None:
    twins = changed("response_id_N", {7: 4})
    assert batch_metrics(twins)["gold/pair_precision"] == 1.0
    assert batch_metrics(twins)["reward/pair_flip_rate"] == 0.0


def test_greedy_rows_are_no_samples() -> None:
    config = Config()
    config.algo.advantage = Advantage.remax
    found = step_metrics(config, 0.75, rows(), ADVANTAGE, [], {}, {}, {})
    # Rows 0, 4 and 8 are greedy: rewards 1, −1, 5; frozen 2, 3, 0; 3, 1 and 5 tokens; gold 1, 3, 7.
    assert found["reward/greedy_mean"] == pytest.approx(5 / 3)
    assert found["reward/mean"] == pytest.approx(25 / 9)
    assert found["reward/frozen_mean"] == pytest.approx(20 / 9)
    assert found["response/length_mean"] == pytest.approx(15 / 9)
    assert found["response/truncated_fraction"] == 0
    assert found["response/empty_fraction"] == pytest.approx(4 / 9)
    assert found["gold/mean"] == pytest.approx(32 / 9)
    # Groups are complete: the reward head learns from all of their rows.
    complete = batch_metrics(rows())
    for key in ("reward/group_std", "reward/pair_flip_rate", "gold/correlation", "response/tokens"):
        assert found[key] == complete[key], key


def test_a_tie_of_the_reward_is_wrong_and_one_of_gold_is_no_pair() -> None:
    reward_GK = torch.tensor([[1.0, 1.0, 2.0]])
    assert order_accuracy(reward_GK, torch.tensor([[0.0, 1.0, 1.0]])) == 0.5
    assert math.isnan(order_accuracy(reward_GK, torch.zeros(1, 3)))
    # As floating-point sums of tenths have it: equal within 1e-9, and so no pair of either metric.
    gold = [0.1 + 0.2, 0.3, 0.3]
    assert gold[0] != gold[1]
    found = batch_metrics(rows_of([0.0, 2.0, 1.0], group_size=3, gold=gold))
    assert math.isnan(found["gold/order_accuracy"])
    assert math.isnan(found["gold/pair_precision"])
    apart = batch_metrics(rows_of([0.0, 2.0, 1.0], group_size=3, gold=[0.3, 0.3 + 1e-8, 0.3]))
    assert apart["gold/order_accuracy"] == apart["gold/pair_precision"] == 1.0


@pytest.mark.parametrize("size", [3, 4, 8, 16])
def test_one_stand_out_has_the_greatest_skew(size: int) -> None:
    rewards = torch.zeros(1, size)
    rewards[0, 1] = 5.0
    bound = (size - 2) / math.sqrt(size - 1)
    assert float(group_skew(rewards)) == pytest.approx(bound, abs=1e-9)
    assert float(group_skew(-3 * rewards + 1)) == pytest.approx(-bound, abs=1e-9)
    draws = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    assert group_skew(draws).abs().max() <= bound + 1e-9


def test_group_correlation_ignores_shift_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x_GK, y_GK = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    expected_G = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x_GK, y_GK, strict=True)]
    )
    torch.testing.assert_close(group_correlation(x_GK, y_GK), expected_G, rtol=0, atol=1e-12)
    torch.testing.assert_close(group_correlation(3 * x_GK - 1, y_GK), expected_G, rtol=0, atol=1e-12)


def margins(*values: float) -> torch.Tensor:
    return torch.tensor([[value, 0.0] for value in values])


def test_accuracy_counts_the_first_response_as_the_better_one() -> None:
    own, frozen = margins(1.0, -1.0, 0.0, 2.0), margins(1.0, 1.0, 1.0, 0.0)
    assert pair_metrics(own, frozen) == {"pairs/accuracy": 0.5, "pairs/frozen_accuracy": 0.75}
    assert set(pair_metrics(own, frozen, "style")) == {"pairs/style_accuracy", "pairs/frozen_style_accuracy"}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        # Right as often as the confidence says.
        ([QUARTER, QUARTER, QUARTER, -QUARTER], 0.0),
        ([0.0, 0.0], 0.0),
        # Four pairs at ¾ are all right: off by ¼. One is sure and wrong: off by 1.
        ([QUARTER] * 4 + [-50.0], (4 * 0.25 + 1.0) / 5),
        # In one bin errors of opposite sign cancel: sure, and right one time in two.
        ([50.0, -50.0], 0.5),
        # What is not finite is left out.
        ([math.nan, math.inf, 50.0], 0.0),
        ([math.nan], math.nan),
    ],
)
def test_calibration_error_is_the_mean_gap_of_the_bins(values: list[float], error: float) -> None:
    assert calibration_error(margins(*values)) == pytest.approx(error, abs=1e-7, nan_ok=True)
