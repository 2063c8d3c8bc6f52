"""Checkpoints: everything that a run needs to continue, committed completely or not at all.

``checkpoints/`` of a run holds one directory per commit, ``step-000020``: the policy in Hugging Face
format, the R2M head, both optimizers, ``driver.json`` (step, identity of the run) and a
manifest. The newest one that verifies is loaded; names and contents alone decide. Names that begin with
``.tmp-`` are leftovers of a crash, and the next save removes them. Names that begin with ``.damaged-`` are
checkpoints that a valid one replaced; they stay until somebody removes them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from r2m_ray.errors import ActorLost, InputError, RunError
from r2m_ray.run import commit

if TYPE_CHECKING:
    # These load torch and transformers, which reading checkpoints does not need.
    from r2m_ray.core.roles import Roles

CHECKPOINTS = "checkpoints"
"""The directory of a run that holds them."""
DRIVER_STATE = "driver.json"
ROLES = ("policy", "reward_head")
"""Directories that every checkpoint has."""
NAME = re.compile(r"step-([0-9]{6,18})")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's part of a checkpoint. identity: see `r2m_ray.run.resume`."""

    step: int
    identity: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they lie.
        keep: How many valid ones to keep, the newest first.
        identity: What the run is made of; every checkpoint carries it.
    """

    def __init__(self, directory: Path, *, keep: int, identity: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self._keep = keep
        self._identity = dict(identity or {})
        self._reached = 0

    async def save(self, step: int, roles: Roles) -> Path:
        """Commit the state after ``step``, then prune older checkpoints beyond ``keep``.

        A step that is committed already stays as it is.

        Raises:
            RunError: The disk is full or fails; the message has path and bytes. Earlier checkpoints are kept.
            ActorLost: As the roles do. Earlier checkpoints are kept.
        """
        final = self.directory / f"step-{step:06d}"
        if final.exists() and fault(final) is None:
            logger.warning("%s: this step is committed already; it stays as it is", final)
            return final
        building = commit.temporary(final)
        try:
            self._make_room()
            building.mkdir()
            await roles.policy.save(building)
            await roles.reward.save(building)
            for part in ROLES:
                if not any((building / part).glob("*")):
                    raise RunError(
                        f"{building / part}: its actor wrote nothing here; run.root must be a directory that "
                        "every node of the cluster shares"
                    )
            state = {"step": step, "identity": self._identity}
            (building / DRIVER_STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
            # On a thread, because signals are handled between the event loop's turns.
            await asyncio.to_thread(commit.seal, building, step=step)
            if final.exists():
                _set_aside(final)
            commit.publish(building, final)
        except ActorLost:
            raise
        except (OSError, SafetensorError, RunError) as error:
            raise self._unsaved(final, building, error) from error
        finally:
            _remove(building)
        self._reached = step
        try:
            self._prune(final)
        except OSError as error:
            logger.warning("%s: older checkpoints are not pruned (%s)", self.directory, error)
        return final

    async def restore(self, roles: Roles) -> int:
        """Load the newest valid checkpoint into every stateful role.

        Returns:
            Its step; 0 if there is no checkpoint.

        Raises:
            RunError: No checkpoint is left, although this object has committed or restored one.
        """
        directory = await asyncio.to_thread(self.newest)
        if directory is None:
            if self._reached:
                raise RunError(
                    f"{self.directory}: step {self._reached} was committed here, and no checkpoint is left. "
                    "Put them back, and continue with run.resume=true."
                )
            return 0
        await roles.policy.load(directory)
        await roles.reward.load(directory)
        self._reached = driver_state(directory).step
        return self._reached

    def newest(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; None if the run never committed one.

        Raises RunError if checkpoints exist and none is valid, because starting over would lose the run.
        """
        reasons: list[str] = []
        for directory in reversed(self.committed()):
            reason = fault(directory)
            if reason is None:
                for skipped in reasons:
                    logger.warning("checkpoint %s; falling back to %s", skipped, directory.name)
                return directory
            reasons.append(f"{directory.name} is not used: {reason}")
        if reasons:
            raise RunError(
                f"{self.directory}: no checkpoint is valid ({'; '.join(reasons)}). "
                "Restore one from a backup, or start a new run.name."
            )
        return None

    def committed(self) -> list[Path]:
        """Every directory with a checkpoint's name, oldest first, valid or not."""
        if not self.directory.is_dir():
            return []
        # Not by a pattern: in a directory that cannot be read, a pattern finds nothing and raises nothing.
        found = [path for path in self.directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def _make_room(self) -> None:
        """Remove what a crash left, and refuse to begin what cannot be finished."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            commit.flush(self.directory.parent)
        for leftover in self.directory.glob(f"{commit.BUILDING}*"):
            _remove(leftover)
        # As many bytes as the last checkpoint that is not visibly damaged.
        last = next((path for path in reversed(self.committed()) if _is_complete(path)), None)
        needed = commit.read_manifest(last).bytes if last else 0
        if shutil.disk_usage(self.directory).free < needed:
            raise RunError(f"a checkpoint needs {needed} bytes, as the last one did")

    def _unsaved(self, final: Path, building: Path, error: Exception) -> RunError:
        written = sum(path.lstat().st_size for path in building.rglob("*") if not path.is_dir())
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        return RunError(
            f"{final}: not saved; {written} bytes of it were written, and {free} are free. {error}. Earlier "
            "checkpoints are unchanged. If that disk is full, free space or lower checkpoint.keep, then "
            "continue with run.resume=true."
        )

    def _prune(self, newest: Path) -> None:
        """Remove older checkpoints beyond ``keep`` valid ones; ``newest``, the first, has just verified.

        Damaged ones do not count. Those of a later step are damaged: the run fell back behind them.
        """
        valid = 1
        for directory in reversed(self.committed()):
            if step_of(directory) > step_of(newest):
                _set_aside(directory)
            elif directory == newest:
                continue
            elif valid >= self._keep:
                # Renamed first: a half-removed directory must not look like a checkpoint.
                doomed = commit.temporary(directory)
                directory.rename(doomed)
                commit.flush(doomed.parent)
                _remove(doomed)
            else:
                valid += _is_complete(directory)


def fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is valid. Every byte is read."""
    if reason := commit.fault(directory):
        return reason
    manifest = commit.read_manifest(directory)
    for part in ROLES:
        if not any(name.startswith(f"{part}/") for name in manifest.files):
            return f"{part} is empty"
    try:
        step = driver_state(directory).step
    except (OSError, ValueError) as error:
        return f"{DRIVER_STATE} is unreadable ({error})"
    for file, found in ((commit.MANIFEST, manifest.step), (DRIVER_STATE, step)):
        if found != step_of(directory):
            return f"{file} is of step {found}"
    return None


def driver_state(directory: Path) -> DriverState:
    """The driver's part of a checkpoint; ValueError where it is not what a driver wrote."""
    content = json.loads((directory / DRIVER_STATE).read_bytes())
    try:
        return DriverState(step=int(content["step"]), identity=dict(content["identity"]))
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def step_of(directory: Path) -> int:
    """The step that a checkpoint's name gives."""
    match = NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def export(checkpoint: Path, target: Path) -> None:
    """Copy ``policy/`` (a Hugging Face model with its tokenizer) and ``reward_head/`` to a new directory.

    Only files that the manifest lists are copied, and each copy is compared with it; nothing is loaded.
    The result is complete or absent, and has a manifest of its own.

    Raises:
        InputError: ``target`` exists.
        RunError: The checkpoint is damaged, or the disk fails; the message names the file.
    """
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; give a new directory")
    if reason := fault(checkpoint):
        raise RunError(f"{checkpoint}: not exported: {reason}; choose another --step")
    building = commit.temporary(target)
    try:
        building.mkdir(parents=True)
        for name, entry in commit.read_manifest(checkpoint).files.items():
            if name.split("/")[0] in ROLES:
                copy = building / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, copy, follow_symlinks=False)
                if commit.sha256(copy) != entry.sha256:
                    raise RunError(f"{checkpoint / name}: changed while it was copied; export again")
        commit.seal(building, step=step_of(checkpoint))
        commit.publish(building, target)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        raise RunError(f"{target}: not written, {free} bytes are free: {error}") from error
    finally:
        _remove(building)


def _is_complete(directory: Path) -> bool:
    """Whether names and sizes match the manifest; contents are not read."""
    return commit.fault(directory, hashed=False) is None


def _set_aside(directory: Path) -> None:
    directory.rename(directory.with_name(f".damaged-{directory.name}-{uuid.uuid4().hex[:8]}"))
    commit.flush(directory.parent)


def _remove(path: Path) -> None:
    """Remove a file or tree, if it exists; the next save tries again where that fails."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s)", path, error.strerror)
