"""What a commit costs: seconds, bytes, how the seconds split, and the share of a step at every=1.

Two parts. Policies of several widths are saved by the real learner and reward engine in this process,
without Ray, each commit split into writing (the engines), hashing and fsync (the manifest), and verifying
(reading every file back from the disk). Then the real loop runs the demo with a commit after every step.

    python benchmarks/checkpoint.py [--widths 96 512 1024] [--repeats 7] [--steps 8] [--out FILE] [overrides]

Needs the demo's models: `r2m-ray prepare experiment=demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import machine, summary, write
from transformers import AutoConfig
from weight_sync import policy_of_width

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Roles
from r2m_ray.engines.policy.learner import PolicyLearner
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import Checkpoints
from r2m_ray.run.files import METRICS_FILE, read_steps
from r2m_ray.tasks.models import Models

PARTS = ("write", "hash", "fsync", "verify")


class Split:
    """Seconds of each part of a commit; hashing within the verification counts as verification."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, unless another one is being timed."""
        if self._running is not None:
            yield
            return
        self._running, start = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self._running = None

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds count to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


class Engine:
    """A real engine as the role that a checkpoint asks to save."""

    def __init__(self, engine: PolicyLearner | RewardEngine) -> None:
        self._engine = engine
        self.split = Split()

    async def save(self, directory: Path) -> None:
        with self.split.part("write"):
            self._engine.save(directory)


def engines(config: Config, policy: str, reward: str) -> tuple[Engine, Engine]:
    """A learner and a reward engine of one rank each, on the CPU."""
    device = torch.device("cpu")
    width = AutoConfig.from_pretrained(policy).hidden_size
    learner = PolicyLearner(config=config, model_dir=policy, rank=0, world_size=1, device=device)
    scorer = RewardEngine(
        config=config, model_dir=reward, policy_width=width, rank=0, world_size=1, device=device
    )
    return Engine(learner), Engine(scorer)


def commits(policy: Engine, reward: Engine, directory: Path, repeats: int) -> dict[str, Any]:
    """Commit ``repeats`` times after one that is not measured, keeping one."""
    roles: Any = Roles(rollout=None, policy=policy, reward=reward, reference=None, sync=None, share=None)
    checkpoints = Checkpoints(directory, keep=1)
    rows: list[dict[str, float]] = []
    originals = {"hash": commit.sha256, "fsync": commit.flush, "verify": commit.fault}
    try:
        for step in range(repeats + 1):
            split = policy.split = reward.split = Split()
            commit.sha256 = split.timed("hash", originals["hash"])
            commit.flush = split.timed("fsync", originals["fsync"])
            commit.fault = split.timed("verify", originals["verify"])
            start = time.perf_counter()
            path = asyncio.run(checkpoints.save(step, roles))
            rows.append({**split.seconds, "commit": time.perf_counter() - start})
    finally:
        commit.sha256, commit.flush, commit.fault = originals.values()
    medians = {name: summary([row[name] for row in rows[1:]]) for name in (*PARTS, "commit")}
    size = commit.read_manifest(path).bytes
    return {
        "bytes": size,
        "seconds": medians,
        "share_of_commit": {name: medians[name]["median"] / medians["commit"]["median"] for name in PARTS},
        "bytes_per_second": size / medians["commit"]["median"],
    }


def loop(overrides: list[str], steps: int, root: Path) -> dict[str, Any]:
    """Seconds of steps and of the commits after them in the real loop; a commit is in the next step's row."""
    fields = [f"algo.steps={steps}", "checkpoint.every=1", "evaluate.every=0", "logging=disabled"]
    line = [sys.executable, "-m", "r2m_ray", "train", "experiment=demo", *fields, *overrides]
    subprocess.run([*line, f"run.root={root}", "run.name=every-step"], check=True)
    rows = [row for row in read_steps(root / "every-step" / METRICS_FILE) if row["kind"] == "step"]
    step_s = summary([row["time/step"] for row in rows[2:]])
    commit_s = summary([row["time/checkpoint"] for row in rows[2:]])
    newest = Checkpoints(root / "every-step" / "checkpoints", keep=1).newest()
    assert newest is not None
    return {
        "bytes": commit.read_manifest(newest).bytes,
        "step_seconds": step_s,
        "commit_seconds": commit_s,
        "commit_over_step": commit_s["median"] / step_s["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[96, 512, 1024])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of the real loop, the first two unmeasured")
    parser.add_argument("--out", type=Path, default=Path("checkpoint.json"))
    arguments, overrides = parser.parse_known_args()
    config = load_config(["experiment=demo", *overrides])
    prepared = Models.of(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    torch.set_num_threads(1)
    by_width = {}
    # Beside this file, not in /tmp: that may be memory, which is no disk.
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".checkpoint-benchmark-") as scratch:
        for width in arguments.widths:
            policy, parameters = policy_of_width(width, prepared.policy, Path(scratch) / str(width))
            pair = engines(config, policy, prepared.reward)
            result = commits(*pair, Path(scratch) / f"{width}-commits", arguments.repeats)
            by_width[str(width)] = {"parameters": parameters, **result}
        result = {
            "benchmark": "checkpoint",
            "machine": machine(),
            "by_width": by_width,
            "loop": loop(overrides, arguments.steps, Path(scratch)),
        }
    write(arguments.out, result)
    print(json.dumps({name: result[name] for name in ("by_width", "loop")}, indent=1))


if __name__ == "__main__":
    main()
