"""Gold over the dose of a knob: at one KL for all worlds, under the seeds that every dose has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from curve_fixtures import make_curve

from benchmarks.overoptimization.doses import KNOBS, dose_sections, responses, table
from benchmarks.overoptimization.presets import PRESETS
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import Peak

TOP = Peak(arm="rloo", kl=2.0, gold=1.0, step=5, share=0.1)


def straight(arm: str, seed: int, slope: float, end: float = 8.0) -> Curve:
    """Gold that changes by ``slope`` for each nat."""
    return make_curve([0.0, end], [1.0 + seed, 1.0 + seed + slope * end], arm=arm, seed=seed)


def test_gold_is_read_at_one_kl_under_the_seeds_of_every_dose() -> None:
    slopes = {"rloo_bias_0": 0.5, "rloo": 0.0, "rloo_bias_0.5": -0.5}
    seeds = {"rloo_bias_0": (0, 1), "rloo": (0, 1, 2, 3), "rloo_bias_0.5": (0, 1, 2)}
    arms = {arm: [straight(arm, seed, slopes[arm]) for seed in seeds[arm]] for arm in slopes}
    (found,) = responses({"informative": arms}, TOP)
    assert (found.knob.setting, found.seeds, found.kl_star) == ("task.annotator_bias", (0, 1), 2.0)
    assert found.gold["rloo"] == {
        0.0: ((2.0, 3.0), (3.0, 4.0), (5.0, 6.0)),
        0.2: ((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)),
        0.5: ((0.0, 1.0), (-1.0, 0.0), (-3.0, -2.0)),
    }
    rows = table(found).rows
    assert rows[0] == ("rloo", "0", "2.500 (2.000, 3.000)", "3.500 (3.000, 4.000)", "5.500 (5.000, 6.000)")
    assert [row[1] for row in rows] == ["0", "0.2", "0.5"]


def test_a_dose_that_never_reaches_the_kl_is_censored_there() -> None:
    arms = {
        "rloo": [straight("rloo", 0, -0.25)],
        "static_h": [straight("static_h", 0, 0.25)],
    }
    short = {arm: [straight(arm, 0, 0.0, end=5.0)] for arm in ("rloo", "static_h")}
    (found,) = responses({"informative": arms, "self_correct_0": short}, TOP)
    assert found.knob.setting == "task.self_correct_prob"
    assert found.gold["static_h"] == {0.0: ((1.0,), (1.0,), (None,)), 0.6: ((1.5,), (2.0,), (3.0,))}
    assert table(found).rows[0][2:] == ("1.000 (1.000)", "1.000 (1.000)", "censored (censored)")


@pytest.mark.parametrize("top", [TOP, None])
def test_one_dose_alone_or_no_kl_star_is_no_response(top: Peak | None) -> None:
    alone = {"rloo": [straight("rloo", 0, 1.0)]}
    doses = alone | {"rloo_bias_0": [straight("rloo_bias_0", 0, 1.0)]}
    assert responses({"informative": alone}, top) == []
    assert len(responses({"informative": doses}, top)) == (top is not None)


def test_doses_of_different_seeds_are_no_response() -> None:
    arms = {arm: [straight(arm, i, 1.0)] for i, arm in enumerate(("rloo", "rloo_bias_0"))}
    assert responses({"informative": arms}, TOP) == []


def test_every_place_of_every_knob_is_run_by_the_preset() -> None:
    preset = PRESETS["doses"]
    run = {(world.name, arm.name) for world in preset.worlds for arm, _ in preset.runs(world)}
    wanted = {place for knob in KNOBS for doses in knob.lines.values() for place in doses.values()}
    assert run == wanted


def test_what_is_written(tmp_path: Path) -> None:
    peaked = make_curve([0.0, 2.0, 10.0], [0.0, 1.0, -1.0], arm="rloo")
    arms = {"rloo": [peaked], "rloo_bias_0": [straight("rloo_bias_0", 0, 0.1)]}
    (section,) = dose_sections({"informative": arms}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "doses.json", "doses.md", "doses-annotator_bias.png",
    }  # fmt: skip
    (stored,) = json.loads((tmp_path / "doses.json").read_text())
    assert stored["gold"]["rloo"]["0.2"] == [[1.0], [0.5], [-0.5]]
    assert section.tables[0].markdown() in (tmp_path / "doses.md").read_text()
    assert dose_sections({}, tmp_path / "none") == []
