"""The Slurm script with stand-ins for Slurm's and Ray's commands: exit codes, signals, and who gets them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sh"

STUBS = {
    "scontrol": 'printf "first\\nlocalhost\\n"',
    "srun": 'echo "$@" > "$LOG/srun"; while [ "$1" != ray ]; do shift; done; exec "$@"',
    "ray": """
case $1 in
  get-auth-token) umask > "$LOG/umask"; echo canary-token ;;
  symmetric-run)
    echo "$RAY_AUTH_MODE" > "$LOG/mode"
    env | grep RAY_SYMMETRIC > "$LOG/wait"
    trap 'touch "$LOG/ray-stopped"; kill "$COMMAND"; exit 1' TERM
    [ ! -e "$LOG/no-ray" ] || exit 1
    while [ "$1" != -- ]; do shift; done; shift
    "$@" &
    COMMAND=$!
    wait "$COMMAND" ;;
esac
""",
    # It saves for as long as the test says, and ends with the code that the test says.
    "r2m-ray": """
trap 'touch "$LOG/saving"; until [ -e "$LOG/code" ]; do sleep 0.05; done' TERM
echo "$@" > "$LOG/run.tmp"; mv "$LOG/run.tmp" "$LOG/run"
until [ -e "$LOG/code" ]; do sleep 0.05; done
[ ! -e "$LOG/ray-stopped" ] || exit 99
exit "$(cat "$LOG/code")"
""",
}


Job = tuple[subprocess.Popen[str], Path]
"""The script as Slurm starts it, and the directory where the stand-ins leave their marks."""


def start(tmp_path: Path, *, ray_starts: bool = True) -> Job:
    commands, log = tmp_path / "bin", tmp_path / "log"
    commands.mkdir()
    log.mkdir()
    if not ray_starts:
        (log / "no-ray").touch()
    for name, body in STUBS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "first,localhost",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "train", "run.name=a b"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, log


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    process, log = start(tmp_path)
    yield process, log
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(job: Job, code: int) -> int:
    process, log = job
    (log / "code.tmp").write_text(f"{code}\n")
    (log / "code.tmp").rename(log / "code")
    return process.wait(60)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_jobs_exit_code_is_the_runs(job: Job, code: int) -> None:
    process, log = job
    wait_until((log / "run").exists)
    assert process.poll() is None
    start = time.monotonic()
    assert end(job, code) == code
    assert time.monotonic() - start < 20
    assert (log / "run").read_text() == "train run.name=a b cluster.address=auto\n"
    assert (log / "ray-stopped").exists()


@pytest.mark.parametrize("warnings", [1, 2])
def test_a_warning_reaches_the_run_alone_and_the_job_waits_until_it_has_saved(
    job: Job, warnings: int
) -> None:
    process, log = job
    wait_until((log / "run").exists)
    for _ in range(warnings):
        process.send_signal(signal.SIGTERM)
        wait_until((log / "saving").exists)
    assert process.poll() is None
    assert not (log / "ray-stopped").exists()
    assert end(job, 75) == 75
    assert (log / "ray-stopped").exists()


def test_ray_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    process, log = start(tmp_path, ray_starts=False)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 3
    assert "Ray did not start on all nodes" in printed
    assert not (log / "run").exists()


def test_nodes_join_by_a_token_that_only_the_user_may_read(job: Job) -> None:
    process, log = job
    wait_until((log / "run").exists)
    assert end(job, 0) == 0
    assert (log / "umask").read_text() == "0077\n"
    assert (log / "mode").read_text() == "token\n"
    assert "canary-token" not in "".join([*process.communicate(), (log / "srun").read_text()])
    # An address, because the head's name may resolve to something else on each node.
    started = "--address 127.0.0.1:6379 --min-nodes 2 --num-cpus 4 --num-gpus 0"
    assert started in (log / "srun").read_text()
    assert (log / "wait").read_text() == "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300\n"


def test_a_missing_environment_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    done = subprocess.run(
        [tmp_path / "bash", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "activate the run's environment" in done.stderr
