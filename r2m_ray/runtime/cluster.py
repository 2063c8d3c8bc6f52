"""The Ray cluster of a run: one of its own that leaves nothing behind, or one that exists."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from r2m_ray.config.schema import ClusterConfig
from r2m_ray.errors import Preempted, RunError
from r2m_ray.run.stop import StopRequest, leave

PREFIX = "r2m-"
LOCK = ".r2m-lock"
LONGEST_PARENT = 14
"""Characters; below a longer path, the sockets of Ray's session would exceed the 107 bytes of the system."""
SERVERS = ("raylet", "gcs_server")
WATCH_S = 2.0
GCS_SILENCE_S = 30
"""How long Ray waits for a control store that does not answer before it ends the process, with code 1."""
HEAD_SILENCE_S = 20
"""How long the head of a joined cluster may refuse connections before the run ends: before Ray ends it."""


@contextmanager
def cluster(config: ClusterConfig, stop: StopRequest | None = None) -> Iterator[None]:
    """Start a local Ray cluster, or join the one that ``cluster.address`` names; leave it at the end.

    A process that is already connected, a notebook or a sweep, keeps its connection. Everything that a
    local cluster and its actors write lies in temporary directories, which go with the cluster; what
    runs that were killed have left is removed first. Raises RunError where Ray does not start.
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
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    }
    with _environment(settings):
        if config.address == "local":
            with _own(config, stop):
                yield
        else:
            with _connected(config, address=config.address), _watched(stop, joined=True):
                yield


@contextmanager
def _own(config: ClusterConfig, stop: StopRequest | None) -> Iterator[None]:
    short = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_PARENT else "/tmp")
    with temporary_directory(short) as root, temporary_directory(Path(tempfile.gettempdir())) as scratch:
        # Ray's documented place for its session; workers put their own temporary files into the other one.
        places = {"RAY_TMPDIR": str(root), "TMPDIR": str(scratch)}
        # Actors have environments of their own, so workers that Ray makes ahead would never be used.
        with (
            _environment({**places, "RAY_prestart_worker_first_driver": "0"}),
            _private_token(),
            _connected(
                config,
                address="local",
                num_cpus=config.cpus,
                object_store_memory=int(config.object_store_gb * 2**30),
                include_dashboard=False,
                logging_level="ERROR",
            ),
            _watched(stop),
        ):
            yield


@contextmanager
def _connected(config: ClusterConfig, **arguments: Any) -> Iterator[None]:
    """A connection to Ray, which takes SIGTERM for itself while it is made."""
    former = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(log_to_driver=False, **arguments)
        except Preempted:
            raise
        except Exception as error:
            # Ray raises bare ones here, such as for a machine so busy that its servers start too late.
            raise RunError(
                f"Ray did not start or was not reached (cluster.address={config.address}): {error}"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, former)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _watched(stop: StopRequest | None, *, joined: bool = False) -> Iterator[None]:
    watch = ServerWatch(stop, head=ray.get_runtime_context().gcs_address if joined else None)
    try:
        yield
    finally:
        watch.stop()


@contextmanager
def _private_token() -> Iterator[None]:
    """Afterwards a token that Ray has made is readable by the user alone; Ray leaves that to the umask."""
    token = Path.home() / ".ray" / "auth_token"
    made = not token.exists()
    try:
        yield
    finally:
        if made and token.exists():
            token.chmod(0o600)


class ServerWatch:
    """Ends this process soon after the Ray cluster of its run is lost: nothing can answer then.

    Ray reports that to its driver only after a minute or more. Or it ends the driver with code 1 and without
    a word, where the driver reaches for the object store or the control store first. So on Linux the system
    reports at once when a server of the run's own cluster ends; the control store of a joined cluster is
    asked for a connection. The exit code is 3, or 75 where the run was asked to stop: whoever asked it may
    have asked the servers as well.
    """

    def __init__(self, stop: StopRequest | None, head: str | None = None) -> None:
        self._stop = stop
        self._head = head
        own: list[psutil.Process] = [] if head else psutil.Process().children()
        self._servers = {name: process for process in own if (name := _name(process)) in SERVERS}
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="server watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; the servers may end now."""
        self._over.set()

    def _watch(self) -> None:
        answered = time.monotonic()
        with _ends([server.pid for server in self._servers.values()]) as ends:
            while not self._over.is_set():
                ended = [name for name, server in self._servers.items() if not _runs(server)]
                if ended and not self._over.is_set():
                    pid = self._servers[ended[0]].pid
                    self._give_up(f"the run's own Ray cluster lost its {ended[0]} (process {pid})")
                if self._head is None or _accepts(self._head):
                    answered = time.monotonic()
                silent_s = time.monotonic() - answered
                if silent_s > HEAD_SILENCE_S and not self._over.is_set():
                    self._give_up(f"the head of the Ray cluster ({self._head}) was gone for {silent_s:.0f} s")
                ends.poll(1000 * WATCH_S)

    def _give_up(self, what: str) -> None:
        stopping = self._stop is not None and self._stop.requested
        print(
            f"{'stopped' if stopping else 'error'}: {what}, so no actor can be reached. The last commit is "
            "kept; continue with run.resume=true.",
            file=sys.stderr,
            flush=True,
        )
        # Workers leave when their raylet is gone.
        for server in self._servers.values():
            if _runs(server):
                server.kill()
        leave(Preempted.exit_code if stopping else RunError.exit_code)


def _accepts(address: str) -> bool:
    """Whether a server accepts a connection at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), WATCH_S).close()
    except OSError:
        return False
    return True


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


@contextmanager
def _ends(pids: Sequence[int]) -> Iterator[select.poll]:
    """What to poll to be woken when one of some processes ends; outside Linux it only waits."""
    descriptors: list[int] = []
    ends = select.poll()
    try:
        if sys.platform == "linux":
            for pid in pids:
                with suppress(ProcessLookupError):
                    descriptors.append(os.pidfd_open(pid))
        for descriptor in descriptors:
            ends.register(descriptor, select.POLLIN)
        yield ends
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """A directory that goes when the block ends; what killed processes left there goes first."""
    remove_leftovers(parent)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name,
        (Path(name) / LOCK).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def remove_leftovers(parent: Path) -> None:
    """Remove the directories of `temporary_directory` whose process is gone: nobody holds their lock."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open() as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            # Its process lives, it is another user's, or it has just gone.
            continue


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
