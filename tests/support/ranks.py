"""Python programs in processes of their own: one, or one per rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def inherited() -> dict[str, str]:
    """The environment of a program that finds what this process finds, on one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run_python(*arguments: object, timeout_s: float = 240, **environment: str) -> tuple[str, str]:
    """Run Python with these arguments, assert that it succeeds, and return what it wrote to both streams."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=inherited() | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout, done.stderr


def run_ranks(program: str, *arguments: object, ranks: int = 2, timeout_s: float = 300) -> None:
    """Run a Python file once per rank, with the arguments and then the rank, and assert that all succeed."""
    environment = inherited() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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
