"""Saves that fail, for want of room or for what an actor says, leave the old checkpoint (requirement 5)."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_parts import Part, names, restored, rewrite, roles, save, saved

from r2m_ray.errors import ActorLost, RunError


class Failing(Part):
    """One whose save writes its files, then fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__("policy", 1)
        self.error = error

    async def save(self, directory: Path) -> None:
        await super().save(directory)
        raise self.error


def test_a_save_that_cannot_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    huge = tmp_path / "step-000001" / "policy/inner/more.json"
    size = 2**43  # 8 TiB, all of it a hole.
    os.truncate(huge, size)
    files = json.loads((tmp_path / "step-000001/MANIFEST.json").read_text())["files"]
    files["policy/inner/more.json"]["bytes"] = size
    rewrite(tmp_path / "step-000001", files=files)
    needed = sum(entry["bytes"] for entry in files.values())
    asked = Part("policy", 2)

    async def never(directory: Path) -> None:
        raise AssertionError("the role was asked to write")

    asked.save = never  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=rf"step-000002: not saved; .* free. a checkpoint needs {needed} bytes"
    ) as full:
        save(checkpoints, 2, roles(2, asked))
    assert "run.resume=true" in str(full.value)
    assert names(tmp_path) == ["step-000001"]


def test_a_damaged_manifest_does_not_decide_how_much_room_is_needed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    rewrite(tmp_path / "step-000001", files={"driver.json": {"bytes": 2**60, "sha256": ""}})
    save(checkpoints, 2)
    assert restored(checkpoints) == (2, 2)


def test_a_disk_that_fills_up_while_a_role_writes_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    class Full(Part):
        async def save(self, directory: Path) -> None:
            await super().save(directory)
            with open("/dev/full", "w") as device:
                device.write("x")

    checkpoints = saved(tmp_path, 1)
    with pytest.raises(
        RunError, match=r"step-000002: not saved; 101 bytes of it were written, and \d+ are free"
    ) as full:
        save(checkpoints, 2, roles(2, Full("policy", 2)))
    assert "No space left on device" in str(full.value)
    assert names(tmp_path) == ["step-000001"]
    assert restored(checkpoints) == (1, 1)
    save(checkpoints, 2)
    assert restored(checkpoints) == (2, 2)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes to a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [50, 120, 400])
def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_checkpoint(tmp_path: Path, size: int) -> None:
    """In a role's file, in the driver's, or in the manifest."""
    checkpoints = saved(tmp_path, 1)
    with largest_file(size), pytest.raises(RunError, match=r"step-000002: not saved; .* File too large"):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-000001"]
    assert restored(checkpoints) == (1, 1)


def test_what_an_actor_says_is_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(RunError, match=r"step-000002: not saved; .* policy-1 failed: disk quota exceeded"):
        save(checkpoints, 2, roles(2, Failing(RunError("policy-1 failed: disk quota exceeded"))))
    with pytest.raises(ActorLost) as lost:
        save(checkpoints, 2, roles(2, Failing(ActorLost("policy-1 died", ("policy-1",)))))
    assert lost.value.actors == ("policy-1",)
    assert names(tmp_path) == ["step-000001"]
