"""A run's own cluster: it leaves nothing, its loss is reported, and Ray's memory monitor is named."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from r2m_ray.config.schema import ClusterConfig
from r2m_ray.errors import Preempted, RunError
from r2m_ray.runtime.cluster import PREFIX, cluster, remove_leftovers, temporary_directory

COMMON = """
import asyncio, os, sys, psutil, ray
from pathlib import Path
import pytest

from r2m_ray.config.schema import ClusterConfig
from r2m_ray.errors import ActorLost
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.worker_group import Actors

class Worker:
    async def never(self):
        await asyncio.Event().wait()
    def echo(self):
        return 1

def workers():
    return Actors({"policy-0": ray.remote(Worker).options(num_cpus=0).remote()}, timeout_s=60)
"""
MEMORY = """
os.environ |= {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
with cluster(ClusterConfig(cpus=1, object_store_gb=0.1)):
    try:
        asyncio.run(workers().all("policy update", "never"))
    except ActorLost as lost:
        print(lost)
"""
SERVER = """
with cluster(ClusterConfig(cpus=1, object_store_gb=0.1)):
    actors = workers()
    asyncio.run(actors.all("start", "echo"))
    next(p for p in psutil.Process().children() if p.name() == "raylet").kill()
    asyncio.run(actors.all("sample", "never"))
"""
TIDY = """
before = os.environ.get("RAY_TMPDIR")
with cluster(ClusterConfig(cpus=1, object_store_gb=0.1)):
    asyncio.run(workers().all("start", "echo"))
    print(os.environ["RAY_TMPDIR"], Path(os.environ["RAY_TMPDIR"]).is_dir())
print(os.environ.get("RAY_TMPDIR") == before)
"""


def ended(script: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_everything_it_wrote_goes_with_it() -> None:
    code, text = ended(TIDY)
    assert code == 0, text
    first, second = text.splitlines()[:2]
    assert first.endswith(" True")
    assert not Path(first.split()[0]).exists()
    assert second == "True"


def test_an_actor_that_the_memory_monitor_ends_is_named_with_memory_and_setting() -> None:
    code, text = ended(MEMORY)
    assert code == 0, text
    assert "policy-0 died during policy update: Ray's memory monitor ended it (Memory usage " in text
    assert "tokens_per_microbatch" in text
    assert "RAY_memory_usage_threshold" in text


def test_a_server_that_ends_ends_the_run_with_three() -> None:
    code, text = ended(SERVER)
    assert code == 3, text
    assert "error: the run's own Ray cluster lost its raylet" in text
    remove_leftovers(Path(tempfile.gettempdir()))


HEAD = """
import socket, sys, time
from r2m_ray.run.stop import StopRequest
from r2m_ray.runtime import cluster

cluster.WATCH_S, cluster.HEAD_SILENCE_S = 0.1, 1
stop = StopRequest(1)
stop._name = sys.argv[1] or None
with socket.create_server(("127.0.0.1", 0)) as head:
    watch = cluster.ServerWatch(stop, head=f"127.0.0.1:{head.getsockname()[1]}")
    time.sleep(2)
    print("still there", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signal", "code", "word"),
    [("", RunError.exit_code, "error"), ("SIGTERM", Preempted.exit_code, "stopped")],
)
def test_the_head_of_a_joined_cluster_may_not_stay_away(signal: str, code: int, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD, signal], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "still there\n"
    assert done.stderr.startswith(f"{word}: the head of the Ray cluster (127.0.0.1:")
    assert "run.resume=true" in done.stderr


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(Exception("the node timed out"), RunError), (Preempted("stopped by SIGINT"), Preempted)],
)
def test_what_ends_rays_start_keeps_its_type(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise raised

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(expected, match=str(raised)), cluster(ClusterConfig()):
        pytest.fail("there is no cluster")


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    hold = "import os, sys, signal; from pathlib import Path; "
    hold += "from r2m_ray.runtime.cluster import temporary_directory; "
    hold += "d = temporary_directory(Path(sys.argv[1])); print(d.__enter__()); sys.stdout.flush(); "
    command = [sys.executable, "-c", hold + "os.kill(os.getpid(), signal.SIGKILL)", str(tmp_path)]
    dead = Path(
        subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    )
    assert dead.is_dir()
    (dead / "ray").mkdir()
    mine = tmp_path / f"{PREFIX}20261201-results"
    mine.mkdir()
    with temporary_directory(tmp_path) as alive:
        assert not dead.exists()
        remove_leftovers(tmp_path)
        assert alive.is_dir()
    assert not alive.exists()
    assert mine.is_dir()
