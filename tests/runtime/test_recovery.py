"""Lost actors: replaced in place or rolled back, a bounded number of times, then named."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from r2m_ray.config.schema import Config
from r2m_ray.errors import ActorLost, Loss, RunError
from r2m_ray.runtime import recovery
from r2m_ray.runtime.device import Address
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import Answer, InPlace, Job, ReliableSync, rolled_back
from r2m_ray.runtime.worker_group import WorkerGroup


class Worker:
    """Answers with a number; dies when it is asked to."""

    def start(self, rank: int, meeting: Address, model: Path) -> str:
        self.rank = rank
        return model.read_text()

    def whoami(self) -> tuple[int, int]:
        return self.rank, os.getpid()

    def double(self, value: int, tries: Path, deadly: int) -> tuple[str, int]:
        """Twice the value; the first ``deadly`` tries, counted in a file, end the process."""
        count = tries / str(value)
        with count.open("a") as stream:
            stream.write(".")
        if len(count.read_text()) <= deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done", 2 * value

    def freeze(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def placement(local_cluster: None) -> Iterator[Placement]:
    config = Config()
    config.reference.replicas = 2
    found = Placement(config)
    yield found
    found.release()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Stands for the files of a frozen model."""
    path = tmp_path / "model"
    path.write_text("weights")
    return path


@pytest.fixture
def group(placement: Placement, model: Path) -> Iterator[WorkerGroup]:
    made = WorkerGroup(
        "reference",
        Worker,
        placement,
        lambda rank, meeting: (rank, meeting, model),
        start_timeout_s=240,
        phase_timeout_s=60,
    )
    asyncio.run(made.start())
    yield made
    for handle in made.actors.handles:
        ray.kill(handle)


def jobs(group: WorkerGroup, tries: Path, deadly: dict[int, int]) -> list[Job]:
    """Jobs 0 to 3; ``deadly`` says how many tries of a job still end its actor."""

    def job(n: int) -> Job:
        arguments = (n, tries, deadly.get(n, 0))
        return Job(group.actors.owner(n), "double", arguments, 2, f"shard {n}")

    return [job(n) for n in range(4)]


def doubled(answers: Sequence[Answer]) -> list[int]:
    return [ray.get(record.handle, timeout=60) for _, (record,) in answers]


def in_place(group: WorkerGroup, messages: list[str], limit: int = 2) -> InPlace:
    async def revive(lost: ActorLost) -> None:
        await recovery.replace(group, lost, messages.append)

    return InPlace(group, revive, limit=limit)


def test_the_work_of_a_dead_actor_is_done_by_its_successor(group: WorkerGroup, tmp_path: Path) -> None:
    async def work(messages: list[str]) -> list[int]:
        before = await group.actors.all("ask", "whoami")
        answers = await in_place(group, messages)("score", jobs(group, tmp_path, {2: 1}))
        after = await group.actors.all("ask", "whoami")
        assert after[1] == before[1]
        assert after[0][0] == before[0][0] == 0
        assert after[0][1] != before[0][1]
        return doubled(answers)

    messages: list[str] = []
    assert asyncio.run(work(messages)) == [0, 2, 4, 6]
    assert len(messages) == 1
    assert "reference-0 died during score" in messages[0]
    assert "reference-0 replaced after " in messages[0]


def test_work_that_ends_every_actor_is_named(group: WorkerGroup, tmp_path: Path) -> None:
    messages: list[str] = []
    with pytest.raises(RunError, match=r"score: shard 1 ended 3 actors in a row.*max_recoveries=2"):
        asyncio.run(in_place(group, messages)("score", jobs(group, tmp_path, {1: 99})))
    assert len(messages) == 2


def test_a_record_that_is_lost_is_no_loss_of_an_actor(group: WorkerGroup, tmp_path: Path) -> None:
    """Nobody can be replaced for it; the run goes back to its last commit."""

    async def gone(phase: str, calls: Sequence[Any]) -> list[Any]:
        return [ActorLost("reference-0, score: its node is gone", (), Loss.record) for _ in calls]

    group.actors.outcomes = gone  # type: ignore[method-assign, assignment]
    messages: list[str] = []
    with pytest.raises(ActorLost, match="its node is gone"):
        asyncio.run(in_place(group, messages)("score", jobs(group, tmp_path, {})))
    assert messages == []


def test_an_actor_that_does_not_answer_is_replaced_at_the_deadline(
    group: WorkerGroup, tmp_path: Path
) -> None:
    async def work() -> list[int]:
        await group.actors.outcomes(
            "freeze", [("reference-1", group.actors.handles[1].freeze.remote())], timeout_s=1
        )
        group.actors.timeout_s = 3
        answers = await in_place(group, messages)("score", jobs(group, tmp_path, {}))
        return doubled(answers)

    messages: list[str] = []
    assert asyncio.run(work()) == [0, 2, 4, 6]
    assert "score: no answer from reference-1 within 3 s" in messages[0]


def test_a_sync_that_an_engine_did_not_survive_is_done_again(group: WorkerGroup) -> None:
    versions: list[int] = []

    async def sync(*, version: int) -> dict[str, float]:
        versions.append(version)
        if len(versions) == 1:
            raise ActorLost("reference-1 died during weight sync", ("reference-1",))
        return {"bytes": 7.0}

    messages: list[str] = []
    reliable = ReliableSync(sync, group, limit=2, notify=messages.append)
    assert asyncio.run(reliable(version=4)) == {"bytes": 7.0}
    assert versions == [4, 4]
    asyncio.run(reliable.revive(ActorLost("reference-0 died", ("reference-0",))))
    assert versions == [4, 4, 4]


def test_a_lost_learner_is_no_matter_of_the_sync(group: WorkerGroup) -> None:
    async def sync(*, version: int) -> dict[str, float]:
        raise ActorLost("policy-0 died during weight sync", ("policy-0",))

    with pytest.raises(ActorLost, match="policy-0"):
        asyncio.run(ReliableSync(sync, group, limit=2, notify=print)(version=1))


def roll(progress: list[int], limit: int) -> tuple[int, int]:
    """Run attempts that get to given steps and, but for the last, are lost; count attempts and rollbacks."""
    rebuilt = 0
    reached = 0
    attempts = 0

    async def attempt() -> None:
        nonlocal reached, attempts
        reached = max(reached, progress[attempts])
        attempts += 1
        if attempts < len(progress):
            raise ActorLost("policy-0 died during policy update", ("policy-0",))

    async def rebuild() -> None:
        nonlocal rebuilt
        rebuilt += 1

    asyncio.run(rolled_back(attempt, rebuild, finished=lambda: reached, limit=limit, notify=lambda _: None))
    return attempts, rebuilt


def test_a_run_is_rolled_back_as_often_as_it_moves_on() -> None:
    assert roll([1, 2, 3, 4, 5, 6], limit=1) == (6, 5)


def test_a_step_that_is_never_finished_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"loss 3 in a row in step 5.*max_recoveries=2"):
        roll([4, 2, 4, 4, 6], limit=2)


def test_a_rollback_leaves_no_task_of_the_failed_attempt() -> None:
    cancelled: list[str] = []
    attempts = 0

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("sync")
            raise

    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            asyncio.get_running_loop().create_task(lasting())
            await asyncio.sleep(0)
            raise ActorLost("reward-0 died", ("reward-0",))
        assert cancelled == ["sync"]

    async def rebuild() -> None:
        return

    asyncio.run(rolled_back(attempt, rebuild, finished=lambda: 0, limit=2, notify=lambda _: None))
    assert attempts == 2


def test_pauses_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.5)
    assert [recovery.pause_s(n) for n in (1, 2, 3, 20)] == [1.0, 2.0, 4.0, recovery.LONGEST_PAUSE_S]


def test_a_successor_has_the_rank_and_the_name_of_whom_it_follows(group: WorkerGroup) -> None:
    asyncio.run(recovery.replace(group, ActorLost("x", ("reference-1",)), lambda _: None))
    found = ray.get([handle.whoami.remote() for handle in group.actors.handles], timeout=60)
    assert [rank for rank, _ in found] == [0, 1]
    assert [group.actors.pids[name] for name in group.actors.names] == [pid for _, pid in found]


def test_a_successor_with_other_frozen_weights_ends_the_run(group: WorkerGroup, model: Path) -> None:
    model.write_text("other weights")
    with pytest.raises(RunError, match=r"reference-1 was started again and holds other frozen weights"):
        asyncio.run(recovery.replace(group, ActorLost("x", ("reference-1",)), lambda _: None))


def test_a_replacement_that_was_interrupted_is_known_to_be_unready(group: WorkerGroup) -> None:
    async def interrupted() -> None:
        replacing = asyncio.ensure_future(
            recovery.replace(group, ActorLost("x", ("reference-1",)), lambda _: None)
        )
        await asyncio.sleep(0)
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
        assert group.unready == {1}
        await group.replace(sorted(group.unready))
        assert group.unready == set()
        assert [rank for rank, _ in await group.actors.all("ask", "whoami")] == [0, 1]

    assert group.unready == set()
    asyncio.run(interrupted())
