"""Checkpoints: committed whole, verified before they are trusted, pruned without losing the last."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r2m_ray.checkpoint import Checkpoints, verify
from r2m_ray.data import PromptStream
from r2m_ray.errors import RunError


class Part:
    """A stateful role whose state is one number in one file."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    async def save(self, directory: Path) -> None:
        (directory / self.name).mkdir()
        (directory / self.name / "state.json").write_text(json.dumps(self.value))

    async def load(self, directory: Path) -> None:
        self.value = json.loads((directory / self.name / "state.json").read_text())


def roles(value: int) -> Any:
    return SimpleNamespace(policy=Part("policy", value), reward=Part("reward_head", 10 * value))


def stream() -> PromptStream:
    return PromptStream([f"p{i}" for i in range(40)], seed=0)


def saved(directory: Path, steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep=keep)
    for step in range(1, steps + 1):
        prompts = stream()
        prompts.take(3 * step)
        asyncio.run(checkpoints.save(step, roles(step), prompts))
    return checkpoints


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_restored_run_has_every_part_of_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    parts, prompts, expected = roles(0), stream(), stream()
    assert asyncio.run(checkpoints.restore(parts, prompts)) == 3
    assert (parts.policy.value, parts.reward.value) == (3, 30)
    expected.take(9)
    assert prompts.take(4) == expected.take(4)


def test_without_a_checkpoint_a_run_starts_at_0(tmp_path: Path) -> None:
    assert asyncio.run(Checkpoints(tmp_path / "none", keep=1).restore(roles(1), stream())) == 0


def test_only_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    saved(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_a_torn_save_is_ignored_and_overwritten(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    torn = tmp_path / ".tmp-step-000002"
    torn.mkdir()
    (torn / "junk").write_text("half")
    assert asyncio.run(checkpoints.restore(roles(0), stream())) == 1
    asyncio.run(checkpoints.save(2, roles(2), stream()))
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert not (tmp_path / "step-000002" / "junk").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_text("8"), "does not match its sha256"),
        (lambda file: file.write_text("12345"), "has 5 bytes, its manifest says 1"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_damage_is_found_and_an_older_checkpoint_is_used(tmp_path: Path, damage: Any, reason: str) -> None:
    checkpoints = saved(tmp_path, 2)
    damage(tmp_path / "step-000002" / "policy" / "state.json")
    problem = verify(tmp_path / "step-000002")
    assert problem is not None
    assert "policy/state.json" in problem
    assert reason in problem
    parts = roles(0)
    assert asyncio.run(checkpoints.restore(parts, stream())) == 1
    assert parts.policy.value == 1
    # The run goes on and saves the damaged step anew.
    asyncio.run(checkpoints.save(2, roles(2), stream()))
    assert verify(tmp_path / "step-000002") is None


def test_when_none_is_valid_the_run_stops_instead_of_starting_over(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    for directory in tmp_path.iterdir():
        (directory / "MANIFEST.json").write_text("{")
    with pytest.raises(RunError, match=r"no checkpoint is valid \(step-000002: MANIFEST.json is unreadable"):
        asyncio.run(checkpoints.restore(roles(0), stream()))


def test_a_checkpoint_without_a_roles_files_is_never_committed(tmp_path: Path) -> None:
    class Elsewhere(Part):
        async def save(self, directory: Path) -> None:
            """An actor on a node that does not share the directory."""

    parts: Any = SimpleNamespace(policy=Elsewhere("policy", 1), reward=Part("reward_head", 1))
    with pytest.raises(RunError, match=r"policy: its actor wrote nothing here; run\.root must be"):
        asyncio.run(Checkpoints(tmp_path, keep=1).save(1, parts, stream()))
    assert Checkpoints(tmp_path, keep=1).newest() is None
