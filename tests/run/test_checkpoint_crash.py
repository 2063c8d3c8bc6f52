"""Crashes of the process that saves: at random instants, and at every change it makes to the disk."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from r2m_ray.run.checkpoint import Checkpoints, fault, step_of

KILLS = 100
CRASHED = 41
CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir"})
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Part:
    """A stateful role with two files, 80 kB together; their content follows from the step."""

    def __init__(self, name: str, step: int) -> None:
        self.name = name
        self.step = step

    async def save(self, directory: Path) -> None:
        (directory / self.name).mkdir()
        for i in range(2):
            content = random.Random(f"{self.name} {self.step} {i}").randbytes(40_000)
            (directory / self.name / f"tensors-{i}.safetensors").write_bytes(content)


def save(directory: Path, step: int, *, keep: int) -> None:
    roles: Any = SimpleNamespace(policy=Part("policy", step), reward=Part("reward_head", step))
    asyncio.run(Checkpoints(directory, keep=keep).save(step, roles))


def forked(work: Callable[[], None]) -> int:
    """Start a child that does ``work`` and ends; returns its process id."""
    pid = os.fork()
    if pid == 0:
        _work_and_end(work)
    return pid


def _work_and_end(work: Callable[[], None]) -> NoReturn:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def newest_step(directory: Path, *, keep: int) -> int:
    newest = Checkpoints(directory, keep=keep).newest()
    if newest is None:
        return 0
    assert fault(newest) is None
    return step_of(newest)


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.glob(".tmp-*")]


@pytest.mark.parametrize("keep", [1, 3])
def test_a_kill_at_any_instant_of_a_save_loses_no_committed_step(tmp_path: Path, keep: int) -> None:
    """Requirements 1 and 8: kill −9 at 100 random instants of one run that saves and saves."""
    instants = random.Random(keep)
    directory = tmp_path / "checkpoints"
    committed, interrupted = 0, 0
    for _ in range(KILLS):
        reader, writer = os.pipe()
        start = newest_step(directory, keep=keep)
        assert start >= committed

        def saves(first: int = start + 1, reports: int = writer) -> None:
            for step in range(first, first + 1000):
                save(directory, step, keep=keep)
                os.write(reports, step.to_bytes(8))

        pid = forked(saves)
        os.close(writer)
        with os.fdopen(reader, "rb") as reports:
            # Not a wait for anything: the moment of the kill, somewhere within the second or third save.
            committed = int.from_bytes(reports.read(8))
            time.sleep(instants.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            for step in iter(lambda stream=reports: stream.read(8), b""):
                committed = int.from_bytes(step)
        interrupted += bool(leftovers(directory))
        assert newest_step(directory, keep=keep) >= committed
    assert interrupted >= KILLS // 4, "the kills hit no save"
    step = newest_step(directory, keep=keep) + 1
    save(directory, step, keep=keep)
    assert leftovers(directory) == []
    assert len(Checkpoints(directory, keep=keep).committed()) == keep


def crash_at(count: int) -> Callable[[], int]:
    """End this process at its ``count``-th change of the disk from now on; returns what counts them."""
    seen = 0

    def change() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os._exit(CRASHED)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITE_FLAGS):
            change()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        change()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    return lambda: seen


def fresh(directory: Path) -> None:
    """One commit."""
    save(directory, 1, keep=1)


def with_damaged(directory: Path) -> None:
    """A sound commit, a damaged one of the step that is saved next, and a damaged one of a later step."""
    for step in (1, 2, 3):
        save(directory, step, keep=9)
    for step in (2, 3):
        (directory / f"step-00000{step}" / "driver.json").write_text("{}")


def with_a_dead_save(directory: Path) -> None:
    """One commit, and what a crash left."""
    save(directory, 1, keep=1)
    (directory / ".tmp-step-000002-0" / "policy").mkdir(parents=True)
    (directory / ".tmp-step-000002-0" / "policy" / "torn").write_text("x")
    (directory / ".tmp-LATEST").write_text("x")


@pytest.mark.parametrize("before", [fresh, with_damaged, with_a_dead_save])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_change_of_the_disk_leaves_a_valid_checkpoint(
    tmp_path: Path, before: Callable[[Path], None], keep: int
) -> None:
    """Requirements 1 and 8: at every open, mkdir, fsync, rename and removal of a commit and its pruning."""
    before(tmp_path / "before")

    def crash(count: int, directory: Path) -> int:
        def work() -> None:
            changes = crash_at(count)
            save(directory, 2, keep=keep)
            (tmp_path / "changes").write_text(str(changes()))

        shutil.copytree(tmp_path / "before", directory)
        _, status = os.waitpid(forked(work), 0)
        return os.waitstatus_to_exitcode(status)

    assert crash(0, tmp_path / "whole") == 0
    total = int((tmp_path / "changes").read_text())
    steps = []
    for count in range(1, total + 1):
        directory = tmp_path / "crashed"
        shutil.rmtree(directory, ignore_errors=True)
        assert crash(count, directory) == CRASHED, f"change {count} of {total}"
        steps.append(newest_step(directory, keep=keep))
        # Whatever was left, the next save is whole and cleans up.
        save(directory, 3, keep=keep)
        assert newest_step(directory, keep=keep) == 3
        assert leftovers(directory) == []
    # Step 1 until the commit, step 2 ever after: never nothing, never back.
    assert set(steps) == {1, 2}
    assert steps == sorted(steps)
