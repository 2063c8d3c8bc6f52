"""One process at a time writes a run: a lock on its directory, which a process that dies lets go."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2m_ray.errors import InputError

LOCK_FILE = ".lock"


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it is absent.

    Raises InputError naming host and process where another one holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise InputError(
                f"{directory}: {holder} is writing this run; wait for it, stop it, or choose another run.name"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
