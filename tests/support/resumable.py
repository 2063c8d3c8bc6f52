"""A run whose checkpoint lies in its directory, about to be resumed."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from r2m_ray.cli.checks.preflight import preflight
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.errors import Problem
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.resume import run_identity


class Part:
    def __init__(self, name: str) -> None:
        self.name = name

    async def save(self, directory: Path) -> None:
        (directory / self.name).mkdir()
        (directory / self.name / "state.json").write_text("1")


def commit(directory: Path, step: int, identity: dict[str, Any]) -> None:
    parts: Any = SimpleNamespace(policy=Part("policy"), reward=Part("reward_head"))
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=2, identity=identity)
    asyncio.run(checkpoints.save(step, parts))


def log_steps(directory: Path, last: int) -> None:
    rows = [{"step": step, "kind": "step"} for step in range(1, last + 1)]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def resumable(tmp_path: Path, policy_dir: Path, reward_dir: Path) -> Config:
    """A run on preference files whose checkpoint of step 2 lies in its directory, about to be resumed."""
    config = Config()
    config.run.root = str(tmp_path / "runs")
    config.model.policy = str(shutil.copytree(policy_dir, tmp_path / "policy"))
    config.model.reward = str(shutil.copytree(reward_dir, tmp_path / "reward"))
    config.task.name = TaskName.preferences
    for name in ("train", "eval"):
        pair = {"prompt": name, "chosen": "w1", "rejected": "w2"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(pair) + "\n")
    config.task.train_file, config.task.eval_file = (
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "eval.jsonl"),
    )
    directory = tmp_path / "runs" / "run"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    commit(directory, 2, run_identity(config))
    log_steps(directory, 2)
    config.run.resume = True
    return config


def refusals(config: Config) -> list[str]:
    return [str(problem) for problem in preflight(config) if not problem.warning]


def warnings(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems if problem.warning]
