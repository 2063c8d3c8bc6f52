"""What happens when an actor is lost.

Roles without state, rollout and reference, are replaced in place and their work is done again; an engine
serves nothing before it has the current weights. The learner and the reward model have state: when one
of them is lost, both are replaced, go back to the last commit, and the steps since are computed again.
Sampling is seeded by prompt and step, so the run ends as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from r2m_ray.core.roles import Ref, Stats, WeightSync
from r2m_ray.errors import ActorLost, RunError
from r2m_ray.runtime.worker_group import WorkerGroup
from r2m_ray.runtime.workers import Workers

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """Work for one actor that its successor can do again.

    rank, method, arguments, returns: see `Workers.submit`. content: what it works on, for an error's text.
    """

    rank: int
    method: str
    arguments: tuple[Any, ...]
    returns: int
    content: str


Answer = tuple[Any, list[Ref[Any]]]
"""What a job returned: the light object, and references to the others."""


class Redo(Protocol):
    """Does jobs of a phase; returns each one's answer."""

    async def __call__(self, phase: str, jobs: Sequence[Job]) -> list[Answer]: ...


class Once:
    """Jobs of workers that have no successors."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def __call__(self, phase: str, jobs: Sequence[Job]) -> list[Answer]:
        sent = [self._workers.submit(j.rank, j.method, *j.arguments, returns=j.returns) for j in jobs]
        light = await self._workers.settle(phase, [call for call, _ in sent])
        return [(answer, records) for answer, (_, records) in zip(light, sent, strict=True)]


class InPlace:
    """Jobs of a role without state, done again by the successor of an actor that was lost.

    revive: replaces actors by rank and makes them fit to work.
    Raises RunError naming the job that ``limit`` successors did not survive either.
    """

    def __init__(
        self, group: WorkerGroup, revive: Callable[[ActorLost], Awaitable[None]], *, limit: int
    ) -> None:
        self._group = group
        self._revive = revive
        self._limit = limit

    async def __call__(self, phase: str, jobs: Sequence[Job]) -> list[Answer]:
        actors = self._group.actors
        answers: dict[int, Answer] = {}
        for attempt in range(self._limit + 1):
            if attempt:
                await asyncio.sleep(pause_s(attempt))
            waiting = [n for n in range(len(jobs)) if n not in answers]
            sent = [
                actors.submit(job.rank, job.method, *job.arguments, returns=job.returns)
                for job in (jobs[n] for n in waiting)
            ]
            outcomes = await actors.outcomes(phase, [call for call, _ in sent])
            lost: dict[int, ActorLost] = {}
            for n, outcome, (_, records) in zip(waiting, outcomes, sent, strict=True):
                if isinstance(outcome, ActorLost) and outcome.actors:
                    lost[n] = outcome
                elif isinstance(outcome, Exception):
                    # Also a record that went with its node: a successor could not read it either.
                    raise outcome
                else:
                    answers[n] = outcome, records
            if not lost:
                return [answers[n] for n in range(len(jobs))]
            first = next(iter(lost.values()))
            if attempt < self._limit:
                names = dict.fromkeys(name for error in lost.values() for name in error.actors)
                await self._revive(ActorLost(str(first), tuple(names)))
        # An actor takes its jobs in turn: those behind the first are innocent.
        suspects = {jobs[n].rank: jobs[n].content for n in reversed(lost)}
        contents = "; ".join(suspects.values())
        raise RunError(
            f"{phase}: {contents} ended {self._limit + 1} actors in a row, so the work itself may do it "
            f"(cluster.max_recoveries={self._limit}). The last one: {first}"
        ) from first


class ReliableSync:
    """A weight sync that replaces rollout engines it has lost, and brings new ones up to date.

    A sync that an engine did not survive is done again for all of them: a partial one leaves them
    quarantined.
    """

    def __init__(self, sync: WeightSync, rollout: WorkerGroup, *, limit: int, notify: Notify) -> None:
        self._sync = sync
        self._rollout = rollout
        self._limit = limit
        self._notify = notify
        self._version = 0

    async def __call__(self, *, version: int) -> Stats:
        self._version = version
        for attempt in range(self._limit + 1):
            try:
                return await self._sync(version=version)
            except ActorLost as lost:
                if attempt == self._limit or not lost.concerns(self._rollout.role):
                    raise
                await asyncio.sleep(pause_s(attempt))
                await replace(self._rollout, lost, self._notify)
        raise AssertionError("the last attempt returns or raises")

    async def revive(self, lost: ActorLost) -> None:
        """Replace engines, and let all of them sample the current version again."""
        await replace(self._rollout, lost, self._notify)
        await self(version=self._version)


async def replace(group: WorkerGroup, lost: ActorLost, notify: Notify) -> None:
    """Start successors of lost actors in their places, and report how long that took."""
    start = time.monotonic()
    await group.replace([group.actors.names.index(name) for name in lost.actors])
    seconds = time.monotonic() - start
    notify(f"{lost}\n{', '.join(lost.actors)} replaced after {seconds:.1f} s; the work is done again")


async def rolled_back(
    attempt: Callable[[], Awaitable[None]],
    rebuild: Callable[[], Awaitable[None]],
    *,
    finished: Callable[[], int],
    limit: int,
    notify: Notify,
) -> None:
    """Run ``attempt``, and again after each loss of an actor with state, from the last commit.

    rebuild: makes all actors fit to begin again. finished: the last step that was finished. Raises RunError
    after more than ``limit`` losses in a row between which the run came no further than before.
    """
    bystanders = asyncio.all_tasks()
    furthest, in_a_row = -1, 0
    loss: ActorLost | None = None
    since = 0.0
    while True:
        try:
            if loss is not None:
                await rebuild()
                seconds, names = time.monotonic() - since, ", ".join(loss.actors) or "a record"
                notify(f"{loss}\n{names} replaced after {seconds:.1f} s; back to the last commit")
            return await attempt()
        except ActorLost as lost:
            loss, since = lost, time.monotonic()
            in_a_row = in_a_row + 1 if finished() <= furthest else 1
            furthest = max(furthest, finished())
            if in_a_row > limit:
                raise RunError(
                    f"{lost}\nThis was loss {in_a_row} in a row in step {finished() + 1}, which the run "
                    f"never finished (cluster.max_recoveries={limit}). Its last commit is kept."
                ) from lost
            await _quiet(bystanders)
            await asyncio.sleep(pause_s(in_a_row))


def pause_s(losses: int) -> float:
    """Seconds to wait after so many losses in a row: doubled by each one."""
    return min(FIRST_PAUSE_S * 2.0**losses, LONGEST_PAUSE_S)


async def _quiet(bystanders: set[asyncio.Task[Any]]) -> None:
    """End what a failed attempt left running side by side with what failed."""
    left = asyncio.all_tasks() - bystanders
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
