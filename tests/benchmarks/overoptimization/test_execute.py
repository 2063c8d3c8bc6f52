"""Jobs side by side, and a signal that ends them in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from benchmarks.overoptimization.execute import Job, execute


def job(name: str, code: str, root: Path) -> Job:
    return Job(name=name, command=[sys.executable, "-S", "-c", code], log=root / f"{name}.log")


def test_as_many_run_at_a_time_as_are_allowed(tmp_path: Path) -> None:
    # Both ends of a pipe open only together, so the first two must run side by side; the third is then free.
    meeting = tmp_path / "meeting"
    os.mkfifo(meeting)
    jobs = [
        job("writes", f"open({str(meeting)!r}, 'w').close()", tmp_path),
        job("reads", f"open({str(meeting)!r}).close()", tmp_path),
        job("fails", "raise SystemExit(3)", tmp_path),
    ]
    running = most = 0

    def started() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)

    def ended(code: int, seconds: float) -> None:
        nonlocal running
        running -= 1

    outcome = execute([replace(job, started=started, ended=ended) for job in jobs], 2)
    assert outcome.codes == {"writes": 0, "reads": 0, "fails": 3}
    assert outcome.failed == ["fails"]
    assert (most, running) == (2, 0)


def test_a_signal_ends_what_runs_in_order_and_starts_nothing_more(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    waits = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "signal.pause()\n"
    )

    def tell() -> None:
        ready.open().close()
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    before = signal.getsignal(signal.SIGTERM)
    outcome = execute([job("first", waits, tmp_path), job("second", "", tmp_path)], 1)
    teller.join()
    assert outcome.stopped
    assert outcome.codes == {"first": 75}
    assert outcome.failed == [], "a job that a signal stopped has not failed"
    assert signal.getsignal(signal.SIGTERM) == before
