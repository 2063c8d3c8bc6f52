"""Programs of several ranks on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(program: str, *arguments: object, ranks: int = 2, timeout_s: float = 300) -> None:
    """Run a Python file once per rank, with the arguments and then the rank, and assert that all succeed."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, program, *map(str, arguments)]
    started = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output[-6000:]
    finally:
        for process in started:
            process.kill()
