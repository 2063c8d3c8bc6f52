"""Checks that need processes of their own: whether engines can be imported, and a collective of two ranks.

Nothing is imported into this process, so a library that crashes or hangs on import harms nobody; every
process is ended at its deadline, with whatever it started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from r2m_ray.cli.checks.doctor_check import Check, Outcome, judged
from r2m_ray.engines.hardware import accelerators
from r2m_ray.engines.rollout.vllm_engine import SUPPORTED_VLLM

IMPORT_SECONDS = 120.0
COLLECTIVE_SECONDS = 60.0
AT_A_TIME = 2
"""Processes that import side by side; more would wait for the disk and for each other."""
LOOPBACK = "127.0.0.1"

ENGINES = {
    "vllm": "from vllm import LLM",
    "ray": "import ray",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import LlamaForCausalLM",
    "trl": "from trl import SFTTrainer",
}
"""What is imported of each engine: some load nothing until something is asked of them."""

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


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended; its status is None where the deadline ended it."""

    status: int | None
    output: str
    errors: str
    seconds: float

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.status is None:
            return f"no answer within {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.status}"


def python(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
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


def ended(process: subprocess.Popen[str], deadline_s: float) -> Ended:
    """Wait for a process; at the deadline it is killed, together with everything in its group."""
    start = time.monotonic()
    try:
        output, errors = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return Ended(None, output, errors, time.monotonic() - start)
    return Ended(process.returncode, output, errors, time.monotonic() - start)


def import_checks(deadline_s: float = IMPORT_SECONDS) -> Iterator[Check]:
    """Whether each engine can be imported, with its version and the seconds that took."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from map(import_check, ENGINES, pool.map(lambda engine: imported(engine, deadline_s), ENGINES))


def imported(engine: str, deadline_s: float) -> Ended:
    """A process that imports an engine and prints its version."""
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not accelerators():
        environment["DS_ACCELERATOR"] = "cpu"
    code = _IMPORT.format(statement=ENGINES[engine], engine=engine)
    return ended(python(code, environment=environment), deadline_s)


def import_check(engine: str, process: Ended) -> Check:
    """The verdict on one import; vLLM must also be a version that the rollout engine was tested with."""
    name = f"import {engine}"
    if process.status != 0:
        remedy = f"install it again, and see: python -c {ENGINES[engine]!r}"
        return Check(name, Outcome.failed, process.reason, remedy)
    version = process.output.rpartition("version ")[2].strip()
    unknown = engine == "vllm" and not SUPPORTED_VLLM.contains(version, prereleases=True)
    return judged(
        name,
        f"{version}, {process.seconds:.1f} s",
        Outcome.failed if unknown else None,
        f"the rollout engine was tested with vLLM {SUPPORTED_VLLM}; install one of those",
    )


def collective_check(deadline_s: float = COLLECTIVE_SECONDS) -> Check:
    """A sum over two gloo ranks on the loopback interface, as learner ranks and reward replicas make it."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [python(_ALL_REDUCE, str(deadline_s), environment={**shared, "RANK": str(r)}) for r in range(2)]
    # Each waits for the other, so both are waited for until the same moment.
    until = start + deadline_s
    found = [ended(rank, max(0.0, until - time.monotonic())) for rank in ranks]
    seconds = time.monotonic() - start
    faults = [_fault(rank, process, seconds) for rank, process in enumerate(found) if process.status != 0]
    return Check(
        "2-rank all-reduce",
        Outcome.failed if faults else Outcome.ok,
        "; ".join(faults) or f"gloo on {LOOPBACK}, {seconds:.1f} s",
        f"let processes of this machine connect over {LOOPBACK}; unset GLOO_SOCKET_IFNAME" if faults else "",
    )


def _fault(rank: int, process: Ended, seconds: float) -> str:
    late = process.status is None
    return f"rank {rank}: " + (f"no answer within {seconds:.0f} s" if late else process.reason)
