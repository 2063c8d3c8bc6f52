"""Stopped, or killed: what is committed stays, and the run goes on from there."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from r2m_ray.run.stop import REPEAT_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_signal_in_a_step_saves_it_and_the_resumed_run_is_the_same(lab: Any, undisturbed: Any) -> None:
    stopped = lab.run("signal", faults=["driver@3:annotate:term"])
    assert stopped.code == 75, stopped.text
    assert stopped.commits[-1] == "step-000003"
    assert "run.resume=true" in stopped.text
    lab.run("signal", again=True).assert_same(undisturbed)


def test_signals_in_every_phase(lab: Any, undisturbed: Any) -> None:
    points = {
        "1:start": None,
        "1:evaluate": None,
        "1:sample": "step-000001",
        "2:policy": "step-000002",
        "3:reward": "step-000003",
        "4:annotate": "step-000004",
        # Step 5 is logged by then.
        "6:checkpoint": "step-000005",
    }
    commit: str | None = None
    for point, expected in points.items():
        every = "checkpoint.every=1" if "checkpoint" in point else "checkpoint.every=100"
        stopped = lab.run("phases", every, faults=[f"driver@{point}:term"], again=point != "1:start")
        assert len(stopped.evidence) == 1, point
        assert stopped.code == 75, stopped.text
        commit = expected or commit
        assert stopped.commits[-1:] == ([commit] if commit else []), point
    lab.run("phases", again=True).assert_same(undisturbed)


def test_the_terminals_interrupt_reaches_the_whole_group_and_is_the_same(lab: Any, undisturbed: Any) -> None:
    running = lab.start("interrupt")
    running.until(lambda: running.finished_steps() >= 2)
    running.signal_group(signal.SIGINT)
    stopped = running.wait()
    lab.clean(running)
    assert stopped.code == 75, stopped.text
    lab.run("interrupt", again=True).assert_same(undisturbed)


def test_a_second_signal_ends_the_run_at_once(lab: Any, undisturbed: Any) -> None:
    running = lab.start("twice", faults=["rollout-0@2:sample:stop"])
    running.until(lambda: list(running.faults.iterdir()))
    running.signal(signal.SIGTERM)
    running.until(lambda: "SIGTERM: saving" in running.output.read_text())
    # A repeat within a second is the same request.
    time.sleep(1.1 * REPEAT_S)
    start = time.monotonic()
    running.signal(signal.SIGTERM)
    stopped = running.wait(20)
    assert time.monotonic() - start < 10
    lab.clean(running, killed=True)
    assert stopped.code == 75
    lab.run("twice", again=True).assert_same(undisturbed)


def test_a_step_that_does_not_end_is_given_up_after_the_grace(lab: Any, undisturbed: Any) -> None:
    running = lab.start("grace", "cluster.stop_grace_s=5", faults=["rollout-0@3:sample:stop"])
    running.until(lambda: list(running.faults.iterdir()))
    running.signal(signal.SIGTERM)
    stopped = running.wait(60)
    lab.clean(running)
    assert stopped.code == 75, stopped.text
    assert stopped.commits == ["step-000002"]
    lab.run("grace", again=True).assert_same(undisturbed)


def test_a_killed_driver_leaves_no_actor_and_its_run_goes_on(lab: Any, undisturbed: Any) -> None:
    # Stopped, so that it still writes when the other one asks.
    running = lab.start("killed", faults=["driver@4:annotate:stop"])
    running.until(lambda: list(running.faults.iterdir()))
    locked = lab.run("killed", again=True)
    assert locked.code == 2
    assert "is writing this run" in locked.text
    running.process.kill()
    running.wait()
    lab.clean(running, killed=True)
    lab.run("killed", again=True).assert_same(undisturbed)


@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_a_lost_server_is_a_clear_error(lab: Any, undisturbed: Any, server: str) -> None:
    running = lab.start(f"server-{server}")
    running.until(lambda: running.finished_steps() >= 3)
    next(p for p in running.processes() if p.name() == server).kill()
    stopped = running.wait(60)
    lab.clean(running, killed=True)
    assert stopped.code == 3, stopped.text
    assert "error: " in stopped.text
    lab.run(f"server-{server}", again=True).assert_same(undisturbed)
