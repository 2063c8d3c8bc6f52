"""One process at a time writes a run: a lock on its directory, which a process that dies lets go."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2m_ray.errors import InputError

LOCK_FILE = ".lock"
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it is absent.

    Raises InputError naming host and process where another one holds it.
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
            logger.warning("%s: this file system has no locks; see to it that one process writes a run", path)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
