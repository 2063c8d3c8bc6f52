"""Everything that `r2m-ray doctor` examines. It starts processes of its own, but no Ray, and leaves nothing.

Engines are imported in such processes, so a library that crashes or hangs harms nobody; every process is
ended at its deadline, with whatever it started.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r2m_ray.cli.checks.preflight import GIB, LEAST_FREE_BYTES, SHARED_MEMORY, nearest
from r2m_ray.config.schema import ClusterConfig
from r2m_ray.engines.hardware import accelerators, usable_cores
from r2m_ray.errors import RunError, printable, redacted
from r2m_ray.run import commit

PACKAGE = "r2m-ray"
ENGINE_EXTRAS = ("cpu", "gpu")
"""Extras of which one brings vLLM, as a build for CPUs or for GPUs."""
INSTALL = "pip install '.[cpu]' (or '.[gpu]') in a checkout of r2m_ray"
ENGINES = {
    "vllm": "from vllm import LLM",
    "ray": "import ray",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import LlamaForCausalLM",
    "trl": "from trl import SFTTrainer",
}
"""What is imported of each engine: some load nothing before something is used."""
IMPORT_SECONDS, COLLECTIVE_SECONDS = 120.0, 60.0
IMPORTS_AT_A_TIME = 2
LEAST_CORES = 2
LEAST_MEMORY = 4 * GIB
"""What the demo takes by `r2m-ray plan experiment=demo`, its object store included, rounded up."""
FEW_FREE_BYTES = 5 * GIB
LOOPBACK = "127.0.0.1"
PORTS = 8
SESSION = re.compile(r"session_[\d_-]+_(\d+)")
"""A Ray session's directory; the number is the process that started it."""
UNFINISHED = (f"*/checkpoints/{commit.BUILDING}*", f"*/{commit.BUILDING}*")
UNTOUCHED_SECONDS = 3600.0
"""After this time an unfinished file or directory counts as left by a dead run."""

_IMPORT = """\
import sys
try:
    {statement}
    print("version", sys.modules["{engine}"].__version__)
except BaseException as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}".splitlines()[0])
"""
_ALL_REDUCE = """\
import datetime, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(sys.argv[1])))
total = torch.full((1,), 1.0 + dist.get_rank())
dist.all_reduce(total)
if total.item() != 3.0:
    sys.exit(f"1 + 2 gave {total.item()}")
dist.barrier()
dist.destroy_process_group()
"""


class Outcome(StrEnum):
    """Fine; worth knowing, though a run may work; or something that no run works with."""

    ok = "ok"
    warning = "warning"
    failed = "failed"


STYLES = {Outcome.ok: "green", Outcome.warning: "yellow", Outcome.failed: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table: what was examined, what was found, and what to do about it."""

    name: str
    outcome: Outcome
    value: str
    remedy: str = ""


def diagnose(root: Path, *, as_json: bool) -> int:
    """Examine this machine and print every check; returns the exit code, 3 where one failed.

    root: where runs are to be written.
    """
    with Console(stderr=True).status("examining this machine …"):
        # Messages of libraries are in the text.
        checks = [
            Check(c.name, c.outcome, printable(redacted(c.value)), printable(redacted(c.remedy)))
            for c in examine(root)
        ]
    counts = {outcome: sum(check.outcome is outcome for check in checks) for outcome in Outcome}
    if as_json:
        document = {"failed": counts[Outcome.failed], "checks": [asdict(check) for check in checks]}
        print(json.dumps(document, indent=2))
    else:
        table = Table("check", "", "found", "remedy")
        for c in checks:
            table.add_row(c.name, Text(c.outcome, STYLES[c.outcome]), Text(c.value), Text(c.remedy))
        console = Console(highlight=False)
        console.print(table)
        console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    return RunError.exit_code if counts[Outcome.failed] else 0


def examine(root: Path) -> Iterator[Check]:
    """Every check, in the order of the table; ``root`` is where runs are to be written."""
    yield from software_checks()
    yield from import_checks()
    yield from machine_checks(root)
    yield collective_check()


def software_checks() -> Iterator[Check]:
    """Python and package versions against the ranges in this package's metadata."""
    try:
        described = metadata(PACKAGE)
    except PackageNotFoundError:
        yield Check("packages", Outcome.failed, f"{PACKAGE} is not installed", INSTALL)
        return
    needed, found = SpecifierSet(described["Requires-Python"]), platform.python_version()
    outside = Outcome.failed if not needed.contains(found, prereleases=True) else None
    yield _check("Python", f"{found}, {needed} supported", outside, "make the environment with such a Python")
    yield from package_checks([Requirement(line) for line in described.get_all("Requires-Dist") or ()])


def package_checks(requirements: Sequence[Requirement]) -> Iterator[Check]:
    """One check for all packages within their ranges, and one for each that is outside or missing."""
    plain = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    engines = [
        r
        for extra in ENGINE_EXTRAS
        for r in requirements
        if r not in plain and r.marker is not None and r.marker.evaluate({"extra": extra})
    ]
    installed = [r for r in engines if _version(r.name)]
    faults = [check for requirement in (*plain, *installed) if (check := _outside(requirement))]
    good = len(plain) + len(installed) - len(faults)
    if engines and not installed:
        names = " nor ".join(str(r.name) for r in engines)
        faults.append(Check("package vllm", Outcome.failed, f"neither {names} is installed", INSTALL))
    if good:
        yield Check("packages", Outcome.ok, f"{good} within their tested ranges")
    yield from faults


def import_checks(deadline_s: float = IMPORT_SECONDS) -> Iterator[Check]:
    """Whether each engine can be imported, with its version and the seconds that took."""
    with ThreadPoolExecutor(IMPORTS_AT_A_TIME) as pool:
        yield from pool.map(lambda engine: import_check(engine, deadline_s), ENGINES)


def import_check(engine: str, deadline_s: float) -> Check:
    """One import, in a process."""
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not accelerators():
        environment["DS_ACCELERATOR"] = "cpu"
    code = _IMPORT.format(statement=ENGINES[engine], engine=engine)
    process = _ended(_python(code, environment=environment), time.monotonic(), deadline_s)
    value = process.reason or f"{process.output.rpartition('version ')[2].strip()}, {process.seconds:.1f} s"
    remedy = f"install it again, and see: python -c {ENGINES[engine]!r}"
    return _check(f"import {engine}", value, Outcome.failed if process.reason else None, remedy)


def collective_check(deadline_s: float = COLLECTIVE_SECONDS) -> Check:
    """A sum over two gloo ranks on the loopback interface, as learner ranks compute it."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [_python(_ALL_REDUCE, str(deadline_s), environment={**shared, "RANK": str(r)}) for r in range(2)]
    # Each rank waits for the other, so both have the same deadline.
    found = [_ended(rank, start, deadline_s) for rank in ranks]
    faults = [f"rank {rank}: {process.reason}" for rank, process in enumerate(found) if process.reason]
    value = "; ".join(faults) or f"gloo on {LOOPBACK}, {time.monotonic() - start:.1f} s"
    remedy = f"let processes of this machine connect over {LOOPBACK}; unset GLOO_SOCKET_IFNAME"
    return _check("2-rank all-reduce", value, Outcome.failed if faults else None, remedy)


def machine_checks(root: Path) -> Iterator[Check]:
    """Every check of the machine; ``root`` is where runs are to be written."""
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _disk("run.root", root)
    yield _disk("temporary files", temporary)
    yield root_check(root)
    yield _ports()
    yield _gpus()
    yield leftovers_check(root, temporary / "ray")


def cgroup_number(*names: str, root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """Limits in this process's control-group files ``names``, of its group and all above.

    The files of both versions of control groups are looked for, below ``root``. A quota is in units of its
    period.
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
            texts = [(place / name).read_text().split() for name in names if (place / name).is_file()]
            limited = [words for words in texts if words and words[0] not in ("max", "-1")]
            found += [float(words[0]) / float(words[1] if len(words) > 1 else 1) for words in limited]
    return found


def root_check(root: Path) -> Check:
    """Whether a file can be written where runs go, forced to the disk and renamed, as a checkpoint is.

    Tried in the nearest existing directory; nothing stays.
    """
    place = nearest(root)
    final = place / f".doctor-{uuid.uuid4().hex}"
    building = commit.temporary(final)
    start = time.monotonic()
    try:
        building.write_bytes(b"r2m_ray")
        commit.flush(building)
        commit.publish(building, final)
        final.unlink()
    except OSError as error:
        remedy = "fix its permissions, or choose another run.root"
        return Check("run.root writable", Outcome.failed, f"{place}: {error.strerror}", remedy)
    finally:
        for path in (building, final):
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
    value = f"{place}: write, fsync and rename in {1000 * (time.monotonic() - start):.0f} ms"
    return Check("run.root writable", Outcome.ok, value)


def leftovers_check(root: Path, sessions: Path) -> Check:
    """Directories of dead runs: Ray sessions whose process is gone, and unfinished checkpoints and files."""
    dead = [path for path in sessions.glob("session_*") if _is_dead(path)]
    before = time.time() - UNTOUCHED_SECONDS
    dead += [path for pattern in UNFINISHED for path in root.glob(pattern) if path.stat().st_mtime < before]
    size = sum(_bytes(path) for path in dead)
    value = f"{len(dead)} of dead runs, {_gib(size)}" if dead else "none"
    places = " and ".join(dict.fromkeys(str(path.parent) for path in dead))
    large = Outcome.warning if size > GIB else None
    return _check("leftovers", value, large, f"delete what no run uses any more in {places}")


def _cores() -> Check:
    cores, quotas = usable_cores(), cgroup_number("cpu.max")
    quotas += [us / 100_000 for us in cgroup_number("cpu.cfs_quota_us")]
    limit = f"control group allows {min(quotas):g}" if quotas else "no control-group limit"
    few = Outcome.warning if min([float(cores), *quotas]) < LEAST_CORES else None
    return _check("cores", f"{cores}, {limit}", few, f"give it {LEAST_CORES} or more: actors share them")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    limits = [n for n in cgroup_number("memory.max", "memory.limit_in_bytes") if n < memory.total]
    limit = f"control group allows {_gib(min(limits))}" if limits else "no control-group limit"
    value = f"{_gib(memory.available)} of {_gib(memory.total)} available, {limit}"
    little = Outcome.warning if min([float(memory.available), *limits]) < LEAST_MEMORY else None
    remedy = f"even the demo takes up to {_gib(LEAST_MEMORY)}: see `r2m-ray plan experiment=demo`"
    return _check("memory", value, little, remedy)


def _shared_memory() -> Check:
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", Outcome.ok, f"no {SHARED_MEMORY}; Ray uses temporary files")
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ClusterConfig().object_store_gb * GIB
    little = Outcome.warning if free < needed else None
    remedy = (
        f"Ray's object store of {_gib(needed)} goes to a slow disk; start a container with --shm-size=2g or "
        "--ipc=host"
    )
    return _check("shared memory", f"{_gib(free)} free in {SHARED_MEMORY}", little, remedy)


def _disk(name: str, directory: Path) -> Check:
    existing = nearest(directory)
    free = shutil.disk_usage(existing).free
    outcome = Outcome.warning if free < FEW_FREE_BYTES else None
    outcome = Outcome.failed if free < LEAST_FREE_BYTES else outcome
    return _check(f"disk of {name}", f"{_gib(free)} free at {existing}", outcome, "free some, or use another")


def _ports() -> Check:
    try:
        with ExitStack() as stack:
            for _ in range(PORTS):
                stack.enter_context(socket.create_server((LOOPBACK, 0)))
    except OSError as error:
        remedy = f"let processes bind ports of {LOOPBACK}"
        return Check("ports", Outcome.failed, f"{LOOPBACK}: {error.strerror}", remedy)
    return Check("ports", Outcome.ok, f"{PORTS} bound on {LOOPBACK}")


def _gpus() -> Check:
    names = accelerators()
    if not names:
        return Check("GPUs", Outcome.ok, "none; every role runs on the CPU")
    value = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    blind = Outcome.warning if not torch.accelerator.is_available() else None
    remedy = f"torch {torch.__version__} cannot use them; install its GPU build and vLLM's ('.[gpu]')"
    return _check("GPUs", value, blind, remedy)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A process that ended. reason: why it failed, in one line; empty where it did not."""

    reason: str
    output: str
    seconds: float


def _python(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start an interpreter on some code, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[str], start: float, deadline_s: float) -> _Ended:
    """Wait until ``deadline_s`` after ``start``; then the process is killed with everything in its group."""
    reason = ""
    try:
        output, errors = process.communicate(timeout=max(0.0, start + deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        reason = f"no answer within {deadline_s:.0f} s"
    if not reason and process.returncode < 0:
        reason = f"killed by {signal.Signals(-process.returncode).name}"
    elif not reason and process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {process.returncode}"
    return _Ended(reason, output, time.monotonic() - start)


def _outside(requirement: Requirement) -> Check | None:
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    value = f"{found or 'not installed'}, {requirement.specifier} supported"
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    return Check(f"package {requirement.name}", Outcome.failed, value, remedy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_dead(session: Path) -> bool:
    match = SESSION.fullmatch(session.name)
    return bool(match) and not session.is_symlink() and not psutil.pid_exists(int(match[1] if match else 0))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def _check(name: str, value: str, problem: Outcome | None, remedy: str) -> Check:
    """A check that is ok, without a remedy, where there is no problem."""
    return Check(name, problem or Outcome.ok, value, remedy if problem else "")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
