"""The Ray cluster of a run: one of its own that leaves nothing behind, or one that exists."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from r2m_ray.config import ClusterConfig
from r2m_ray.errors import RunError

PREFIX = "r2m-"
LONGEST_PARENT = 14
"""Characters; below a longer path, the sockets of Ray's session would exceed the 107 bytes of the system."""
SERVERS = ("raylet", "gcs_server")
WATCH_S = 2.0
GCS_SILENCE_S = 30
"""How long Ray waits for a control store that does not answer before it ends the process."""


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Start a local Ray cluster, or join the one that ``cluster.address`` names; leave it at the end.

    A process that is already connected, a notebook or a sweep, keeps its connection. Everything that a
    local cluster and its actors write lies in one temporary directory, which goes with the cluster; what
    runs that were killed have left is removed first.
    """
    if ray.is_initialized():
        yield
        return
    # Records are immutable, so memory that cannot be written to is what we want.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    warnings.filterwarnings("ignore", "Zero-copy tensor serialization is enabled", UserWarning)
    settings = {
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_SILENCE_S),
    }
    with _environment(settings):
        if config.address == "local":
            with _own(config):
                yield
        else:
            ray.init(address=config.address, log_to_driver=False)
            try:
                yield
            finally:
                ray.shutdown()


@contextmanager
def _own(config: ClusterConfig) -> Iterator[None]:
    remove_leftovers()
    prefix = f"{PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_parent(), ignore_cleanup_errors=True) as root:
        scratch = Path(root) / "tmp"
        scratch.mkdir()
        # Ray's documented place for its session; workers put their own temporary files beside it.
        places = {"RAY_TMPDIR": root, "TMPDIR": str(scratch)}
        # Actors have environments of their own, so workers that Ray makes ahead would never be used.
        with _environment({**places, "RAY_prestart_worker_first_driver": "0"}):
            token = Path.home() / ".ray" / "auth_token"
            made = not token.exists()
            ray.init(
                address="local",
                num_cpus=config.cpus,
                object_store_memory=int(config.object_store_gb * 2**30),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            if made and token.exists():
                # Ray leaves it to the umask who else may read it.
                token.chmod(0o600)
            watch = ServerWatch()
            try:
                yield
            finally:
                watch.stop()
                ray.shutdown()


class ServerWatch:
    """Ends this process with exit code 3 soon after a server process of its own cluster has ended.

    Without its servers no call would ever be answered, and Ray tells its driver only after a minute or more.
    """

    def __init__(self) -> None:
        children = psutil.Process().children()
        self._servers = {p.name(): p for p in children if p.name() in SERVERS}
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="server watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; the servers may end now."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            ended = [name for name, server in self._servers.items() if not _runs(server)]
            if ended:
                self._give_up(ended[0])

    def _give_up(self, name: str) -> None:
        if self._over.is_set():
            return
        print(
            f"error: the run's own Ray cluster lost its {name} (process {self._servers[name].pid}), so no "
            "actor can be reached. The last commit is kept; continue with run.resume=true.",
            file=sys.stderr,
            flush=True,
        )
        # Workers leave when their raylet is gone.
        for server in self._servers.values():
            if _runs(server):
                server.kill()
        os._exit(RunError.exit_code)


def _runs(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def remove_leftovers() -> None:
    """Remove the temporary directories of clusters whose process is gone."""
    for directory in _parent().glob(f"{PREFIX}*-*"):
        process = directory.name.removeprefix(PREFIX).partition("-")[0]
        mine = directory.is_dir() and directory.stat().st_uid == os.getuid()
        if mine and process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(directory, ignore_errors=True)


def _parent() -> Path:
    chosen = tempfile.gettempdir()
    return Path(chosen if len(chosen) <= LONGEST_PARENT else "/tmp")


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
