"""Checkpoints: committed whole, and pruned without losing the last (requirement 8)."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import Part, flip, names, restored, roles, save, saved

from r2m_ray import __version__
from r2m_ray.errors import RunError
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import Checkpoints, driver_state

# What a commit is


def test_a_restored_run_has_every_part_of_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    parts = roles(0)
    assert asyncio.run(checkpoints.restore(parts)) == 3
    assert (parts.policy.value, parts.reward.value) == (3, 30)


def test_without_a_checkpoint_a_run_starts_at_0(tmp_path: Path) -> None:
    assert restored(Checkpoints(tmp_path / "none", keep=1)) == (0, 0)


def test_a_commit_says_what_it_holds_and_what_its_run_is_made_of(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    directory = tmp_path / "step-000002"
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["r2m_ray"], manifest["step"]) == (commit.FORMAT, __version__, 2)
    assert list(manifest["files"]) == [
        "driver.json",
        "policy/inner/more.json",
        "policy/state.json",
        "reward_head/inner/more.json",
        "reward_head/state.json",
    ]
    # `printf 20 | sha256sum`
    digest = "f5ca38f748a1d6eaf726b8a42fb575c3c71f1864a8143301782de13da2d9202b"
    assert manifest["files"]["reward_head/state.json"] == {"bytes": 2, "sha256": digest}
    assert driver_state(directory).identity == {"seed": 7}
    assert (tmp_path / "LATEST").read_text() == "step-000002\n"


def test_everything_is_on_the_disk_before_the_next_thing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[str] = []
    fsync, rename = os.fsync, os.rename

    def name(path: str) -> str:
        return re.sub(r"\.tmp-step-000001-\w{8}", "TMP", path.replace(str(tmp_path), "."))

    def traced_fsync(descriptor: int) -> None:
        trace.append(name(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_rename(source: Any, target: Any) -> None:
        trace.append(f"rename {name(str(target))}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    saved(tmp_path / "checkpoints", 1)
    building = "./checkpoints/TMP"
    files = [
        "driver.json",
        *(f"{p}/{f}" for p in ("policy", "reward_head") for f in ("inner/more.json", "state.json")),
    ]
    directories = ["", *(f"/{p}{d}" for p in ("policy", "reward_head") for d in ("", "/inner"))]
    assert trace[0] == "."  # The new directory `checkpoints` itself.
    assert trace[1:6] == [f"{building}/{file}" for file in files]
    assert trace[6] == f"{building}/MANIFEST.json"
    assert sorted(trace[7:12]) == sorted(building + directory for directory in directories)
    assert trace[12:14] == ["rename ./checkpoints/step-000001", "./checkpoints"]


def test_a_committed_step_is_never_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, 1)
    save(checkpoints, 1, roles(5))
    assert restored(checkpoints) == (1, 1)
    assert "this step is committed already" in caplog.text


def test_a_checkpoint_without_a_roles_files_is_never_committed(tmp_path: Path) -> None:
    class Elsewhere(Part):
        async def save(self, directory: Path) -> None:
            """An actor on a node that does not share the directory."""

    with pytest.raises(RunError, match=r"policy: its actor wrote nothing here; run\.root must be"):
        save(Checkpoints(tmp_path, keep=1), 1, roles(1, Elsewhere("policy", 1)))
    assert names(tmp_path) == []


# Requirement 8: pruning


def test_only_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000003", "step-000004"]


def test_one_may_be_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000002"]
    assert restored(checkpoints) == (2, 2)


def test_damaged_checkpoints_do_not_take_the_place_of_sound_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "step-000003" / "driver.json").unlink()
    (tmp_path / "step-000002" / "driver.json").unlink()
    keeping_two = Checkpoints(tmp_path, keep=2)
    save(keeping_two, 4)
    assert "step-000001" in names(tmp_path)
    (tmp_path / "step-000004" / "driver.json").unlink()
    assert restored(checkpoints) == (1, 1)


def test_a_damaged_checkpoint_of_a_later_step_is_set_aside_by_the_next_commit(tmp_path: Path) -> None:
    saved(tmp_path, 10, 30, keep=2)
    flip(tmp_path / "step-000030" / "policy/state.json")
    # The run fell back to step 10 and saves more often now.
    checkpoints = saved(tmp_path, 20, keep=1)
    assert [name[:20] for name in names(tmp_path)] == [".damaged-step-000030", "LATEST", "step-000020"]
    assert restored(checkpoints) == (20, 20)


def test_an_old_checkpoint_is_pruned_only_once_the_new_one_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that acknowledges bytes and returns others."""
    saved(tmp_path, 1)
    flush = commit.flush

    def lossy(path: Path) -> None:
        flush(path)
        if path.name == "state.json" and path.parent.name == "policy":
            flip(path)

    monkeypatch.setattr(commit, "flush", lossy)
    with pytest.raises(RunError, match=r"does not read back: policy/state.json does not match its sha256"):
        saved(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000001"]
