"""The published results still follow from the published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curve_fixtures import make_curve

from benchmarks.overoptimization.results import Found, against_controls, studies
from r2m_ray.report.compare.statistics import holm, paired_interval, sign_flip_p
from r2m_ray.report.compare.tables import record

PUBLISHED = Path(__file__).parents[3] / "benchmarks/results/overoptimization/full"
WORLDS = ["informative", "uninformative", "self_correct_0", "self_correct_0.3"]


def read(world: str, name: str) -> Any:
    return json.loads((PUBLISHED / world / name).read_text())


@pytest.mark.parametrize("world", WORLDS)
def test_intervals_and_tests_are_those_of_the_published_differences(world: str) -> None:
    for arms in (arms for family in read(world, "comparison.json")["families"]
                 for arms in family["contrasts"].values()):  # fmt: skip
        for contrast in arms.values():
            known = [difference for difference in contrast["differences"] if difference is not None]
            if contrast["interval"] is not None:
                found = paired_interval(known)
                ends = contrast["interval"]["low"], contrast["interval"]["high"]
                # The published ones were numpy's quantiles; scipy's differ in the last bit.
                assert (found.low, found.high) == pytest.approx(ends, abs=1e-14)
            if contrast["p"] is not None:
                assert sign_flip_p(known) == contrast["p"]
        adjusted = holm({arm: contrast["p"] for arm, contrast in arms.items()})
        assert adjusted == {arm: contrast["p_holm"] for arm, contrast in arms.items()}


@pytest.mark.parametrize("world", WORLDS)
def test_every_value_is_that_of_the_published_curves(world: str) -> None:
    curves = {
        arm: [
            make_curve(c["kl"], c["gold"], arm=arm, seed=int(seed), frozen=c["frozen"], steps=c["steps"])
            for seed, c in sorted(seeds.items(), key=lambda pair: int(pair[0]))
        ]
        for arm, seeds in read(world, "curves.json").items()
    }
    found = Found(world=None, curves=curves, missing=[], tickets={})  # type: ignore[arg-type]
    top, compared = studies(found)
    again = [record(study) for study in (*compared, *against_controls(found, top))]
    published = read(world, "comparison.json")["families"]
    assert [family["seeds"] for family in again] == [family["seeds"] for family in published]
    for ours, theirs in zip(again, published, strict=True):
        assert list(ours["values"]) == list(theirs["values"])
        for name, arms in theirs["values"].items():
            for arm, values in arms.items():
                # Curves are published with five digits.
                a, b = (np.array(v, dtype=np.float64) for v in (ours["values"][name][arm], values))
                assert a == pytest.approx(b, rel=1e-3, abs=1e-3, nan_ok=True), (name, arm)
