"""Sweeps of real runs through hydra: a grid, a search and a launcher, and the comparison that reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TINY = (
    "experiment=demo", "prepare.sft_steps=60", "prepare.reward_steps=30", "prepare.sft_rows=2000",
    "prepare.pair_rows=500", "algo.steps=2", "algo.prompts_per_step=8", "algo.responses_per_prompt=4",
    "evaluate.prompts=8", "evaluate.pairs=8", "evaluate.every=1", "logging=disabled",
)  # fmt: skip


def r2m_ray(directory: Path, *words: str) -> str:
    """The output of a command that succeeds."""
    line = [sys.executable, "-m", "r2m_ray", *words]
    done = subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweeps")
    r2m_ray(directory, "prepare", *TINY)
    return directory


def finished(world: Path) -> set[str]:
    return {path.parents[1].name for path in world.glob("runs/*/report/report.html")}


def test_a_grid_trains_each_arm_and_compare_reads_them(world: Path) -> None:
    r2m_ray(world, "train", "-m", *TINY, "reward=vanilla,r2m")
    assert {"demo-reward-vanilla", "demo-reward-r2m"} <= finished(world)
    arms = ("vanilla=runs/demo-reward-vanilla", "r2m=runs/demo-reward-r2m")
    page = r2m_ray(world, "compare", *arms, "--baseline", "vanilla").strip()
    assert (world / page).is_file()


def test_a_search_reads_gold_of_each_trial(world: Path) -> None:
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=maximize")
    rate = "policy.learning_rate=tag(log,interval(1e-5,1e-3))"
    r2m_ray(world, "train", "-m", *TINY, *search, rate, "run.name=search")
    assert len([name for name in finished(world) if name.startswith("search-policy.learning_rate-")]) == 3
    (results,) = world.glob("runs/multirun/*/optimization_results.yaml")
    assert float(re.findall(r"best_value: (\S+)", results.read_text())[0]) > float("-inf")


def test_a_launcher_trains_side_by_side(world: Path) -> None:
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    r2m_ray(world, "train", "-m", *TINY, *launcher, "reward=vanilla,r2m", "run.name=side")
    assert {"side-reward-vanilla", "side-reward-r2m"} <= finished(world)
