"""A run in one process is the run over Ray, and the driver reads numbers per row whatever the models are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from finished_run import same_run, steps
from models import save_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.prepare.materials import RESPONSE_ONLY

pytestmark = pytest.mark.e2e
DEADLINE_S = 300

Local = Callable[..., Path]


@pytest.fixture
def local(settings: Sequence[str], tmp_path: Path) -> Local:
    """Trains in one process, of its own because vLLM leaves its state in a process."""

    def run(name: str, *overrides: str) -> Path:
        words = [*settings, "cluster.address=none", f"run.root={tmp_path}", f"run.name={name}", *overrides]
        command = [sys.executable, "-m", "r2m_ray", "train", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return run


def test_r2m_in_one_process_is_the_run_over_ray(r2m: Path, local: Local) -> None:
    same_run(local("r2m"), r2m, 3)


@pytest.mark.slow
def test_vanilla_in_one_process_is_the_run_over_ray(vanilla: Path, local: Local) -> None:
    same_run(local("vanilla", "reward=vanilla"), vanilla, 3)


@pytest.mark.slow
def test_a_resume_in_one_process_equals_the_uninterrupted_run(
    r2m: Path, local: Local, tmp_path: Path
) -> None:
    """Also where the run began over Ray: who plays the roles is no part of a run."""
    shutil.copytree(r2m, tmp_path / "stopped")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step-{step:06d}")
    same_run(local("stopped", "run.resume=true"), r2m, 3)


def models(directory: Path, width: int) -> list[str]:
    """A random policy of this width, and a reward model; returns the overrides that name them."""
    for name, kind, template in (
        ("policy", LlamaForCausalLM, None),
        ("reward", LlamaForSequenceClassification, RESPONSE_ONLY),
    ):
        save_model(
            directory / name,
            kind,
            tokenizer=note2answer.tokenizer(template),
            width=width if name == "policy" else 64,
            layers=1,
            num_labels=1,
        )
    return [f"model.policy={directory / 'policy'}", f"model.reward={directory / 'reward'}"]


@pytest.mark.slow
def test_bytes_that_the_driver_reads_grow_neither_with_width_nor_with_length(
    local: Local, tmp_path: Path
) -> None:
    one_step = ["algo.steps=1", "evaluate.every=0", "logging.rollouts_per_step=0"]
    found = {
        (width, length): steps(
            local(
                f"{width}-{length}",
                *one_step,
                *models(tmp_path / f"models-{width}", width),
                f"task.max_new_tokens={length}",
            )
        )[0]
        for width, length in ((64, 8), (128, 8), (64, 32))
    }
    narrow, wide, long = found.values()
    assert wide["sync/bytes"] > 1.5 * narrow["sync/bytes"]
    assert long["response/tokens"] > 2 * narrow["response/tokens"]
    assert narrow["bytes/driver"] == wide["bytes/driver"] == long["bytes/driver"]
    # 16 rows: far below one hidden state per row of the narrow model.
    assert narrow["bytes/driver"] < 16 * 64 * 4
    assert narrow["bytes/records"] == 0
