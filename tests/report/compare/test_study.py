"""A whole comparison of synthetic arms: pairing, censoring, and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from curve_fixtures import make_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_ray.errors import RunError
from r2m_ray.report.compare.curves import Comparison, comparison
from r2m_ray.report.compare.matched import mean_peak
from r2m_ray.report.compare.study import SHARED_NAME, Study, study
from r2m_ray.report.compare.tables import markdown, record, write_tables

Effects = dict[int, float]

SHIFTS = {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3}


def parabola(kl: np.ndarray, *, slope: float = 0.0) -> np.ndarray:
    """Gold that peaks at KL 3 and falls, plus ``slope`` per nat."""
    return 1 - (kl - 3) ** 2 / 9 + slope * kl


def arms(effects: Effects, *, short: float = 0.5) -> Comparison:
    """vanilla; steep, better by SHIFTS per nat; slow, the same path no further than ``short`` of vanilla's.

    effects: added to every arm of a seed alike.
    """
    kl = np.linspace(0, 15, 16)
    curves = []
    for seed, effect in effects.items():
        steep = parabola(kl, slope=SHIFTS[seed])
        curves += [
            make_curve(kl, parabola(kl) + effect, seed=seed),
            make_curve(kl, steep + effect, arm="steep", seed=seed),
            make_curve(short * kl, parabola(short * kl) + effect, arm="slow", seed=seed),
        ]
    return comparison(curves, "vanilla")


def studied(compared: Comparison) -> Study:
    return study(compared, mean_peak(compared.curves(compared.baseline)))


def test_contrasts_are_differences_at_the_same_kl() -> None:
    found = studied(arms(dict.fromkeys(SHIFTS, 0.0)))
    assert (found.peak.kl, found.peak.gold, found.peak.step) == (3, 1, 15)
    for multiple in (1, 2, 4):
        contrast = found.contrasts[f"gold_at_{multiple}_kl_star"]["steep"]
        assert contrast.differences == pytest.approx([3 * multiple * s for s in SHIFTS.values()])
        assert contrast.interval is not None
        assert contrast.interval.mean == pytest.approx(0.25 * 3 * multiple)
        assert 0 < contrast.interval.low < contrast.interval.mean < contrast.interval.high
        assert (contrast.p, contrast.p_holm) == (0.125, 0.25), "four seeds, two arms"
        assert contrast.kl == 3 * multiple
    assert found.contrasts["area"]["steep"].differences == pytest.approx([72 * s for s in SHIFTS.values()])
    assert found.values["fall"]["vanilla"] == pytest.approx((16, 16, 16, 16))
    # 1 − (kl − 3)²/9 = ½ at 3 + 3/√2; straight between 5 and 6 it is met a little earlier.
    assert found.values["fall_kl"]["vanilla"] == pytest.approx([5 + (0.5 - 4 / 9) / (5 / 9)] * 4)


def test_an_arm_that_does_not_get_there_is_censored_and_not_tested() -> None:
    found = studied(arms(dict.fromkeys(SHIFTS, 0.0)))
    far = found.contrasts["gold_at_4_kl_star"]["slow"]
    assert found.values["gold_at_4_kl_star"]["slow"] == (None,) * 4
    assert (far.differences, far.interval, far.p, far.p_holm) == ((None,) * 4, None, None, None)
    assert found.contrasts["area"]["slow"].p is None
    near = found.contrasts["gold_at_2_kl_star"]["slow"]
    assert near.differences == pytest.approx([0.0] * 4), "the same path, as far as it goes"
    assert near.p == 1.0
    shared = found.contrasts[SHARED_NAME]
    assert (shared["slow"].kl, shared["steep"].kl) == (7.5, 12)
    assert shared["steep"].differences == pytest.approx([6 * s for s in SHIFTS.values()])


def test_a_seed_that_is_censored_takes_the_test_but_not_the_others_numbers() -> None:
    kl = np.linspace(0, 15, 16)
    whole = arms(dict.fromkeys(SHIFTS, 0.0))
    short = make_curve(kl / 2, parabola(kl / 2), arm="steep", seed=3)
    curves = [c for arm in whole.arms for c in whole.curves(arm) if (c.arm, c.seed) != ("steep", 3)]
    contrast = studied(comparison([*curves, short], "vanilla")).contrasts["gold_at_4_kl_star"]["steep"]
    assert contrast.differences[:3] == pytest.approx([1.2, 2.4, 4.8])
    assert contrast.differences[3] is None
    assert contrast.interval is not None
    assert contrast.interval.pairs == 3
    assert contrast.p is None


@given(effects=st.lists(st.floats(-50, 50), min_size=4, max_size=4))
@settings(max_examples=10, deadline=None)
def test_what_a_seed_does_to_every_arm_cancels(effects: list[float]) -> None:
    plain = studied(arms(dict.fromkeys(SHIFTS, 0.0)))
    shaken = studied(arms(dict(zip(SHIFTS, effects, strict=True))))
    for name in ("gold_at_1_kl_star", "gold_at_4_kl_star", "area", "final_gold", "fall"):
        ours, theirs = plain.contrasts[name]["steep"], shaken.contrasts[name]["steep"]
        assert ours.interval is not None
        assert theirs.interval is not None
        assert theirs.differences == pytest.approx(ours.differences, abs=1e-9)
        assert theirs.interval.low == pytest.approx(ours.interval.low, abs=1e-9)
        assert theirs.interval.high == pytest.approx(ours.interval.high, abs=1e-9)
        assert theirs.p == ours.p


def test_one_seed_gives_numbers_and_no_claims() -> None:
    found = studied(arms({0: 0.0}))
    contrast = found.contrasts["gold_at_1_kl_star"]["steep"]
    assert contrast.differences == pytest.approx([0.3])
    assert (contrast.interval, contrast.p) == (None, None)
    assert "no interval and no test" in markdown(found)


def test_an_arm_that_never_moves_shares_no_range() -> None:
    kl = np.linspace(0, 15, 16)
    curves = [make_curve(kl, parabola(kl)), make_curve(0 * kl, 0 * kl, arm="still")]
    found = studied(comparison(curves, "vanilla"))
    assert found.contrasts[SHARED_NAME]["still"].differences == (None,)
    assert found.values["final_kl"]["still"] == (0.0,)


def test_the_tables_show_every_seed_and_every_censored_cell(tmp_path: Path) -> None:
    found = studied(arms(SHIFTS))
    text, data = (path.read_text() for path in write_tables(found, tmp_path / "new"))
    assert text == markdown(found)
    assert json.loads(data) == json.loads(json.dumps(record(found)))
    lines = text.splitlines()
    at = lines.index("## Gold at KL* = 3 nats")
    steep = next(line for line in lines[at:] if line.startswith("| steep"))
    assert steep.split(" | ")[1:7] == ["1.400", "1.800", "2.600", "2.200", "2.000", "+0.750"]
    far = lines.index("## Gold at 4 KL* = 12 nats")
    slow = next(line for line in lines[far:] if line.startswith("| slow"))
    assert slow == f"| slow | {' | '.join(['censored'] * 6)} | – | – | – |"
    tables = [line for line in lines if line.startswith("| arm")]
    assert len(tables) == len(found.endpoints) + 1
    assert all(f"seed {seed}" in head for head in tables for seed in SHIFTS)
    assert json.loads(data)["values"]["area"]["slow"] == [None] * 4
    assert "nothing here can be called significant" in " ".join(text.split())


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/below/comparison\.md: cannot write it: Not a directory"):
        write_tables(studied(arms(SHIFTS)), tmp_path / "file" / "below")
