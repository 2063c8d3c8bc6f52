"""The GPU proof's dry run: every part runs on a CPU, and its judgement of a result can be wrong and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from r2m_ray.config.rules import validate
from r2m_ray.engines.text import policy_prompt_ids

ROOT = Path(__file__).resolve().parents[2]


def proof(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_proof.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def parts(out: Path, *names: str) -> dict[str, Any]:
    """The parts of a dry run's file, all of which passed."""
    done = proof("--dry-run", f"--parts={','.join(names)}", f"--out={out}")
    found: dict[str, Any] = json.loads(out.read_text())["parts"]
    assert (done.returncode, {part["status"] for part in found.values()}) == (0, {"passed"}), found
    return found


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_parts import setup

    return setup


def test_parts_lie_side_by_side_in_one_file(tmp_path: Path) -> None:
    out = tmp_path / "proof.json"
    assert list(parts(out, "head")) == ["head"]
    found = parts(out, "packing")
    assert list(found) == ["head", "packing"]
    assert found["packing"]["rows"] == 16
    assert 0 < found["head"]["cases"][0]["share_of_bandwidth"]["median"] < 1
    # Results of another machine stay as they are.
    record = json.loads(out.read_text())
    record["machine"]["processor"] = "another one"
    out.write_text(json.dumps(record))
    assert proof("--dry-run", "--parts=head", f"--out={out}").returncode == 2
    assert json.loads(out.read_text()) == record


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the full proof would run here")
def test_without_an_accelerator_only_a_dry_run_starts(tmp_path: Path) -> None:
    done = proof(f"--out={tmp_path / 'proof.json'}")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_result_is_within_rounding_or_not(setup: Any) -> None:
    exact_TP = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded_TP = exact_TP.bfloat16()
    assert setup.compared_errors(rounded_TP, rounded_TP, exact_TP)["within_rounding"]
    # One row of fifty that is another row's.
    mixed_TP = rounded_TP.clone()
    mixed_TP[3] = rounded_TP[4]
    assert not setup.compared_errors(mixed_TP, rounded_TP, exact_TP)["within_rounding"]


def test_states_of_other_weights_are_not_exact(setup: Any, tmp_path: Path) -> None:
    """What a prefix cache that outlived its weights would give."""
    from gpu_parts.export import compared_states, transformers_states

    policies = [setup.policy_dir(tmp_path, setup.DRY, seed) for seed in (0, 1)]
    rows = {"input_T": torch.arange(4, 34), "offsets": torch.tensor([0, 9, 12, 30])}
    found = {**rows, "hidden_TP": transformers_states(policies[0], torch.float32, *rows.values())}
    assert compared_states(policies[0], setup.DRY, found)["within_rounding"]
    assert not compared_states(policies[1], setup.DRY, found)["within_rounding"]


def test_a_prompt_has_as_many_tokens_as_the_sizes_say(setup: Any, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in setup.preference_file(tmp_path, setup.DRY).read_text().splitlines()]
    prompts = [prompt.text for prompt in setup.plan(setup.DRY).prompts] + [pair["prompt"] for pair in pairs]
    for directory in (setup.policy_dir(tmp_path, setup.DRY), setup.reward_dir(tmp_path, setup.DRY)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        lengths = {len(policy_prompt_ids(tokenizer, prompt)) for prompt in prompts}
        assert lengths == {setup.DRY.prompt_words}


def test_the_largest_difference_of_two_runs_is_named(setup: Any) -> None:
    from gpu_parts.recovery import largest_difference

    quiet = [{"step": 1, "kind": "step", "reward/mean": 2.0, "gold/mean": None, "time/step": 1.0}]
    assert largest_difference(quiet, [{**quiet[0], "time/step": 9.0}]) == (0.0, "")
    assert largest_difference(quiet, [{**quiet[0], "reward/mean": 1.0}]) == (0.5, "reward/mean")
    assert largest_difference(quiet, [{**quiet[0], "gold/mean": 1.0}]) == (float("inf"), "gold/mean")


def test_runs_on_a_gpu_are_valid(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = setup.run_config(tmp_path, setup.DRY, "sync.backend=ipc", share=0.2)
    assert not [problem for problem in validate(config) if not problem.warning]
    assert config.cluster.gpus_per_rollout == 0.2
    assert config.rollout.engine_args == setup.engine_args(setup.DRY)


def test_a_part_that_fails_or_lacks_something_says_so(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_proof
    from gpu_parts import packing

    def absent(*_: object) -> dict[str, Any]:
        raise setup.Absent("flash_attn is not here")

    def broken(*_: object) -> dict[str, Any]:
        raise RuntimeError("kernel failed")

    monkeypatch.setattr(packing, "run", absent)
    found = gpu_proof.run_part("packing", dry_run=True, scratch=tmp_path)
    assert (found["status"], found["reason"]) == ("absent", "flash_attn is not here")
    monkeypatch.setattr(packing, "run", broken)
    found = gpu_proof.run_part("packing", dry_run=True, scratch=tmp_path)
    assert found["status"] == "failed"
    assert "kernel failed" in found["reason"]


def test_the_device_is_named_by_torch_alone() -> None:
    sources = [ROOT / "benchmarks" / "gpu_proof.py", *(ROOT / "benchmarks" / "gpu_parts").glob("*.py")]
    assert len(sources) > 6
    assert not [path.name for path in sources if "torch.cuda" in path.read_text()]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_other_parts(tmp_path: Path) -> None:
    found = parts(tmp_path / "proof.json", "export", "sync", "step", "recovery")
    assert found["export"]["batches_of_equal_tokens"] == 1
    assert list(found["sync"]["backends"]) == ["object_store"]
    assert set(found["sync"]["absent"]) == {"nccl", "ipc"}
    assert found["sync"]["backends"]["object_store"]["digests_equal"] == 2
    assert found["step"]["step_ratio_by_pair"]["n"] == 2
    assert found["sync"]["backends"]["object_store"]["batches_equal"]
    assert found["recovery"]["largest_relative_difference"] == {"value": 0.0, "metric": ""}
