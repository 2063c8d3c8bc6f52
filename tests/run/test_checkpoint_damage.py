"""Damaged checkpoints: named, not used, and nothing outside of one is read (requirement 2)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import flip, names, restored, rewrite, save, saved

from r2m_ray.errors import RunError
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import fault

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
    "driver": (lambda step: flip(step / "driver.json"), "driver.json does not match its sha256"),
    "no manifest": (lambda step: (step / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "torn manifest": (lambda step: os.truncate(step / "MANIFEST.json", 40), "MANIFEST.json is unreadable"),
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
    # The run goes on and saves the damaged step anew; what was there stays for whoever wants to look.
    save(checkpoints, 2)
    assert restored(checkpoints) == (2, 2)
    assert [name[:20] for name in names(tmp_path)] == [
        ".damaged-step-000002",
        "LATEST",
        "step-000001",
        "step-000002",
    ]


def outside(step: Path, tmp: Path) -> str:
    """A manifest that lists a file beside the checkpoint, with its true size and digest."""
    (tmp / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": commit.sha256(tmp / "secret")}
    files = json.loads((step / "MANIFEST.json").read_text())["files"]
    rewrite(step, files={**files, "../secret": entry})
    return "../secret is missing"


def absolute(step: Path, tmp: Path) -> str:
    files = json.loads((step / "MANIFEST.json").read_text())["files"]
    (tmp / "secret").write_text("x")
    rewrite(step, files={**files, str(tmp / "secret"): {"bytes": 1, "sha256": commit.sha256(tmp / "secret")}})
    return "secret is missing"


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


@pytest.mark.parametrize(
    "hint", [None, "", "step-000001\n", "step-000009\n", "../../etc\n", "\0\xff", "directory"]
)
def test_latest_is_a_hint_that_decides_nothing(tmp_path: Path, hint: str | None) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "LATEST").unlink()
    if hint == "directory":
        (tmp_path / "LATEST").mkdir()
    elif hint is not None:
        (tmp_path / "LATEST").write_text(hint)
    assert restored(checkpoints) == (2, 2)
    # Nor does one that cannot be written keep a step from being committed.
    save(checkpoints, 3)
    assert restored(checkpoints) == (3, 3)


def test_files_that_are_not_listed_are_told_and_not_a_fault(tmp_path: Path) -> None:
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
