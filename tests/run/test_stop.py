"""Signals: in order the first time, at once the second time, wherever they come."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from r2m_ray.errors import Preempted
from r2m_ray.run.stop import StopRequest

SCRIPT = """
import asyncio, os, signal, sys
from r2m_ray.errors import Preempted
from r2m_ray.run.stop import REPEAT_S, StopRequest

NUMBER = signal.Signals[sys.argv[1]]

async def free():
    os.kill(os.getpid(), NUMBER)
    await asyncio.Event().wait()

async def step(stop):
    with stop.deferred():
        os.kill(os.getpid(), NUMBER)
        while not stop.requested:
            await asyncio.sleep(0)
        print("the step ended", flush=True)
        stop.check()
        print("another step began", flush=True)

async def endless(stop):
    with stop.deferred():
        os.kill(os.getpid(), NUMBER)
        await asyncio.Event().wait()

async def twice(stop):
    with stop.deferred():
        os.kill(os.getpid(), NUMBER)
        while not stop.requested:
            await asyncio.sleep(0)
        os.kill(os.getpid(), NUMBER)
        await asyncio.sleep(1.1 * REPEAT_S)
        print("the same request came twice", flush=True)
        os.kill(os.getpid(), NUMBER)
        await asyncio.Event().wait()

def outside(stop):
    os.kill(os.getpid(), NUMBER)
    print("went on", flush=True)

with StopRequest(grace_s=0.1 if sys.argv[2] == "endless" else 60) as stop:
    try:
        if sys.argv[2] == "outside":
            outside(stop)
        else:
            cases = {"free": lambda _: free(), "step": step, "endless": endless, "twice": twice}
            stop.run(cases[sys.argv[2]](stop))
    except Preempted as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""


def ended(name: str, case: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, case], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_a_step_ends_the_run_where_it_is(name: str) -> None:
    for case in ("free", "outside"):
        code, text = ended(name, case)
        assert code == 75
        assert text.startswith(f"stopped by {name}; ")
        assert "run.resume=true" in text


def test_a_signal_in_a_step_waits_for_its_end() -> None:
    code, text = ended("SIGTERM", "step")
    assert code == 75
    assert text.splitlines()[0] == "the step ended"
    assert "another step began" not in text


def test_a_step_that_does_not_end_is_given_up() -> None:
    code, text = ended("SIGTERM", "endless")
    assert (code, text.split(";")[0]) == (75, "stopped by SIGTERM")


def test_the_second_signal_ends_the_process_at_once() -> None:
    # Senders like timeout(1) signal a process and its group: that is one request.
    assert ended("SIGTERM", "twice") == (75, "the same request came twice\n")


def test_rays_own_answer_to_sigterm_is_the_same_request() -> None:
    with pytest.raises(Preempted, match="stopped by SIGTERM"), StopRequest(1):
        sys.exit(signal.SIGTERM)


def test_an_error_that_nobody_asked_for_stays_one() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError), StopRequest(1) as stop:
        stop.run(cancelled())


def test_the_former_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(1) as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before
