"""Roles whose state is one number, and checkpoints of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from r2m_ray.run.checkpoint import Checkpoints


class Part:
    """A stateful role whose state is one number in one file, beside a file in a directory of its own."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    async def save(self, directory: Path) -> None:
        (directory / self.name / "inner").mkdir(parents=True)
        (directory / self.name / "state.json").write_text(json.dumps(self.value))
        (directory / self.name / "inner" / "more.json").write_text("0" * 100)

    async def load(self, directory: Path) -> None:
        self.value = json.loads((directory / self.name / "state.json").read_text())


def roles(value: int, policy: Part | None = None) -> Any:
    return SimpleNamespace(policy=policy or Part("policy", value), reward=Part("reward_head", 10 * value))


def save(checkpoints: Checkpoints, step: int, parts: Any = None) -> Path:
    return asyncio.run(checkpoints.save(step, parts or roles(step)))


def saved(directory: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep=keep, identity={"seed": 7})
    for step in steps:
        save(checkpoints, step)
    return checkpoints


def restored(checkpoints: Checkpoints) -> tuple[int, int]:
    """The step and the policy's value that a run would go on from."""
    parts = roles(0)
    step = asyncio.run(checkpoints.restore(parts))
    return step, parts.policy.value


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def rewrite(directory: Path, **fields: Any) -> None:
    """Change fields of a manifest."""
    file = directory / "MANIFEST.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flip(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
