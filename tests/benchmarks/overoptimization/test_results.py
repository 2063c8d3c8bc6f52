"""What is written of a schedule, whole or in part: families of seeds, warnings, the paper's columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curve_fixtures import make_curve

from benchmarks.overoptimization.curves_record import curves_record
from benchmarks.overoptimization.information import Regime
from benchmarks.overoptimization.lab import Lab, conduct
from benchmarks.overoptimization.paper import paper_tables
from benchmarks.overoptimization.presets import World
from benchmarks.overoptimization.results import (
    Found,
    against_controls,
    find,
    made_with,
    studies,
    warnings,
    write_results,
)
from benchmarks.overoptimization.runs import code_digest
from r2m_ray.report.compare.curves import Curve
from r2m_ray.report.compare.matched import Peak
from r2m_ray.report.compare.tables import markdown

MakeLab = Callable[..., Lab]
WORLD = World(name="toy", regime=Regime.informative, overrides=())
KL = np.array([0.0, 2.0, 4.0, 8.0])


def found_of(curves: list[Curve]) -> Found:
    arms: dict[str, list[Curve]] = {}
    for curve in curves:
        arms.setdefault(curve.arm, []).append(curve)
    return Found(world=WORLD, curves=arms, missing=[], tickets={})


def curve(arm: str, seed: int, extra: float = 0.0, peak: int = 1, **more: object) -> Curve:
    gold = np.array([0.0, 1.0, 0.5, 0.0]) + extra * (KL > 0)
    gold[peak] += peak
    return make_curve(KL, gold, arm=arm, seed=seed, **more)


def test_arms_are_compared_under_all_seeds_that_they_share_with_the_baseline() -> None:
    curves = [curve("rloo", seed) for seed in range(3)]
    curves += [curve("static_h", seed, 0.1) for seed in range(3)]
    curves += [curve("grpo", seed, 0.2) for seed in range(2)]
    curves += [curve("remax", seed, 0.3) for seed in (1, 9)]
    top, found = studies(found_of(curves))
    assert [(study.seeds, study.challengers) for study in found] == [
        ((0, 1, 2), ("static_h",)),
        ((0, 1), ("grpo",)),
        ((1,), ("remax",)),
    ]
    assert top == Peak(arm="rloo", kl=2.0, gold=2.0, step=5, share=1 / 3)
    for study, extra in zip(found, (0.1, 0.2, 0.3), strict=True):
        (contrast,) = study.contrasts["gold_at_1_kl_star"].values()
        assert contrast.differences == pytest.approx([extra] * len(study.seeds))


def test_kl_star_is_of_every_seed_of_the_baseline() -> None:
    curves = [curve("rloo", 0, peak=1), *(curve("rloo", s, peak=2) for s in (1, 2))]
    curves.append(curve("grpo", 0))
    top, (study,) = studies(found_of(curves))
    assert top is not None
    assert top.kl == 4.0, "the mean of three seeds, though the arm has the one that peaks at 2"
    assert study.peak == top


def test_without_baseline_or_without_peak_there_is_still_what_there_is() -> None:
    assert studies(found_of([curve("grpo", 0)])) == (None, [])
    assert studies(found_of([])) == (None, [])
    falling = [make_curve(KL, -KL, arm=arm) for arm in ("rloo", "grpo")]
    top, (study,) = studies(found_of(falling))
    assert (top, study.peak) == (None, None)
    assert "final_gold" in study.values


def test_without_a_peak_of_all_seeds_no_family_has_one_of_its_own() -> None:
    # Seed 0 alone peaks at KL 2; the mean of both is highest before training.
    curves = [curve("rloo", 0), make_curve(KL, [5.0, 0.0, 0.0, 0.0], arm="rloo", seed=1)]
    curves.append(curve("grpo", 0))
    top, (study,) = studies(found_of(curves))
    assert (top, study.seeds, study.peak) == (None, (0,), None)
    assert not any(endpoint.primary for endpoint in study.endpoints)


def test_families_of_as_many_seeds_have_a_picture_each(make_lab: MakeLab, tmp_path: Path) -> None:
    failed = {"last": 4, "code": 3}
    lab = make_lab(
        arms=("rloo", "rloo_r2m", "grpo"),
        seeds=(0, 1),
        plan={"rloo_r2m-seed-0": failed, "grpo-seed-1": failed},
    )
    conduct(lab)
    write_results(lab.preset, lab.root, tmp_path / "out", made_with("x"))
    pictures = {path.name for path in (tmp_path / "out" / "toy").glob("effects-*")}
    assert pictures == {"effects-seeds-0.png", "effects-seeds-1.png"}


def test_alarms_are_counted_by_arm(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(seeds=(0, 1), plan={"rloo_r2m-seed-0": {"alarm": 7}, "rloo_r2m-seed-1": {"alarm": 5}})
    conduct(lab)
    write_results(lab.preset, lab.root, tmp_path / "out", made_with("x"))
    text = (tmp_path / "out" / "toy" / "comparison.md").read_text()
    assert "| arm | scale_ratio | frozen_gap | flip_rate | kl |" in text
    assert "| rloo | 0 of 2 | 0 of 2 | 0 of 2 | 0 of 2 |" in text
    assert "| rloo_r2m | 0 of 2 | 0 of 2 | 0 of 2 | 2 of 2, from step 5 |" in text


def test_warnings_come_from_gates_and_from_mixed_code() -> None:
    shut = {"gate": 2, "question": "is it good?", "failures": ["seed 0: no."], "passed": False, "values": {}}
    passed = {"gate": 1, "question": "?", "failures": [], "passed": True, "values": {}}
    made = {"a": ("1", "x"), "b": ("2", "y"), "c": ("1", "w")}
    tickets = {name: {"code": code, "commit": commit} for name, (code, commit) in made.items()}
    found = Found(world=WORLD, curves={}, missing=[], tickets=tickets)
    said = warnings(found, [passed, shut])
    assert said[0].startswith("This world failed gate 2 (is it good?): seed 0: no.")
    assert said[1:] == (
        "Not decided yet: gate 3, 4.",
        "These runs were made by 2 versions of r2m_ray, by commit: w or x; y.",
    )
    everything = [passed | {"gate": gate} for gate in range(1, 5)]
    assert warnings(found_of([]), everything) == ()


def test_a_gate_says_of_which_seeds_it_was_not_asked() -> None:
    gate = {"question": "?", "failures": [], "passed": True, "values": {"0": 0.7, "2": 0.7}}
    verdicts = [gate | {"gate": number} for number in range(1, 4)]
    verdicts.append(gate | {"gate": 4, "values": {str(seed): {} for seed in range(4)}})
    found = found_of([curve("rloo", seed) for seed in range(4)])
    assert warnings(found, verdicts) == tuple(f"Gate {n} was not asked of seed 1, 3." for n in (1, 2, 3))


def test_an_arm_is_held_against_the_same_without_h_at_the_baselines_kl_star() -> None:
    curves = [curve("rloo", seed) for seed in range(3)]
    curves += [curve("refit", seed, 0.1 * seed, peak=2) for seed in range(3)]
    curves += [curve("static_h", seed, 0.4) for seed in (0, 2, 7)]
    curves += [curve("r2m_anchor", seed) for seed in range(3)]
    found = found_of(curves)
    top, _ = studies(found)
    (study,) = against_controls(found, top)
    assert (study.baseline, study.challengers, study.seeds) == ("refit", ("static_h",), (0, 2))
    assert study.peak == top
    assert top is not None
    assert top.kl == 2.0, "where refit's own mean is highest at 4"
    # At KL 2 static_h has 1 + 1 + .4, refit 1 + .1 for each seed.
    contrast = study.contrasts["gold_at_1_kl_star"]["static_h"]
    assert contrast.differences == pytest.approx([1.4, 1.2])
    assert "the mean curve of rloo is highest in gold" in markdown(study)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_part_of_a_schedule_is_compared_and_the_rest_is_listed(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(arms=("rloo", "rloo_r2m", "grpo"), plan={"grpo": {"last": 4, "code": 3}})
    made = made_with("the very command")
    page = write_results(lab.preset, lab.root, tmp_path / "none", made)
    assert "not started" in page.read_text()
    conduct(lab)
    out = tmp_path / "out"
    page = write_results(lab.preset, lab.root, out, made)
    world = out / "toy"
    assert {path.name for path in world.iterdir()} == {
        "comparison.json", "comparison.md", "curves.json", "gates.json", "frontier.png", "rewards.png",
        "effects-seeds-0.png",
    }  # fmt: skip
    record = read(out / "record.json")
    assert record["command"] == "the very command"
    runs = record["runs"]["toy"]
    assert runs["missing"] == {"grpo-seed-0": "half-finished at step 4 of 10, ended with exit code 3"}
    assert set(runs["finished"]) == {"rloo-seed-0", "rloo_r2m-seed-0"}
    assert runs["finished"]["rloo-seed-0"]["command"].startswith(
        "r2m-ray train experiment=demo algo.steps=10"
    )
    assert runs["finished"]["rloo-seed-0"]["code"] == code_digest()
    curves = read(world / "curves.json")
    assert curves["rloo"]["0"]["gold"][:3] == [1.0, 1.3, 1.5]
    assert curves["rloo_r2m"]["0"]["pairs/accuracy"][-1] == 0.7
    (family,) = read(world / "comparison.json")["families"]
    assert family["kl_star"]["kl"] == 2.0
    assert family["values"]["gold_at_1_kl_star"] == {"rloo": [1.5], "rloo_r2m": [1.5]}
    assert [gate["passed"] for gate in read(world / "gates.json")] == [True] * 4
    text = page.read_text()
    assert "half-finished at step 4 of 10" in text
    assert text.count("<img") == 3
    assert "http" not in text.replace("http-equiv", "")


def test_results_of_a_failed_gate_say_so_before_any_number(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(accuracy=0.8, despite_gates=True)
    conduct(lab)
    page = write_results(lab.preset, lab.root, tmp_path / "out", made_with("x"))
    said = "This world failed gate 2 (is the reward model good, and not too good?)"
    assert (tmp_path / "out" / "toy" / "comparison.md").read_text().startswith(f"**{said}")
    assert page.read_text().index(said) < page.read_text().index("<table")


def test_the_papers_figures_stand_beside_ours_in_columns_of_their_own() -> None:
    def times(step: list[float]) -> dict[str, list[float]]:
        return {"time/step": step, "time/reward": [0.1, 0.2, 9.0]}

    r2m = curve(
        "rloo_r2m",
        0,
        0.5,
        evaluated={"pairs/accuracy": [0.64, 0.6, 0.7, 0.66], "pairs/frozen_accuracy": [0.7] * 4},
        trained=times([2.0, 2.5, 60.0]),
    )
    curves = {
        "rloo": [curve("rloo", 0, trained=times([1.0, 2.0, 50.0])), curve("rloo", 1)],
        "rloo_r2m": [r2m],
        "grpo": [curve("grpo", 7, 0.5)],
    }
    arms, accuracy, cost = paper_tables(curves, Peak(arm="rloo", kl=2.0, gold=2.0, step=5, share=0.3))
    rows = {row[0]: row[1:] for row in arms.rows}
    assert all(head.startswith(("paper: ", "here: ")) for head in arms.head[1:])
    assert rows["RLOO"] == ("28.4", "30.2", "2.000", "0.500", "0.000", "2")
    assert rows["RLOO+R2M"] == ("34.5", "38.2", "2.500 [+0.500]", "1.000 [+0.500]", "0.500 [+0.500]", "1")
    assert rows["R2M w/ Noise"] == ("25.4", "–", "–", "–", "–", "0")
    assert rows["GRPO"] == ("–", "–", "2.500", "1.000", "0.500", "1"), "no baseline has its seed"
    assert rows["ReMax"] == ("–", "–", "–", "–", "–", "0")
    assert [row[1:] for row in accuracy.rows] == [("72.3", "70.0"), ("69.2", "64.0"), ("78.6", "66.0")]
    assert [row[2] for row in cost.rows] == ["2.00", "2.50", "1.25", "0.20"]
    unmatched, *_ = paper_tables(curves, None)
    assert {row[0]: row[3:6] for row in unmatched.rows}["RLOO"] == ("–", "–", "0.000")


def test_a_finished_run_that_cannot_be_compared_is_listed(make_lab: MakeLab) -> None:
    lab = make_lab()
    conduct(lab)
    (lab.root / "toy" / "rloo_r2m-seed-0" / "config.yaml").write_text("broken: [")
    found = find(lab.preset, lab.preset.worlds[0], lab.root)
    assert list(found.curves) == ["rloo"]
    ((name, why),) = found.missing
    assert name == "rloo_r2m-seed-0"
    assert why.startswith("finished, but cannot be compared: ")


def test_training_steps_are_averaged_since_the_evaluation_before() -> None:
    steps = np.arange(1, 11)
    curve = make_curve(
        [0.0, 1.23456789, 4.0],
        [1.0, np.nan, 0.5],
        arm="rloo_r2m",
        seed=3,
        evaluated={"pairs/accuracy": [0.7, 0.6, np.nan], "unlisted": [0, 0, 0]},
        trained={
            "gold/pair_precision": np.where(steps == 4, np.nan, steps / 10),
            "reward/scale_ratio": np.full(10, np.nan),
            "time/step": np.ones(10),
            "alarm/kl": steps > 6,
            "alarm/flip_rate": np.zeros(10),
        },
    )
    record = curves_record({"rloo_r2m": [curve]})
    assert record == {
        "rloo_r2m": {
            "3": {
                "steps": [0, 5, 10],
                "kl": [0.0, 1.2346, 4.0],
                "gold": [1.0, None, 0.5],
                "frozen": [0.0, 1.2346, 4.0],
                "own": [0.0, 1.2346, 4.0],
                "pairs/accuracy": [0.7, 0.6, None],
                "gold/pair_precision": [None, 0.275, 0.8],
                "alarms": {"kl": 7},
            }
        }
    }
    assert json.dumps(record, allow_nan=False)
