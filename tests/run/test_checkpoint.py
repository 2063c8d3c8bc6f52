"""Checkpoints: committed completely, pruned without losing the last one, and never used when damaged.

Requirements 2 (damage), 5 (a full disk) and 8 (pruning).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r2m_ray import __version__
from r2m_ray.errors import ActorLost, RunError
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import Checkpoints, driver_state, fault


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


def listed(directory: Path) -> dict[str, Any]:
    """The files of a manifest."""
    return dict(json.loads((directory / "MANIFEST.json").read_text())["files"])


def flip(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


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


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path, keep: int) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert names(tmp_path) == ["step-000003", "step-000004"][-keep:]
    assert restored(checkpoints) == (4, 4)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
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
    assert [name[:20] for name in names(tmp_path)] == [".damaged-step-000030", "step-000020"]
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
    assert names(tmp_path) == ["step-000001"]


# Requirement 2: damage

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda step: flip(step / "policy/state.json"), "policy/state.json does not match its sha256"),
    "longer": (
        lambda step: (step / "policy/state.json").write_text("12345"),
        "policy/state.json has 5 bytes, its manifest says 1",
    ),
    "cut": (
        lambda step: os.truncate(step / "policy/inner/more.json", 99),
        "policy/inner/more.json has 99 bytes, its manifest says 100",
    ),
    "file gone": (
        lambda step: (step / "reward_head/state.json").unlink(),
        "reward_head/state.json is missing",
    ),
    "driver state": (lambda step: flip(step / "driver.json"), "driver.json does not match its sha256"),
    "no manifest": (lambda step: (step / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "cut manifest": (lambda step: os.truncate(step / "MANIFEST.json", 40), "MANIFEST.json is unreadable"),
    "manifest without files": (
        lambda step: (step / "MANIFEST.json").write_text('{"format": 1, "step": 2, "r2m_ray": ""}'),
        "MANIFEST.json is unreadable (no manifest: KeyError 'files')",
    ),
    "deep manifest": (
        lambda step: (step / "MANIFEST.json").write_text("[" * 100_000),
        "MANIFEST.json is unreadable",
    ),
    "other format": (lambda step: rewrite(step, format=2), "its format is 2, this version reads 1"),
    "other step": (lambda step: rewrite(step, step=3), "MANIFEST.json is of step 3"),
    "no role": (lambda step: rewrite(step, files={}), "policy is empty"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_an_older_checkpoint_is_used(
    tmp_path: Path, damage: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-000002")
    with caplog.at_level(logging.WARNING):
        assert restored(checkpoints) == (1, 1)
    (warning,) = caplog.messages
    assert warning.startswith("checkpoint step-000002 is not used: ")
    assert reason in warning
    assert warning.endswith("; falling back to step-000001")
    # The run goes on and saves the damaged step again; the damaged one stays beside it.
    save(checkpoints, 2)
    assert restored(checkpoints) == (2, 2)
    assert [name[:20] for name in names(tmp_path)] == [".damaged-step-000002", "step-000001", "step-000002"]


def listing(step: Path, secret: Path, name: str) -> str:
    """A manifest that lists a file beside the checkpoint, with its true size and digest."""
    secret.write_text("x")
    rewrite(step, files={**listed(step), name: {"bytes": 1, "sha256": commit.sha256(secret)}})
    return "secret is missing"


def outside(step: Path, tmp: Path) -> str:
    return f"../{listing(step, step.parent / 'secret', '../secret')}"


def absolute(step: Path, tmp: Path) -> str:
    return listing(step, tmp / "secret", str(tmp / "secret"))


def linked_file(step: Path, tmp: Path) -> str:
    (step / "policy/state.json").rename(tmp / "state.json")
    (step / "policy/state.json").symlink_to(tmp / "state.json")
    return "policy/state.json cannot be read (a link or a special file, which is not followed)"


def linked_directory(step: Path, tmp: Path) -> str:
    (step / "policy").rename(tmp / "policy")
    (step / "policy").symlink_to(tmp / "policy")
    return "policy cannot be read (a link or a special file, which is not followed)"


def linked_checkpoint(step: Path, tmp: Path) -> str:
    step.rename(tmp / "elsewhere")
    step.symlink_to(tmp / "elsewhere")
    return "is a link, which is not followed"


def pipe(step: Path, tmp: Path) -> str:
    (step / "policy/state.json").unlink()
    os.mkfifo(step / "policy/state.json")
    return "a link or a special file"


@pytest.mark.parametrize("trick", [outside, absolute, linked_file, linked_directory, linked_checkpoint, pipe])
def test_nothing_outside_a_checkpoint_is_read(tmp_path: Path, trick: Callable[[Path, Path], str]) -> None:
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    reason = trick(tmp_path / "checkpoints/step-000002", tmp_path)
    found = fault(tmp_path / "checkpoints/step-000002")
    assert found is not None
    assert reason in found
    assert restored(checkpoints) == (1, 1)


def test_when_none_is_valid_the_run_stops_instead_of_starting_over(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / "MANIFEST.json").write_text("{")
    with pytest.raises(
        RunError, match=r"no checkpoint is valid \(step-000002 is not used: MANIFEST.json is unreadable"
    ) as refused:
        restored(checkpoints)
    assert refused.value.exit_code == 3
    assert "step-000001 is not used" in str(refused.value)


def test_files_that_are_not_listed_are_reported_and_not_a_fault(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-000001" / "policy" / "notes.txt").write_text("mine")
    assert fault(tmp_path / "step-000001") is None
    assert commit.unlisted(tmp_path / "step-000001") == ["policy/notes.txt"]


def test_steps_are_numbers_and_names_of_other_forms_are_none(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 999_999, 1_000_000)
    for other in ("step-1", "step-000007-copy", "step-００００１２", "step-abcdef"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-000008").touch()
    assert [path.name for path in checkpoints.committed()] == ["step-999999", "step-1000000"]
    assert restored(checkpoints)[0] == 1_000_000


# Requirement 5: saves that fail leave the old checkpoint


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
    files = listed(tmp_path / "step-000001")
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
