"""The whole real loop on the CPU: Ray actors, vLLM, DeepSpeed and the reward model, on a world just made."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_run import rows, same_run, steps
from small_run import ask_for_faults

from r2m_ray.config.compose import load_saved
from r2m_ray.errors import RunError
from r2m_ray.run.vocabulary import FAMILIES, REGISTRY, Source, metric
from r2m_ray.runtime.launch import run_evaluation

pytestmark = pytest.mark.e2e

Train = Callable[..., Path]


def test_a_run_takes_all_its_steps_with_four_real_roles(r2m: Path) -> None:
    found = steps(r2m)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert [row["omega"] for row in found] == pytest.approx([0.75, 0.6, 0.6])
    # The engine that sampled and the learner agree on the log-probs of every token.
    assert all(row["policy/mismatch_max"] < 1e-3 for row in found)
    assert all(row["policy/optimizer_steps"] == 4 for row in found)
    assert all(row["rm/valid_pairs"] > 0 and row["rm/gradient_norm"] > 0 for row in found)
    assert all(row["sync/bytes"] > 1e5 for row in found)
    # π_θ starts as π_ref and moves away from it.
    assert found[0]["policy/kl_token"] == pytest.approx(0, abs=1e-5)
    assert found[2]["policy/kl_token"] > 1e-5


def test_own_and_frozen_reward_part_as_the_head_reads_the_policy(r2m: Path) -> None:
    assert all(abs(row["reward/frozen_gap"]) > 1e-6 for row in steps(r2m))


def test_a_run_leaves_everything_a_reader_needs(r2m: Path) -> None:
    checkpoint = r2m / "checkpoints" / "step-000003"
    for name in ("policy/model.safetensors", "policy/config.json", "reward_head/head.safetensors"):
        assert (checkpoint / name).stat().st_size > 0
    page = (r2m / "report" / "report.html").read_text()
    assert "<html" in page
    rollouts = [json.loads(line) for line in (r2m / "rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rollouts} == {1, 2, 3}
    for row in rollouts:
        assert sum(weight for _, weight in row["attention"]) == pytest.approx(1, abs=1e-4)
        assert math.isfinite(row["gold"])


def test_the_same_seed_gives_the_same_run(r2m: Path, train: Train) -> None:
    same_run(train("again"), r2m, 3)


def test_a_resumed_run_equals_an_uninterrupted_one(r2m: Path, train: Train) -> None:
    stopped = r2m.with_name("stopped")
    shutil.copytree(r2m, stopped)
    for step in (2, 3):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:06d}")
    train("stopped", "run.resume=true")
    same_run(stopped, r2m, 3)


def test_every_role_dies_once_and_the_run_is_the_same(
    r2m: Path,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults = (
        "rollout-0@1:mid_generate:kill",
        "reward-0@2:annotate:kill",
        "reference-0@3:logprobs:kill",
        "policy-0@3:optimizer:kill",
    )
    ask_for_faults(monkeypatch, tmp_path, *faults)
    struck = train("struck")
    assert len(list(tmp_path.iterdir())) == len(faults)
    same_run(struck, r2m, 3)
    printed = capsys.readouterr().err
    for role in ("rollout", "reward", "reference", "policy"):
        assert f"{role}-0 replaced after" in printed


@pytest.mark.slow
def test_human_pairs_come_again_alike_after_the_loss_of_a_role(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = ("reward=r2m_anchor_mixed", "reward.warmup_pairs=24", "reward.omega_schedule=constant")
    calm = train("anchored", *arm)
    for row in steps(calm):
        assert 0 <= row["rm/human_accuracy"] <= 1
        assert row["rm/gradient_norm_human"] > 0
    # In the warm-up, which begins again, and in a step, which goes on from the last commit without one.
    faults = ("reward-0@0:warm_up:kill", "policy-0@2:optimizer:kill")
    ask_for_faults(monkeypatch, tmp_path, *faults)
    struck = train("anchored-struck", *arm)
    assert len(list(tmp_path.iterdir())) == len(faults)
    same_run(struck, calm, 3)


def test_vanilla_trains_on_the_frozen_reward_and_shares_the_first_batch(r2m: Path, vanilla: Path) -> None:
    found = steps(vanilla)
    assert all(row["reward/mean"] == row["reward/frozen_mean"] for row in found)
    assert found[0]["reward/frozen_mean"] == steps(r2m)[0]["reward/frozen_mean"]


def test_a_run_reports_what_the_registry_names_and_nothing_else(r2m: Path) -> None:
    """Of the registry, what this run cannot have: ReMax's greedy rows, and people's pairs."""
    elsewhere = {"reward/greedy_mean", *(name for name in REGISTRY if "human" in name)}
    for kind, other in (("step", Source.evaluation), ("eval", Source.step)):
        found = {name for row in rows(r2m) if row["kind"] == kind for name in row} - {
            "step",
            "kind",
            "nonfinite",
        }
        registered = {name for name, known in REGISTRY.items() if known.source is not other}
        if kind == "step":
            assert registered - found == elsewhere
        for name in found:
            assert name in registered or metric(name).startswith(tuple(FAMILIES)), name


def test_evaluating_a_checkpoint_repeats_the_runs_last_evaluation(r2m: Path) -> None:
    path = run_evaluation(load_saved(r2m / "config.yaml", []), r2m)
    found = json.loads(path.read_text())
    last = rows(r2m)[-1]
    assert last["kind"] == "eval"
    for key in ("gold/mean", "reward/frozen_mean", "reward/mean", "pairs/accuracy", "kl/sequence"):
        assert found[key] == pytest.approx(last[key], abs=1e-6), key


@pytest.mark.slow
def test_replicas_and_ranks_do_not_change_the_run(r2m: Path, train: Train) -> None:
    wide = train(
        "wide",
        "policy.ranks=2",
        "rollout.replicas=2",
        "reward.replicas=2",
        "reference.replicas=2",
        "+policy.deepspeed.zero_optimization.stage=3",
    )
    first, other = steps(r2m)[0], steps(wide)[0]
    for key in ("reward/mean", "reward/frozen_mean", "response/tokens", "rm/loss", "policy/loss"):
        # Sums are taken in another order.
        assert other[key] == pytest.approx(first[key], rel=1e-4, abs=1e-6), key


def test_a_run_that_finds_no_place_leaves_its_name_free(train: Train) -> None:
    with pytest.raises(RunError, match="STRICT_SPREAD puts 4 actors"):
        train("crowded", "cluster.placement=STRICT_SPREAD")
    train("crowded", "algo.steps=1")
