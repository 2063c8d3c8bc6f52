"""Gates 1, 2 and 4: what a world's models and its baseline must reach, and what is told where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from curve_fixtures import make_curve

from benchmarks.overoptimization.gates import baseline_gate, policy_gate, reward_gate


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
    nan = float("nan")
    assert len(policy_gate({0: fact(nan, nan)}).failures) == 2
    assert len(reward_gate({0: fact(1, 1, accuracy=nan)}).failures) == 1


def test_the_gate_of_the_reward_model() -> None:
    assert reward_gate({seed: fact(1, 1, accuracy=a) for seed, a in enumerate((0.64, 0.75))}).passed
    failed = reward_gate({seed: fact(1, 1, accuracy=a) for seed, a in enumerate((0.639, 0.7, 0.76))})
    assert [text[:6] for text in failed.failures] == ["seed 0", "seed 2"]
    assert failed.record()["passed"] is False


def test_the_gate_of_the_baseline_waits_for_every_seed() -> None:
    gold = [1.0, 1.3, 1.5, 1.4, 1.2, 1.0, 0.9, 0.8, 0.8, 0.7, 0.6]
    verdict = baseline_gate([make_curve(range(11), gold)], (0, 1))
    assert verdict.failures == ("seed 1: the baseline has not finished.",)
    assert verdict.values["0"]["fall"] == pytest.approx(0.9)
