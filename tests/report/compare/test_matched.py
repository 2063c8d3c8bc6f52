"""Gold at matched KL and the measures of a path, against paths whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from curve_fixtures import make_curve
from hypothesis import given
from hypothesis import strategies as st

from r2m_ray.errors import InputError
from r2m_ray.report.compare.matched import (
    Passage,
    area,
    fall,
    fallen,
    first_passage,
    gold_at,
    highest,
    mean_gold,
    mean_peak,
)

finite = st.floats(-10, 10)
# Nats: a KL that only a subnormal number holds is no KL.
nats = st.floats(0, 50).filter(lambda kl: kl == 0 or kl > 1e-9)
paths = st.lists(st.tuples(nats, finite), min_size=1, max_size=12)


def test_a_straight_path_is_matched_exactly() -> None:
    kl = [0, 1, 4, 9, 16]
    curve = make_curve(kl, [2 - 0.5 * k for k in kl])
    for at in (0, 0.3, 1, 2.5, 8.99, 16):
        assert gold_at(curve, at) == pytest.approx(2 - 0.5 * at, abs=1e-12)
    assert area(curve, 10) == pytest.approx(2 * 10 - 0.25 * 100, abs=1e-12)


def test_the_first_passage_counts_where_a_path_goes_back() -> None:
    curve = make_curve([0, 4, 2, 6], [0, 4, -2, -10])
    assert gold_at(curve, 3) == 3, "not what the path has there on its way back or after"
    assert first_passage(curve, 3) == Passage(index=0, fraction=0.75)
    assert gold_at(curve, 4) == 4
    assert gold_at(curve, 5) == -8, "on the way from 2 to 6, three quarters along"
    # 0–4 is a triangle of 8; then gold runs on from −6, where the return meets 4, to −10 at 6.
    assert area(curve, 6) == pytest.approx(8 + (-6 - 10) / 2 * 2, abs=1e-12)


def test_a_path_that_does_not_get_there_is_censored() -> None:
    curve = make_curve([0, 4, 2], [0, 4, 1])
    assert gold_at(curve, 4.0) == 4
    for at in (np.nextafter(4.0, 5.0), 5, 1e6):
        assert gold_at(curve, at) is None
        assert area(curve, at) is None
        assert mean_gold(curve, at) is None
    still = make_curve([0, 0, 0], [1, 2, 3])
    assert (gold_at(still, 0), gold_at(still, 0.1), area(still, 0)) == (1, None, 0)


@given(points=paths, share=st.floats(0, 1))
def test_matched_gold_lies_on_the_path(points: list[tuple[float, float]], share: float) -> None:
    curve = make_curve([0, *(k for k, _ in points)], [1.5, *(g for _, g in points)])
    at = share * curve.max_kl
    passage = first_passage(curve, at)
    assert passage is not None
    assert passage.of(curve.kl) == pytest.approx(at, abs=1e-9)
    assert (curve.kl[: passage.index + 1] <= at).all(), "an earlier evaluation was already there"
    assert gold_at(curve, curve.max_kl + 1) is None


@given(points=paths, share=st.floats(0, 1), scale=st.floats(-3, 3), shift=finite)
def test_area_adds_up_and_follows_gold(
    points: list[tuple[float, float]], share: float, scale: float, shift: float
) -> None:
    kl, gold = [0, *(k for k, _ in points)], [1.5, *(g for _, g in points)]
    curve, end = make_curve(kl, gold), max(kl)
    whole = area(curve, end)
    other = area(make_curve(kl, [scale * g + shift for g in gold]), end)
    assert whole is not None
    assert other == pytest.approx(scale * whole + shift * end, abs=1e-6 * (1 + abs(end)))
    # A middle sum over first passages is an independent integration of the same function.
    cells = 400
    middles = [(i + 0.5) * share * end / cells for i in range(cells)]
    values = [gold_at(curve, at) for at in middles]
    # The sum misses where gold jumps, at most once per evaluation, by no more than a cell of its whole range.
    slack = len(kl) * (np.ptp(gold) + 1) * share * end / cells
    assert area(curve, share * end) == pytest.approx(share * end * np.mean(values), abs=slack + 1e-9)


def test_kl_star_is_of_the_mean_curve_and_not_of_the_luckiest_evaluation() -> None:
    lucky = make_curve([0, 2, 6, 10], [0, 1.0, 0.8, 5.0], seed=0)
    others = [make_curve([0, 4, 8, 30], [0, 2.0, 1.2, -6.0], seed=s) for s in (1, 2)]
    top = mean_peak([lucky, *others])
    assert top is not None
    assert (top.step, top.share) == (5, pytest.approx(1 / 3))
    assert (top.kl, top.gold) == (pytest.approx(10 / 3), pytest.approx(5 / 3))


def test_without_a_rise_or_a_mean_there_is_no_kl_star() -> None:
    assert mean_peak([make_curve([0, 2, 6], [3, 1, 2])]) is None, "highest before training"
    assert mean_peak([make_curve([0, 2, 6], [math.nan] * 3)]) is None
    assert mean_peak([]) is None
    with pytest.raises(InputError, match="evaluated after other steps"):
        mean_peak([make_curve([0, 2, 6], [0, 1, 2]), make_curve([0, 2], [0, 1], seed=1)])


def test_peak_and_fall() -> None:
    curve = make_curve([0, 4, 10, 8, 16], [1, 3, 3, 2, -1])
    assert highest(curve) == 1, "the earliest of equals"
    assert fall(curve) == 4
    assert fall(make_curve([0, 1], [0, 1])) == 0


def test_the_kl_of_a_fall_is_on_the_path() -> None:
    curve = make_curve([0, 4, 10, 8, 16], [1, 3, 3, 2, -1])
    half, most = fallen(curve, 0.5), fallen(curve, 4)
    assert half is not None
    assert most is not None
    assert (half.of(curve.gold), half.of(curve.kl)) == (2.5, 9), "half way from 10 back to 8"
    assert (most.of(curve.gold), most.of(curve.kl)) == (-1, 16)
    assert fallen(curve, 4.001) is None
    dipped = make_curve([0, 1, 2, 3], [2, 0, 5, 4])
    assert fallen(dipped, 1.5) is None, "a dip before the peak is not a fall from it"


def test_mean_gold_is_the_area_over_its_range() -> None:
    assert mean_gold(make_curve([0, 4, 7], [0, 1, 2]), 4) == pytest.approx(0.5)
