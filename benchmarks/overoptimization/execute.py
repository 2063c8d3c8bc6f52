"""Commands run side by side, each in its own process with a log, until all end or a signal stops them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2m_ray.errors import Preempted, printable, redacted
from r2m_ray.run.stop import SIGNALS

STOPPED = (Preempted.exit_code, 130)
"""Exit codes of a command that was stopped: pre-empted and saved, or interrupted."""
SHOWN_BYTES = 2000
"""Of the end of a failed job's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command. started and ended are called around it, the latter with its exit code and its seconds."""

    name: str
    command: Sequence[str]
    log: Path
    started: Callable[[], None] = lambda: None
    ended: Callable[[int, float], None] = lambda code, seconds: None


@dataclass(slots=True)
class Outcome:
    """Exit codes by name of the jobs that ran, negative for a signal; stopped: whether a signal came."""

    codes: dict[str, int] = field(default_factory=dict)
    stopped: bool = False

    @property
    def failed(self) -> list[str]:
        """Names of the jobs that failed; a signal is no failure."""
        return [name for name, code in self.codes.items() if code and code not in STOPPED]


def execute(jobs: Sequence[Job], limit: int) -> Outcome:
    """Run the jobs in order, ``limit`` at a time; one that fails stops no other.

    The first SIGINT or SIGTERM is passed on to what runs, which ends in order, and nothing more is started;
    so is every later one.
    """
    return asyncio.run(_execute(jobs, limit))


async def _execute(jobs: Sequence[Job], limit: int) -> Outcome:
    outcome = Outcome()
    running: set[asyncio.subprocess.Process] = set()
    queue = iter(enumerate(jobs, start=1))

    def on_signal(number: int) -> None:
        outcome.stopped = True
        for process in running:
            if process.returncode is None:
                process.send_signal(number)

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await asyncio.gather(*(_work(queue, len(jobs), outcome, running) for _ in range(limit)))
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    return outcome


async def _work(
    queue: Iterator[tuple[int, Job]],
    total: int,
    outcome: Outcome,
    running: set[asyncio.subprocess.Process],
) -> None:
    """Take one job after another from the queue that all workers share."""
    for place, job in queue:
        if outcome.stopped:
            return
        print(f"[{place}/{total}] {job.name}: started, log {job.log}", flush=True)
        job.started()
        since = time.monotonic()
        code = await _run(job, outcome, running)
        seconds = time.monotonic() - since
        job.ended(code, seconds)
        outcome.codes[job.name] = code
        print(f"[{place}/{total}] {job.name}: {_outcome(job, code, seconds)}", flush=True)


async def _run(job: Job, outcome: Outcome, running: set[asyncio.subprocess.Process]) -> int:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        running.add(process)
        try:
            if outcome.stopped:
                # The signal came while this one was being started, and did not reach it.
                process.send_signal(signal.SIGTERM)
            return await process.wait()
        finally:
            running.discard(process)


def _outcome(job: Job, code: int, seconds: float) -> str:
    if code == 0:
        return f"done in {seconds:.0f} s"
    if code in STOPPED:
        return f"stopped after {seconds:.0f} s; the same command goes on with it"
    end = job.log.read_bytes()[-SHOWN_BYTES:].decode(errors="replace")
    lines = "\n".join(f"    {line}" for line in printable(redacted(end), lines=True).splitlines()[-12:])
    return f"failed with exit code {code}; the end of {job.log}:\n{lines}"
