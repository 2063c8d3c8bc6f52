"""The lock of a run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from r2m_ray.errors import InputError
from r2m_ray.run.files import run_lock


def test_one_process_at_a_time_writes_a_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    refusal = pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing")
    with run_lock(directory), refusal, run_lock(directory):
        pytest.fail("both have it")
    with run_lock(directory):
        pass


def test_a_dead_process_releases_its_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with run_lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
