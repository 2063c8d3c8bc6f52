"""Checks of the machine: cores, memory, disks, ports, GPUs, and what dead runs left behind."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch

from r2m_ray.cli.checks.doctor_check import Check, Outcome, judged
from r2m_ray.cli.checks.preflight import LEAST_FREE_BYTES
from r2m_ray.config.schema import ClusterConfig
from r2m_ray.engines.hardware import accelerators, usable_cores

GIB = 2**30
LEAST_CORES = 2
LEAST_MEMORY = 4 * GIB
"""What the demo takes by `r2m-ray plan experiment=demo`, its object store included, rounded up."""
FEW_FREE_BYTES = 5 * GIB
SHARED_MEMORY = Path("/dev/shm")
LOOPBACK = "127.0.0.1"
PORTS = 8
GCS_PORT = 6379
SESSION = re.compile(r"session_[\d_-]+_(\d+)")
"""A Ray session's directory; the number is the process that started it."""
UNFINISHED = ("*/checkpoints/.tmp-*", "*/.tmp-*")
UNTOUCHED_SECONDS = 3600.0
"""After which what is being written is taken for what a dead run left."""


def machine_checks(root: Path) -> Iterator[Check]:
    """Every check of the machine; ``root`` is where runs are to be written."""
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _disk("run.root", root)
    yield _disk("temporary files", temporary_root())
    yield root_check(root)
    yield _ports()
    yield _gpus()
    yield leftovers_check(root, temporary_root() / "ray")


def temporary_root() -> Path:
    """Where Ray keeps sessions, sockets and what it spills."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def cgroup_number(*names: str, root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """Numbers in this process's control-group files ``names``, of its group and all above; "max" is none.

    The files of both versions of control groups are looked for, below ``root``.
    """
    groups = Path("/proc/self/cgroup")
    paths = [line.split(":", 2) for line in groups.read_text().splitlines()] if groups.is_file() else []
    found = []
    for _, controllers, path in paths:
        top = root / controllers.removeprefix("name=")
        directory = top / path.lstrip("/")
        for place in (directory, *directory.parents):
            if not place.is_relative_to(top):
                break
            files = [place / name for name in names if (place / name).is_file()]
            found += [n for file in files for n in _numbers(file.read_text())]
    return found


def _numbers(text: str) -> list[float]:
    """A limit as a number; ``cpu.max`` holds a quota and its period."""
    words = text.split()
    if not words or words[0] in ("max", "-1"):
        return []
    return [float(words[0]) / (float(words[1]) if len(words) > 1 else 1.0)]


def _cores() -> Check:
    cores, quotas = usable_cores(), cgroup_number("cpu.max")
    quotas += [us / 100_000 for us in cgroup_number("cpu.cfs_quota_us")]
    usable = min([float(cores), *quotas])
    limit = f"control group allows {min(quotas):g}" if quotas else "no control-group limit"
    few = Outcome.warning if usable < LEAST_CORES else None
    return judged("cores", f"{cores}, {limit}", few, f"give it {LEAST_CORES} or more: actors share them")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    limits = [n for n in cgroup_number("memory.max", "memory.limit_in_bytes") if n < memory.total]
    usable = min([float(memory.available), *limits])
    limit = f"control group allows {_gib(min(limits))}" if limits else "no control-group limit"
    value = f"{_gib(memory.available)} of {_gib(memory.total)} available, {limit}"
    little = Outcome.warning if usable < LEAST_MEMORY else None
    remedy = f"even the demo takes up to {_gib(LEAST_MEMORY)}: see `r2m-ray plan experiment=demo`"
    return judged("memory", value, little, remedy)


def _shared_memory() -> Check:
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", Outcome.ok, f"no {SHARED_MEMORY}; Ray uses temporary files")
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ClusterConfig().object_store_gb * GIB
    little = Outcome.warning if free < needed else None
    remedy = f"Ray's object store of {_gib(needed)} goes to a slow disk; start a container with --shm-size=2g"
    return judged("shared memory", f"{_gib(free)} free in {SHARED_MEMORY}", little, remedy)


def _disk(name: str, directory: Path) -> Check:
    existing = nearest(directory)
    free = shutil.disk_usage(existing).free
    outcome = Outcome.warning if free < FEW_FREE_BYTES else None
    outcome = Outcome.failed if free < LEAST_FREE_BYTES else outcome
    return judged(f"disk of {name}", f"{_gib(free)} free at {existing}", outcome, "free some, or use another")


def nearest(directory: Path) -> Path:
    """The directory itself, or the first above it that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def root_check(root: Path) -> Check:
    """Whether a file can be written where runs go, forced to the disk and renamed, as a checkpoint is.

    Tried in the nearest existing directory; nothing stays.
    """
    place = nearest(root)
    name, remedy = "run.root writable", "fix its permissions, or choose another run.root"
    building, final = (place / f".{part}-{uuid.uuid4().hex}" for part in ("tmp-doctor", "doctor"))
    start = time.monotonic()
    try:
        with building.open("wb") as stream:
            stream.write(b"r2m_ray")
            stream.flush()
            os.fsync(stream.fileno())
        building.rename(final)
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        final.unlink()
    except OSError as error:
        return Check(name, Outcome.failed, f"{place}: {error.strerror}", remedy)
    finally:
        for path in (building, final):
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    return Check(name, Outcome.ok, f"{place}: write, fsync and rename in {1000 * seconds:.0f} ms")


def _ports() -> Check:
    remedy = f"let processes bind ports of {LOOPBACK}"
    try:
        with ExitStack() as stack:
            for _ in range(PORTS):
                stack.enter_context(socket.create_server((LOOPBACK, 0)))
    except OSError as error:
        return Check("ports", Outcome.failed, f"{LOOPBACK}: {error.strerror}", remedy)
    with socket.socket() as probe:
        taken = probe.connect_ex((LOOPBACK, GCS_PORT)) == 0
    note = f"{GCS_PORT} is in use, by a Ray cluster perhaps" if taken else f"{GCS_PORT} is free"
    return Check("ports", Outcome.ok, f"{PORTS} bound on {LOOPBACK}; {note}")


def _gpus() -> Check:
    names = accelerators()
    if not names:
        return Check("GPUs", Outcome.ok, "none; every role runs on the CPU")
    value = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    blind = Outcome.warning if not torch.accelerator.is_available() else None
    remedy = f"torch {torch.__version__} cannot use them; install its GPU build and vLLM's ('.[gpu]')"
    return judged("GPUs", value, blind, remedy)


def leftovers_check(root: Path, sessions: Path) -> Check:
    """Directories of dead runs: Ray sessions whose process is gone, and unfinished checkpoints and files."""
    dead = [path for path in sessions.glob("session_*") if _is_dead(path)]
    before = time.time() - UNTOUCHED_SECONDS
    dead += [path for pattern in UNFINISHED for path in root.glob(pattern) if path.stat().st_mtime < before]
    size = sum(_bytes(path) for path in dead)
    value = f"{len(dead)} of dead runs, {_gib(size)}" if dead else "none"
    places = " and ".join(dict.fromkeys(str(path.parent) for path in dead))
    large = Outcome.warning if size > GIB else None
    return judged("stale directories", value, large, f"delete what no run uses any more in {places}")


def _is_dead(session: Path) -> bool:
    match = SESSION.fullmatch(session.name)
    return bool(match) and not session.is_symlink() and not psutil.pid_exists(int(match[1] if match else 0))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
