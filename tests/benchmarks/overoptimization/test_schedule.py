"""What the lab starts, resumes, leaves alone and refuses, decided by what lies on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import r2m_ray
from benchmarks.overoptimization import lab as lab_module
from benchmarks.overoptimization.lab import Lab, check, conduct
from benchmarks.overoptimization.presets import World
from benchmarks.overoptimization.runs import Run, State, code_digest, read_ticket, standing
from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError, RunError
from r2m_ray.tasks.prepare.store import Prepared

MakeLab = Callable[..., Lab]
Order = Callable[[], list[str]]


def run_of(lab: Lab, name: str) -> Run:
    return next(run for world in lab.preset.worlds for run in lab.runs(world) if run.name == name)


def verdicts(lab: Lab) -> dict[int, bool]:
    found = json.loads((lab.root / "toy" / "gates.json").read_text())
    return {verdict["gate"]: verdict["passed"] for verdict in found}


def edit_ticket(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    ticket = json.loads(run.ticket.read_text())
    change(ticket)
    run.ticket.write_text(json.dumps(ticket))


def test_the_baseline_is_run_first_and_nothing_twice(make_lab: MakeLab, order: Order) -> None:
    lab = make_lab(seeds=(0, 1))
    done = conduct(lab)
    assert (done.ended, done.failed) == ((), ())
    assert order() == ["rloo-seed-0", "rloo-seed-1", "rloo_r2m-seed-0", "rloo_r2m-seed-1"]
    assert verdicts(lab) == {1: True, 2: True, 3: True, 4: True}
    where = standing(run_of(lab, "rloo_r2m-seed-1"))
    assert (where.state, where.step, where.exit_code) == (State.finished, 10, 0)
    conduct(lab)
    assert order() == []
    ticket = read_ticket(run_of(lab, "rloo-seed-0"))
    assert ticket is not None
    assert [attempt["exit_code"] for attempt in ticket["attempts"]] == [0]
    assert run_of(lab, "rloo-seed-0").log.read_text() == "words of the run\n"


def test_the_pre_check_of_a_seed_is_made_once(make_lab: MakeLab, tmp_path: Path) -> None:
    for _ in range(2):
        conduct(make_lab())
    calls = (tmp_path / "fake" / "prechecks").read_text().splitlines()
    assert calls == [f"seed-{seed} 512 8" for seed in (0, 1, 2)], (
        "of a third world too: a pre-check needs three"
    )


def test_a_run_that_failed_is_named_and_goes_on_next_time(
    make_lab: MakeLab, order: Order, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab(plan={"rloo_r2m": {"last": 6, "code": 3}}, arms=("rloo", "rloo_r2m", "grpo"))
    assert conduct(lab).failed == ("toy/rloo_r2m-seed-0",)
    assert order() == ["rloo-seed-0", "grpo-seed-0", "rloo_r2m-seed-0"], "a failure stops no other run"
    assert "failed with exit code 3; the end of" in capsys.readouterr().out
    where = standing(run_of(lab, "rloo_r2m-seed-0"))
    assert str(where) == "half-finished at step 6 of 10, ended with exit code 3"
    assert conduct(lab).failed == ()
    assert order() == ["rloo_r2m-seed-0 again"]
    attempts = read_ticket(run_of(lab, "rloo_r2m-seed-0"))["attempts"]  # type: ignore[index]
    assert [attempt["exit_code"] for attempt in attempts] == [3, 0]


def test_an_arm_whose_own_reward_model_cannot_be_made_stops_no_other(
    make_lab: MakeLab, order: Order, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lab = make_lab(arms=("rloo", "pretrained_rm", "rm_head"))
    usual = lab_module.prepare

    def broken(lab: Lab, world: World, overrides: Mapping[str, Sequence[str]]) -> dict[str, Prepared]:
        if "pretrained_rm-seed-0-reward" in overrides:
            assert overrides["pretrained_rm-seed-0-reward"][-3:] == (
                "task.annotator_bias=0.0",
                "task.label_temperature=0.05",
                f"lab.policy={tmp_path / 'seed-0' / 'policy'}",
            )
            raise RunError("models could not be prepared")
        return usual(lab, world, overrides)

    monkeypatch.setattr(lab_module, "prepare", broken)
    assert conduct(lab).failed == ("toy/pretrained_rm-seed-0",)
    assert order() == ["rloo-seed-0", "rm_head-seed-0"]
    monkeypatch.setattr(lab_module, "prepare", usual)
    assert conduct(lab).failed == ()
    assert order() == ["pretrained_rm-seed-0"]
    words = read_ticket(run_of(lab, "pretrained_rm-seed-0"))["overrides"]  # type: ignore[index]
    assert words[-1] == f"model.reward='{tmp_path / 'pretrained_rm-seed-0-reward' / 'reward'}'"


def test_a_run_whose_files_cannot_be_read_is_named_before_any_other_starts(
    make_lab: MakeLab, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(arms=("rloo", "grpo", "rloo_r2m"))
    usual = lab_module.run_identity

    def unread(config: Config) -> dict[str, Any]:
        if config.run.name == "rloo_r2m-seed-0":
            raise InputError("policy: cannot be read")
        return usual(config)

    monkeypatch.setattr(lab_module, "run_identity", unread)
    with pytest.raises(InputError, match="policy: cannot be read"):
        conduct(lab)
    assert order() == ["rloo-seed-0"], "the baseline alone, which comes before the others"


@pytest.mark.parametrize(
    ("wrong", "gates", "started"),
    [
        ({"accuracy": 0.8}, {1: True, 2: False}, 0),
        ({"gain": 0.05}, {1: True, 2: True, 3: False}, 0),
        ({"plan": {"rloo": {"gold": [1.0] * 11}}}, {1: True, 2: True, 3: True, 4: False}, 1),
    ],
)
def test_a_world_ends_at_the_gate_that_it_fails(
    make_lab: MakeLab, order: Order, wrong: dict[str, Any], gates: dict[int, bool], started: int
) -> None:
    lab = make_lab(**wrong)
    assert conduct(lab).ended == ("toy",)
    assert verdicts(lab) == gates
    assert order() == ["rloo-seed-0"][:started]
    assert conduct(make_lab(**wrong, despite_gates=True)).ended == ()
    assert len(order()) == 2 - started
    assert len(verdicts(lab)) == 4


def test_a_baseline_that_fails_ends_the_world(make_lab: MakeLab, order: Order) -> None:
    lab = make_lab(plan={"rloo": {"last": 4, "code": 3}}, seeds=(0, 1))
    done = conduct(lab)
    assert (done.ended, done.failed) == (("toy",), ("toy/rloo-seed-0", "toy/rloo-seed-1"))
    failures = json.loads((lab.root / "toy" / "gates.json").read_text())[3]["failures"]
    assert failures == ["seed 0: the baseline has not finished.", "seed 1: the baseline has not finished."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ticket: ticket.update(code="other", commit="abc"), r"made by other code of r2m_ray \(abc\)"),
        (
            lambda ticket: ticket["identity"]["config"].update({"reward.omega_floor": 0.9}),
            r"rloo-seed-0: reward.omega_floor: 0.9 -> 1.0",
        ),
        (
            lambda ticket: ticket["identity"]["config"].update({"evaluate.prompts": 8}),
            r"evaluate.prompts: 8 -> 64; runs of one root are measured alike",
        ),
    ],
)
def test_another_run_under_the_same_name_is_refused_and_untouched(
    make_lab: MakeLab, order: Order, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    lab = make_lab()
    conduct(lab)
    order()
    run = run_of(lab, "rloo-seed-0")
    edit_ticket(run, change)
    before = {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        conduct(lab)
    assert order() == []
    assert {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()} == before


def test_a_directory_that_the_lab_did_not_start_is_refused(make_lab: MakeLab, order: Order) -> None:
    lab = make_lab()
    run = run_of(lab, "rloo-seed-0")
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match="rloo-seed-0: holds a run that this schedule did not start"):
        conduct(lab)
    assert order() == []
    (run.directory / "config.yaml").unlink()
    conduct(lab)
    assert order()[0] == "rloo-seed-0", "an empty directory is in nobody's way"


def test_a_damaged_ticket_is_named(make_lab: MakeLab) -> None:
    lab = make_lab()
    conduct(lab)
    run_of(lab, "rloo-seed-0").ticket.write_text("{}")
    with pytest.raises(InputError, match=r"rloo-seed-0.ticket.json: not a ticket"):
        conduct(lab)


def test_every_run_is_composed_before_the_first_one_starts(make_lab: MakeLab, order: Order) -> None:
    good = make_lab()
    check(good)
    bad = Lab(preset=good.preset, root=good.root, jobs=1, precheck=good.precheck, extra=("algo.stepz=3",))
    with pytest.raises(InputError, match=r"rloo-seed-0: algo.stepz.*Did you mean algo.steps"):
        check(bad)
    assert order() == []


def test_the_digest_is_of_code_that_decides_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r2m_ray, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "core").mkdir()
    (tmp_path / "driver").mkdir()
    (tmp_path / "report" / "compare").mkdir(parents=True)
    digests = []
    for name in (
        "__init__.py",
        "core/head.py",
        "driver/loop.py",
        "report/html.py",
        "report/compare/study.py",
        "notes.md",
    ):
        (tmp_path / name).write_text("x = 1\n")
        digests.append(code_digest())
    first, head, driver, *onlookers = digests
    assert len({first, head, driver}) == 3
    assert onlookers == [driver] * 3, "reports, studies and texts decide no number"
    (tmp_path / "core" / "head.py").rename(tmp_path / "core" / "tail.py")
    assert code_digest() != driver
