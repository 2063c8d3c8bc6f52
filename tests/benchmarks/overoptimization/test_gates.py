"""The gates before any arm: what a world's models and its baseline must reach, and whether h informs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from curve_fixtures import make_curve

from benchmarks.overoptimization.gates import (
    baseline_gate,
    baseline_gates,
    policy_gate,
    rank_correlation,
    reward_gate,
)
from benchmarks.overoptimization.information import (
    Explained,
    Information,
    Regime,
    information,
    precheck_failures,
)

GOOD = [0.0, 0.3, 0.5, 0.4, 0.2, 0.0, -0.1, -0.2, -0.2, -0.3, -0.4]


@pytest.mark.parametrize(
    ("gold", "proxy", "failures"),
    [
        (GOOD, range(11), []),
        ([g * 0.39 for g in GOOD], range(11), ["rises by 0.20, less", "falls by 0.35"]),
        (GOOD[::-1], range(11), ["gold peaks at 80%, not 10%–40%"]),
        (GOOD, range(11, 0, -1), ["does not rise steadily (trend -1.00)"]),
        (sorted(GOOD), range(11), ["gold peaks at 100%, not 10%–40%", "gold falls by 0.00"]),
    ],
)
def test_a_baseline_over_optimizes_or_the_gate_says_why_not(
    gold: list[float], proxy: range, failures: list[str]
) -> None:
    (gate,) = baseline_gates([make_curve(range(11), gold, frozen=list(proxy), seed=3)])
    assert len(gate.failures) == len(failures)
    for said, expected in zip(gate.failures, failures, strict=True):
        assert said.startswith("seed 3: ")
        assert expected in said
    assert gate.peak_share == np.argmax(gold) / 10


def test_rank_correlation_by_hand() -> None:
    # d² = 1 + 1 + 1 + 1 of 5 ranks: 1 − 6·4/(5·24).
    assert rank_correlation(np.arange(5.0), np.array([1.0, 0, 3, 2, 9])) == pytest.approx(0.8)
    # Ranks 1, 2½, 2½, 4 against 1, 2, 3, 4.
    assert rank_correlation(np.arange(4.0), np.array([0.0, 5, 5, 7])) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert rank_correlation(np.arange(4.0), np.ones(4)) == 0.0


def world(seed: int, *, share: float) -> Information:
    """400 prompts, 4 responses: gold is a prompt's level, plus style that H_last shows, plus truth and noise.

    Truth has ``share`` of the variance within a prompt, and only h shows it.
    """
    draw = np.random.default_rng(seed)
    prompt_N = np.repeat(np.arange(400), 4)
    style_N, truth_N, noise_N = draw.normal(size=(3, len(prompt_N)))
    level_N = draw.normal(size=400)[prompt_N]
    gold_N = level_N + np.sqrt(0.5) * style_N + np.sqrt(share) * truth_N + np.sqrt(0.5 - share) * noise_N
    reward_NF = np.stack([style_N, *draw.normal(size=(7, len(prompt_N)))], axis=1)
    policy_NF = np.stack([1e3 * truth_N + 7, *draw.normal(size=(19, len(prompt_N)))], axis=1)
    return information(reward_NF, policy_NF, gold_N, prompt_N, seed=seed)


def test_r2_is_the_share_of_variance_that_features_show() -> None:
    found = [world(seed, share=0.3) for seed in range(4)]
    for source, gold, differences in (("reward_model", 0.25, 0.5), ("policy", 0.15, 0.3), ("both", 0.4, 0.8)):
        explained = [getattr(one, source) for one in found]
        # 80 test prompts × 4 seeds: the level's and the noise's sampling error is about .03.
        assert np.mean([e.gold for e in explained]) == pytest.approx(gold, abs=0.07)
        assert np.mean([e.differences for e in explained]) == pytest.approx(differences, abs=0.05)


def test_the_regime_is_told_by_what_h_adds() -> None:
    informative = {seed: world(seed, share=0.45) for seed in range(3)}
    empty = {seed: world(seed, share=0.0) for seed in range(3)}
    assert precheck_failures(informative, Regime.informative) == ()
    assert precheck_failures(empty, Regime.uninformative) == ()
    assert len(precheck_failures(empty, Regime.informative)) == 6
    assert len(precheck_failures(informative, Regime.uninformative)) == 6


def test_both_targets_must_hold_under_three_seeds() -> None:
    one = Information(
        reward_model=Explained(gold=0.3, differences=0.3),
        policy=Explained(gold=0.3, differences=0.3),
        both=Explained(gold=0.45, differences=0.35),
    )
    assert precheck_failures({0: one, 1: one}, Regime.informative) == (
        "2 seeds; the pre-check needs 3.",
        "seed 0: h adds 0.050 to R² of differences within prompts, less than 0.1.",
        "seed 1: h adds 0.050 to R² of differences within prompts, less than 0.1.",
    )


@pytest.mark.parametrize("regime", list(Regime))
def test_a_gain_that_is_no_number_passes_in_no_regime(regime: Regime) -> None:
    unknown = Explained(gold=math.nan, differences=math.nan)
    one = Information(reward_model=unknown, policy=unknown, both=unknown)
    assert len(precheck_failures({0: one, 1: one, 2: one}, regime)) == 6


def test_the_pre_check_repeats_and_refuses_what_it_cannot_use() -> None:
    assert world(5, share=0.2) == world(5, share=0.2)
    draw = np.random.default_rng(0)
    features, gold = draw.normal(size=(20, 2)), draw.normal(size=20)
    pairs = np.repeat(np.arange(10), 2)
    with pytest.raises(ValueError, match="one response only"):
        information(features, features, gold, np.arange(20), seed=0)
    with pytest.raises(ValueError, match="policy: features are not finite"):
        information(features, features * np.nan, gold, pairs, seed=0)
    with pytest.raises(ValueError, match="too few"):
        information(features, features, gold, np.repeat([0, 1], 10), seed=0)
    with pytest.raises(ValueError, match="the same for every response"):
        information(features, features, np.ones(20), pairs, seed=0)


def fact(gold: float, rate: float, *, shown: float = 0.6, accuracy: float = 0.7) -> dict[str, Any]:
    return {
        "policy": {"gold": gold, "correction_rate": rate},
        "reward": {"accuracy": accuracy},
        "demonstrator": {"correction_rate": shown},
    }


def test_the_gate_of_the_policy() -> None:
    assert policy_gate({0: fact(0.8, 0.3), 1: fact(1.2, 0.6)}).passed
    assert policy_gate({0: fact(0.9, 0.0, shown=0.0)}).passed, "who is shown no correction need make none"
    failed = policy_gate({0: fact(0.79, 0.5), 1: fact(0.9, 0.29)})
    assert failed.failures == (
        "seed 0: the policy's gold is 0.79, below 0.8.",
        "seed 1: 29% of wrong facts are corrected, below 30%.",
    )


def test_what_is_no_number_passes_no_gate() -> None:
    assert len(policy_gate({0: fact(math.nan, math.nan)}).failures) == 2
    assert len(reward_gate({0: fact(1, 1, accuracy=math.nan)}).failures) == 1


def test_the_gate_of_the_reward_model() -> None:
    assert reward_gate({seed: fact(1, 1, accuracy=a) for seed, a in enumerate((0.64, 0.75))}).passed
    failed = reward_gate({seed: fact(1, 1, accuracy=a) for seed, a in enumerate((0.639, 0.7, 0.76))})
    assert [text[:6] for text in failed.failures] == ["seed 0", "seed 2"]
    assert failed.record()["passed"] is False


def test_the_gate_of_the_baseline_waits_for_every_seed() -> None:
    verdict = baseline_gate([make_curve(range(11), GOOD)], (0, 1))
    assert verdict.failures == ("seed 1: the baseline has not finished.",)
    assert verdict.values["0"]["fall"] == pytest.approx(0.9)
