"""A test file as a program, one process per rank of a process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable

DEADLINE_S = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(file: str, arguments: Iterable[tuple[str, ...]]) -> None:
    """Run a file once with each tuple of arguments, side by side; every process must succeed."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, file, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in arguments
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, output[-6000:]
    finally:
        for process in ranks:
            process.kill()
