"""Checkpoints: everything a run needs to go on, committed at once or not at all.

A checkpoint directory ``step-000020`` holds the policy in Hugging Face format, the R2M head, both
optimizers, the data cursor, and MANIFEST.json with the size and sha256 of every file, written
last. It is built under a temporary name and renamed, so a directory with its final name is
complete; and it is verified again before it is trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from r2m_ray.data import PromptStream
from r2m_ray.errors import RunError
from r2m_ray.roles import Roles

MANIFEST = "MANIFEST.json"
DRIVER_STATE = "driver.json"
ROLES = ("policy", "reward_head")
"""Directories that a checkpoint cannot be without."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self._keep = keep

    async def save(self, step: int, roles: Roles, prompts: PromptStream) -> Path:
        """Commit the state after ``step``, then prune older checkpoints beyond ``keep``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        building = self.directory / f".tmp-step-{step:06d}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        await roles.policy.save(building)
        await roles.reward.save(building)
        for part in ROLES:
            if not any((building / part).glob("*")):
                raise RunError(
                    f"{building / part}: its actor wrote nothing here; run.root must be a directory that "
                    "every node of the cluster shares"
                )
        state = {"step": step, "prompts": prompts.state()}
        (building / DRIVER_STATE).write_text(json.dumps(state, indent=2, sort_keys=True))
        final = self.directory / f"step-{step:06d}"
        if final.exists():
            # A damaged checkpoint that an older one replaced; what is in it stays for whoever wants to look.
            final.rename(final.with_name(f".damaged-{final.name}-{uuid.uuid4().hex[:8]}"))
        _commit(building, final)
        self._prune()
        return final

    async def restore(self, roles: Roles, prompts: PromptStream) -> int:
        """Load the newest valid checkpoint into every stateful role; return its step, 0 if there is none."""
        directory = self.newest()
        if directory is None:
            return 0
        await roles.policy.load(directory)
        await roles.reward.load(directory)
        state = json.loads((directory / DRIVER_STATE).read_text())
        prompts.restore(state["prompts"])
        return int(state["step"])

    def newest(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; None if the run never committed one.

        Raises RunError if checkpoints exist and none is valid: starting over would lose the run.
        """
        reasons: list[str] = []
        for directory in reversed(self._committed()):
            problem = verify(directory)
            if problem is None:
                for reason in reasons:
                    logger.warning("checkpoint %s is not used; falling back to %s", reason, directory.name)
                return directory
            reasons.append(f"{directory.name}: {problem}")
        if reasons:
            raise RunError(
                f"{self.directory}: no checkpoint is valid ({'; '.join(reasons)}). "
                "Restore one from a backup, or start a new run.name."
            )
        return None

    def _committed(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.is_dir())

    def _prune(self) -> None:
        for directory in self._committed()[: -self._keep]:
            # Renamed first: a half-deleted directory must not look like a checkpoint.
            doomed = directory.with_name(f".tmp-{directory.name}")
            directory.rename(doomed)
            shutil.rmtree(doomed)


def verify(directory: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; return what is wrong, or None."""
    path = directory / MANIFEST
    try:
        expected: dict[str, dict[str, object]] = json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    for name, entry in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its sha256"
    return None


def _commit(building: Path, final: Path) -> None:
    files = {}
    for file in _files(building):
        _fsync(file)
        files[str(file.relative_to(building))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = building / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2, sort_keys=True))
    _fsync(manifest)
    _fsync(building)
    building.rename(final)
    _fsync(final.parent)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
