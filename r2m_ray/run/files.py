"""The files of a run directory: how they are written so that a crash never damages them, and their lock.

``config.yaml`` (resolved), ``environment.json`` (one entry per start of the run), ``metrics.jsonl`` (a
``step`` row per training step, an ``eval`` row per evaluation) and ``rollouts.jsonl`` (a few rows of every
step, to read). The last two are JSON Lines whose records carry a step. Records are appended completely or
not at all, and a resumed run removes those after its checkpoint.

JSON has no form for a number that is not finite. It is written as ``null``, and the ``nonfinite`` field of
the record counts such numbers.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r2m_ray.errors import InputError, RunError
from r2m_ray.run.vocabulary import current_row

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
LOCK_FILE = ".lock"
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""

Record = Mapping[str, Any]

logger = logging.getLogger(__name__)


class StepLines:
    """An append-only JSON Lines file, one object with an integer ``step`` per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)

    def append(self, records: Iterable[Record]) -> None:
        """Write every record or none of them, and wait until they are on the disk.

        Raises RunError naming the file and the bytes that found no room.
        """
        # A lone surrogate has no UTF-8; its backslash form is its JSON escape.
        data = "".join(f"{encoded(record)}\n" for record in records).encode(errors="backslashreplace")
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            # Part of a line would make the file unreadable to the report.
            os.ftruncate(self._descriptor, size)
            raise RunError(
                f"{self.path}: cannot append {len(data)} bytes: {error.strerror}. "
                "Free space on that disk, then continue with run.resume=true."
            ) from error

    def rewind(self, step: int) -> None:
        """Remove the records of steps after ``step`` (all records when it is 0) and an incomplete last line.

        Records are in the order of their steps, so the file is truncated once. Raises InputError naming a
        line that is not a record.
        """
        end = 0
        for record_end, record in _records(self.path):
            if step == 0 or record["step"] > step:
                break
            end = record_end
        os.ftruncate(self._descriptor, end)
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Every record of a file, without an incomplete last line; InputError names a line that is no record."""
    return [record for _, record in _records(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every row of a ``metrics.jsonl`` under today's names, whichever version of r2m_ray wrote it."""
    return [current_row(record) for record in read_steps(path)]


def encoded(record: Record) -> str:
    """One line of JSON; numbers that are not finite become ``null`` and are counted in ``nonfinite``."""
    clean, count = _finite(record)
    return json.dumps(clean | {"nonfinite": count}, ensure_ascii=False, allow_nan=False)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, which holds either its old or its new content at every moment.

    Its directory is made where it is absent. Raises RunError naming what cannot be written.
    """
    building = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with building.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        building.replace(path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot write it: {error.strerror}. Free space or fix the directory's permissions."
        ) from error


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory: one process at a time writes a run.

    The directory is made if it is absent. A process that dies releases its lock. Raises InputError naming
    host and process where another one holds it.
    """
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); choose another run.root") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise InputError(
                f"{directory}: {holder} is writing this run; wait for it, stop it, or choose another run.name"
            ) from error
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise InputError(f"{path}: cannot be locked ({error.strerror})") from error
            logger.warning("%s: this file system has no locks; let one process at a time write a run", path)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the offset of the byte after its line."""
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            # Only a crash leaves a line without its newline, and its step was never committed.
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error}). Delete that line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise InputError(f"{path}:{number}: not an object with an integer step. Delete that line.")
            yield end, record


def _finite(value: Any) -> tuple[Any, int]:
    """``value`` with None for every number that is not finite, and how many there were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    if isinstance(value, Mapping):
        cleaned = {key: _finite(item) for key, item in value.items()}
        return {key: item for key, (item, _) in cleaned.items()}, sum(n for _, n in cleaned.values())
    if isinstance(value, list | tuple):
        items = [_finite(item) for item in value]
        return [item for item, _ in items], sum(n for _, n in items)
    return value, 0
