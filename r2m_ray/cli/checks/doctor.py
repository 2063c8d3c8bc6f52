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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
    """One line of the table: what was examined, what was found, and what to do where that is not fine."""

    name: str
    value: str
    outcome: Outcome = Outcome.ok
    remedy: str = ""

    @classmethod
    def of(cls, name: str, value: str, remedy: str, *, failed: bool = False, warning: bool = False) -> Check:
        """A check by what is wrong; one without a fault needs no remedy."""
        outcome = Outcome.failed if failed else Outcome.warning if warning else Outcome.ok
        return cls(name, value, outcome, remedy if failed or warning else "")


def diagnose(root: Path, *, as_json: bool) -> int:
    """Examine this machine and print every check; returns the exit code, 3 where one failed.

    root: where runs are to be written.
    """
    with Console(stderr=True).status("examining this machine …"):
        found = [*software_checks(), *import_checks(), *machine_checks(root), collective_check()]
    # Messages of libraries are in the text.
    checks = [
        replace(c, value=printable(redacted(c.value)), remedy=printable(redacted(c.remedy))) for c in found
    ]
    counts = Counter(check.outcome for check in checks)
    if as_json:
        document = {"failed": counts[Outcome.failed], "checks": [asdict(check) for check in checks]}
        print(json.dumps(document, indent=2))
    else:
        table = Table("check", "", "found", "remedy")
        for c in checks:
            table.add_row(c.name, Text(c.outcome, STYLES[c.outcome]), Text(c.value), Text(c.remedy))
        console = Console(highlight=False)
        console.print(table)
        console.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome]))
    return RunError.exit_code if counts[Outcome.failed] else 0


def software_checks() -> Iterator[Check]:
    """Python and package versions against the ranges in this package's metadata."""
    try:
        described = metadata(PACKAGE)
    except PackageNotFoundError:
        yield Check("packages", f"{PACKAGE} is not installed", Outcome.failed, INSTALL)
        return
    needed, found = SpecifierSet(described["Requires-Python"]), platform.python_version()
    outside = not needed.contains(found, prereleases=True)
    remedy = "make the environment with such a Python"
    yield Check.of("Python", f"{found}, {needed} supported", remedy, failed=outside)
    yield from package_checks([Requirement(line) for line in described.get_all("Requires-Dist") or ()])


def package_checks(requirements: Sequence[Requirement]) -> Iterator[Check]:
    """One check for all packages within their ranges, and one for each that is outside or missing."""
    plain = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    marked = [(r, r.marker) for r in requirements if r.marker is not None and r not in plain]
    engines = [r for extra in ENGINE_EXTRAS for r, marker in marked if marker.evaluate({"extra": extra})]
    installed = [r for r in engines if _version(r.name)]
    faults = [r for r in (*plain, *installed) if not _is_within(r)]
    if good := len(plain) + len(installed) - len(faults):
        yield Check("packages", f"{good} within their tested ranges")
    for r in faults:
        value = f"{_version(r.name) or 'not installed'}, {r.specifier} supported"
        remedy = f'pip install "{r.name}{r.specifier}"'
        yield Check(f"package {r.name}", value, Outcome.failed, remedy)
    if engines and not installed:
        names = " nor ".join(str(r.name) for r in engines)
        yield Check("package vllm", f"neither {names} is installed", Outcome.failed, INSTALL)


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
    start = time.monotonic()
    fault, output = _ended(_python(code, environment=environment), start, deadline_s)
    value = fault or f"{output.rpartition('version ')[2].strip()}, {time.monotonic() - start:.1f} s"
    remedy = f"install it again, and see: python -c {ENGINES[engine]!r}"
    return Check.of(f"import {engine}", value, remedy, failed=bool(fault))


def collective_check(deadline_s: float = COLLECTIVE_SECONDS) -> Check:
    """A sum over two gloo ranks on the loopback interface, as learner ranks compute it."""
    start = time.monotonic()
    remedy = f"let processes of this machine connect over {LOOPBACK}; unset GLOO_SOCKET_IFNAME"
    try:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        return Check("2-rank all-reduce", f"{LOOPBACK}: {error.strerror}", Outcome.failed, remedy)
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [_python(_ALL_REDUCE, str(deadline_s), environment={**shared, "RANK": str(r)}) for r in range(2)]
    # Each rank waits for the other, so both have the same deadline.
    found = [_ended(rank, start, deadline_s) for rank in ranks]
    faults = [f"rank {rank}: {fault}" for rank, (fault, _) in enumerate(found) if fault]
    value = "; ".join(faults) or f"gloo on {LOOPBACK}, {time.monotonic() - start:.1f} s"
    return Check.of("2-rank all-reduce", value, remedy, failed=bool(faults))


def machine_checks(root: Path) -> Iterator[Check]:
    """Every check of the machine; ``root`` is where runs are to be written."""
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _disk("run.root", root)
    yield _disk("temporary files", temporary)
    yield root_check(root)
    yield _gpus()
    yield leftovers_check(root, temporary / "ray")


def cgroup_number(*names: str, root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """Limits in this process's control-group files ``names``, of its group and all above.

    The files of both versions of control groups are looked for, below ``root``. A quota is in units of its
    period.
    """
    groups = Path("/proc/self/cgroup")
    found = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        top = root / controllers.removeprefix("name=")
        directory = top / path.lstrip("/")
        places = [place for place in (directory, *directory.parents) if place.is_relative_to(top)]
        for file in (place / name for place in places for name in names):
            words = file.read_text().split() if file.is_file() else []
            if words and words[0] not in ("max", "-1"):
                found.append(float(words[0]) / float(words[1] if len(words) > 1 else 1))
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
    except OSError as error:
        remedy = "fix its permissions, or choose another run.root"
        return Check("run.root writable", f"{place}: {error.strerror}", Outcome.failed, remedy)
    finally:
        for path in (building, final):
            with suppress(OSError):
                path.unlink()
    milliseconds = 1000 * (time.monotonic() - start)
    return Check("run.root writable", f"{place}: write, fsync and rename in {milliseconds:.0f} ms")


def leftovers_check(root: Path, sessions: Path) -> Check:
    """Directories of dead runs: Ray sessions whose process is gone, and unfinished checkpoints and files."""
    dead = [path for path in sessions.glob("session_*") if _is_dead(path)]
    before = time.time() - UNTOUCHED_SECONDS
    dead += [path for pattern in UNFINISHED for path in root.glob(pattern) if path.stat().st_mtime < before]
    files = [file for path in dead for file in ([path] if path.is_file() else path.rglob("*"))]
    size = sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
    value = f"{len(dead)} of dead runs, {_gib(size)}" if dead else "none"
    places = " and ".join(dict.fromkeys(str(path.parent) for path in dead))
    return Check.of("leftovers", value, f"delete what no run uses any more in {places}", warning=size > GIB)


def _cores() -> Check:
    cores, quotas = usable_cores(), cgroup_number("cpu.max")
    quotas += [us / 100_000 for us in cgroup_number("cpu.cfs_quota_us")]
    limit = f"control group allows {min(quotas):g}" if quotas else "no control-group limit"
    few = min([float(cores), *quotas]) < LEAST_CORES
    return Check.of(
        "cores", f"{cores}, {limit}", f"give it {LEAST_CORES} or more: actors share them", warning=few
    )


def _memory() -> Check:
    memory = psutil.virtual_memory()
    limits = [n for n in cgroup_number("memory.max", "memory.limit_in_bytes") if n < memory.total]
    limit = f"control group allows {_gib(min(limits))}" if limits else "no control-group limit"
    value = f"{_gib(memory.available)} of {_gib(memory.total)} available, {limit}"
    little = min([float(memory.available), *limits]) < LEAST_MEMORY
    remedy = f"even the demo takes up to {_gib(LEAST_MEMORY)}: see `r2m-ray plan experiment=demo`"
    return Check.of("memory", value, remedy, warning=little)


def _shared_memory() -> Check:
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", f"no {SHARED_MEMORY}; Ray uses temporary files")
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ClusterConfig().object_store_gb * GIB
    slow = f"Ray's object store of {_gib(needed)} goes to a slow disk"
    remedy = f"{slow}; start a container with --shm-size=2g or --ipc=host"
    return Check.of("shared memory", f"{_gib(free)} free in {SHARED_MEMORY}", remedy, warning=free < needed)


def _disk(name: str, directory: Path) -> Check:
    existing = nearest(directory)
    free = shutil.disk_usage(existing).free
    value, remedy = f"{_gib(free)} free at {existing}", "free some, or use another"
    full, little = free < LEAST_FREE_BYTES, free < FEW_FREE_BYTES
    return Check.of(f"disk of {name}", value, remedy, failed=full, warning=little)


def _gpus() -> Check:
    names = Counter(accelerators())
    value = ", ".join(f"{n} × {name}" for name, n in names.items()) or "none; every role runs on the CPU"
    remedy = f"torch {torch.__version__} cannot use them; install its GPU build and vLLM's ('.[gpu]')"
    return Check.of("GPUs", value, remedy, warning=bool(names) and not torch.accelerator.is_available())


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


def _ended(process: subprocess.Popen[str], start: float, deadline_s: float) -> tuple[str, str]:
    """Wait until ``deadline_s`` after ``start``; then the process is killed with everything in its group.

    Returns why it failed, in one line, empty where it did not, and its output.
    """
    try:
        output, errors = process.communicate(timeout=max(0.0, start + deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"no answer within {deadline_s:.0f} s", output
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}", output
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    fault = lines[-1] if lines else f"exit status {process.returncode}"
    return fault if process.returncode else "", output


def _is_within(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_dead(session: Path) -> bool:
    match = SESSION.fullmatch(session.name)
    return bool(match) and not session.is_symlink() and not psutil.pid_exists(int(match[1] if match else 0))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
