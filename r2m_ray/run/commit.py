"""Directories that are committed completely or not at all, and checked against a manifest of their files.

One is built under a name that begins with ``.tmp-``, sealed by MANIFEST.json (size and sha256 of every
file, written last), read back from the disk, and renamed. Each of these is on the disk before the next one
begins. So a directory that has its final name is complete, whenever the process or the power fails. Nothing
here follows a link, and a manifest's names are only looked up among the files that exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from r2m_ray import __version__
from r2m_ray.errors import printable

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""Number of the format of manifest and checkpoint; another format is not read."""
BUILDING = ".tmp-"
"""How the name of an unfinished directory begins; nothing reads it, and the next save may remove it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a manifest. sha256: hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed directory holds after the training step ``step``: its files by path."""

    step: int
    files: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def seal(directory: Path, *, step: int) -> None:
    """Put every file and directory on the disk, the manifest of all of them last, and read them back.

    Raises OSError where the disk fails, or returns other bytes than were written.
    """
    paths = files(directory)
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    for path in paths.values():
        flush(path)
    manifest = {"format": FORMAT, "r2m_ray": __version__, "step": step, "files": entries}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    flush(directory / MANIFEST)
    above = {parent for path in paths.values() for parent in path.parents}
    for parent in {directory, *(path for path in above if path.is_relative_to(directory))}:
        flush(parent)
    if reason := fault(directory):
        raise OSError(f"{directory}: what was written does not read back: {reason}")


def publish(building: Path, final: Path) -> None:
    """Give a sealed directory its final name, which must be free, and wait until that is on the disk."""
    building.rename(final)
    flush(final.parent)


def temporary(final: Path) -> Path:
    """A new name beside ``final`` to build it under; late writers of an older attempt have another one."""
    return final.with_name(f"{BUILDING}{final.name}-{uuid.uuid4().hex[:8]}")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed directory; ValueError if it is none, OSError if it cannot be read."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        entries = {
            str(name): Entry(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
        return Manifest(int(content["step"]), entries)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"no manifest: {type(error).__name__} {error}") from error


def fault(directory: Path, *, hashed: bool = True) -> str | None:
    """What is wrong with a committed directory, naming the file; None if it is valid.

    hashed: compare contents by sha256, not only names and sizes. Files that the manifest does not list are no
    fault (see `unlisted`); a link or a special file anywhere is one.
    """
    try:
        if directory.is_symlink():
            return "is a link, which is not followed"
        found = files(directory)
        if MANIFEST not in found:
            return f"{MANIFEST} is missing"
        try:
            manifest = read_manifest(directory)
        except ValueError as error:
            return f"{MANIFEST} is unreadable ({printable(str(error))})"
        for name, entry in manifest.files.items():
            if name not in found:
                return f"{printable(name)} is missing"
            size = found[name].stat().st_size
            if size != entry.bytes:
                return f"{printable(name)} has {size} bytes, its manifest says {entry.bytes}"
            if hashed and sha256(found[name]) != entry.sha256:
                return f"{printable(name)} does not match its sha256"
    except OSError as error:
        return f"{printable(str(error.filename or directory))} cannot be read ({error.strerror or error})"
    return None


def unlisted(directory: Path) -> list[str]:
    """Files in a committed directory that its manifest does not list; they are never read."""
    known = {MANIFEST, *read_manifest(directory).files}
    return sorted(name for name in files(directory) if name not in known)


def files(directory: Path) -> dict[str, Path]:
    """Every file below a directory by its path in it; OSError for a link or a special file."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(_walk(directory), key=lambda path: path.parts)
    }


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk, and forget the system's copy of it in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if sys.platform == "linux":
            # Reading back verifies the disk, not the system's copy.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _walk(directory: Path) -> Iterator[Path]:
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)
                else:
                    raise OSError(0, "a link or a special file, which is not followed", entry.path)
