"""Intervals and tests of paired differences: coverage on known effects, hand-worked values, pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from r2m_ray.report.compare.statistics import (
    holm,
    limits,
    paired_interval,
    pairs_needed,
    sign_flip_p,
    smallest_p,
    typical_coverage,
)

differences = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_an_interval_covers_a_known_effect_as_often_as_it_says(pairs: int) -> None:
    trials, effect = 1500, 0.7
    noise = np.random.default_rng(pairs).normal(effect, 2.0, size=(trials, pairs))
    intervals = [paired_interval(row) for row in noise]
    covered = np.mean([i.low <= effect <= i.high for i in intervals])
    expected = typical_coverage(pairs)
    # Four binomial standard deviations (1 in 16,000), and the half percent to which `expected` is known.
    band = 4 * math.sqrt(expected * (1 - expected) / trials) + 0.005
    assert abs(covered - expected) < band
    assert expected <= 0.95


def test_three_seeds_make_the_interval_their_range() -> None:
    # All three draws hit the lowest in 1 of 27 resamples, which is more than 2.5 %.
    interval = paired_interval([0.1, 0.4, 0.2])
    assert (interval.low, interval.high) == (pytest.approx(0.1), pytest.approx(0.4))
    assert interval.mean == pytest.approx(0.7 / 3)
    assert interval.pairs == 3


@given(values=differences)
@settings(max_examples=30, deadline=None)
def test_an_interval_repeats_lies_in_the_data_and_moves_with_it(values: list[float]) -> None:
    interval = paired_interval(values)
    assert interval == paired_interval(values)
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    moved = paired_interval([2 * v + 3 for v in values])
    assert moved.low == pytest.approx(2 * interval.low + 3, abs=1e-6)
    assert moved.high == pytest.approx(2 * interval.high + 3, abs=1e-6)


def test_sign_flip_by_hand() -> None:
    # |±1 ±2 ±4| ≥ |1 + 2 − 4| = 1 holds for all 8 patterns; ≥ 5 for 1−2… : 7, 5, 3, 1 and their opposites.
    assert sign_flip_p([1, 2, -4]) == 1.0
    assert sign_flip_p([-1, 2, 4]) == 0.5
    assert sign_flip_p([1, 2, 4]) == 0.25
    assert sign_flip_p([3.0]) == 1.0
    assert sign_flip_p([0, 0, 0]) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625


@given(values=st.lists(st.integers(-100, 100).map(lambda n: n / 8), min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_sign_flip_is_scipys_permutation_test(values: list[float]) -> None:
    # Eighths add up without rounding, so both know which patterns are ties.
    by_scipy = permutation_test((np.array(values),), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(values) == pytest.approx(by_scipy.pvalue, abs=1e-12)
    assert sign_flip_p(values) >= smallest_p(len(values))
    assert sign_flip_p([-v for v in values]) == sign_flip_p(values)


def test_holm_by_hand() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    # Ascending .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, and the last may not fall below .06.
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02, "b": 0.02}) == pytest.approx({"a": 0.04, "b": 0.04})
    assert list(holm(p)) == list(p)
    assert holm({}) == {}
    untested = {"a": 0.01, "b": None, "c": 0.03}
    assert holm(untested) == pytest.approx({"a": 0.03, "b": None, "c": 0.06}), "b counts in the family"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(values: list[float]) -> None:
    p = {str(i): value for i, value in enumerate(values)}
    adjusted = holm(p)
    for name, value in p.items():
        after = adjusted[name]
        assert after is not None
        assert value <= after <= min(1.0, len(p) * value)
    ordered = [adjusted[name] for name in sorted(p, key=lambda name: p[name])]
    assert ordered == sorted(ordered, key=lambda value: value or 0.0)


def test_what_few_seeds_can_mean_is_said() -> None:
    assert [pairs_needed(arms) for arms in (1, 5, 20, 25)] == [6, 8, 10, 10]
    for arms in (1, 5, 20, 25):
        assert smallest_p(pairs_needed(arms)) * arms <= 0.05 < smallest_p(pairs_needed(arms) - 1) * arms
    few = limits(5, 20)
    assert "about 83% of the time" in few
    assert "p = 0.062" in few
    assert "needs 10 seeds" in few
    assert "nothing here can be called significant" in few
    assert "leaves room" in limits(10, 20)
    assert "no interval and no test" in limits(1, 3)
