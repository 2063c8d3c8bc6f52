"""Stop after any step and resume: to the last bit the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

EVERY = ["checkpoint.every=1", "checkpoint.keep=6"]


def cut(lab: Any, whole: Any, name: str, step: int) -> Path:
    """A copy of a finished run as it was when ``step`` was committed."""
    target = lab.root / "runs" / name
    shutil.copytree(whole.directory, target)
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)
    return target


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resume_after_every_step(lab: Any, step: int) -> None:
    whole = lab.once("zero2", *EVERY)
    cut(lab, whole, f"zero2-{step}", step)
    lab.run(f"zero2-{step}", *EVERY, again=True).assert_same(whole)


VARIANTS = {
    "vanilla": ["reward=vanilla"],
    "zero3": ["+policy.deepspeed.zero_optimization.stage=3"],
    "zero2-ranks": ["policy.ranks=2"],
    "zero3-ranks": ["policy.ranks=2", "+policy.deepspeed.zero_optimization.stage=3"],
    "replicas": ["rollout.replicas=2", "reward.replicas=2", "reference.replicas=2"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_of_every_kind_of_run(lab: Any, name: str) -> None:
    settings = [*EVERY, *VARIANTS[name]]
    whole = lab.once(name, *settings)
    cut(lab, whole, f"{name}-cut", 3)
    lab.run(f"{name}-cut", *settings, again=True).assert_same(whole)


def test_without_the_moments_of_the_heads_optimizer_the_run_is_another(lab: Any) -> None:
    """That a comparison can fail: a checkpoint whose manifest fits, with another state."""
    whole = lab.once("zero2", *EVERY)
    checkpoint = cut(lab, whole, "control", 3) / "checkpoints" / "step-000003"
    (file,), manifest = checkpoint.glob("reward_head/**/optimizer.safetensors"), checkpoint / "MANIFEST.json"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    entries = json.loads(manifest.read_text())
    entries["files"][file.relative_to(checkpoint).as_posix()] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(entries))
    other = lab.run("control", *EVERY, again=True)
    assert other.code == 0, other.text
    assert other.rows != whole.rows


def test_a_resume_on_other_ranks_goes_on_from_the_exact_state(lab: Any) -> None:
    whole = lab.once("zero2", *EVERY)
    cut(lab, whole, "reshard", 3)
    wide = ["policy.ranks=2", "+policy.deepspeed.zero_optimization.stage=3"]
    refused = lab.run("reshard", *EVERY, *wide, again=True)
    assert refused.code == 2
    assert "policy.ranks" in refused.text
    resharded = lab.run("reshard", *EVERY, *wide, "run.reshard=true", again=True)
    assert resharded.code == 0, resharded.text
    first, expected = (next(r for r in run.rows if r["step"] == 4) for run in (resharded, whole))
    # Sums are taken in another order.
    for key in ("reward/mean", "policy/loss", "rm/loss", "response/tokens"):
        assert first[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
