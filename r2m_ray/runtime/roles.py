"""The roles of ``r2m_ray.core.roles`` played by Ray actors: shards out, references back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from torch import Tensor

from r2m_ray.config.schema import Config, FeedbackRefresh
from r2m_ray.core.batch import Annotation, Hidden, ReferenceLogprobs, SamplePlan, Trajectories
from r2m_ray.core.roles import LabelledPairs, Ref, Shards, Stats
from r2m_ray.errors import ActorLost, Loss
from r2m_ray.runtime.recovery import Job, Redo
from r2m_ray.runtime.worker_group import Actors, require_agreement


class Stored:
    """A record in the object store; awaiting it reads it, before a deadline."""

    __slots__ = ("ref", "timeout_s")

    def __init__(self, ref: Any, timeout_s: float) -> None:
        self.ref = ref
        self.timeout_s = timeout_s

    def __await__(self) -> Generator[Any, None, Any]:
        return self._read().__await__()

    async def _read(self) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.ref
        except TimeoutError as error:
            raise ActorLost(
                f"a record did not arrive within {self.timeout_s:g} s", (), Loss.record
            ) from error
        except RayError as error:
            raise ActorLost(f"a record was lost with its node: {error}", (), Loss.record) from error


class RolloutRole:
    """Rollout engines; each samples its shards as one batch, or its successor does."""

    def __init__(self, actors: Actors, redo: Redo) -> None:
        self._actors = actors
        self._redo = redo

    async def sample(self, plans: Sequence[SamplePlan]) -> tuple[Shards[Trajectories], Shards[Hidden]]:
        owned = _by_owner(self._actors, len(plans))
        jobs = [self._job(i, [plans[s] for s in shard_ids]) for i, shard_ids in owned]
        records: dict[int, Any] = {}
        for (_, shard_ids), answer in zip(owned, await self._redo("sample", jobs), strict=True):
            for position, s in enumerate(shard_ids):
                records[s] = answer[2 * position : 2 * position + 2]
        stored = [[Stored(ref, self._actors.timeout_s) for ref in records[s]] for s in range(len(plans))]
        return [trajectories for trajectories, _ in stored], [hidden for _, hidden in stored]

    def _job(self, rank: int, plans: Sequence[SamplePlan]) -> Job:
        def submit() -> list[Any]:
            sample = self._actors.handles[rank].sample.options(num_returns=1 + 2 * len(plans))
            return list(sample.remote(plans))

        indices = ", ".join(str(prompt.index) for plan in plans for prompt in plan.prompts)
        return Job(rank, submit, f"prompts {indices} of step {plans[0].step}")


class ReferenceRole:
    """Reference policies; each shard goes to one of them, or to its successor."""

    def __init__(self, actors: Actors, redo: Redo) -> None:
        self._actors = actors
        self._redo = redo

    async def logprobs(self, trajectories: Shards[Trajectories]) -> Shards[ReferenceLogprobs]:
        jobs = [self._job(self._actors.owner(s), s, shard) for s, shard in enumerate(refs(trajectories))]
        answers = await self._redo("reference log-probs", jobs)
        return [Stored(record, self._actors.timeout_s) for (record,) in answers]

    def _job(self, rank: int, shard: int, rows: Any) -> Job:
        def submit() -> list[Any]:
            return list(self._actors.handles[rank].logprobs.options(num_returns=2).remote(rows))

        return Job(rank, submit, f"shard {shard}")


class PolicyRole:
    """Learner ranks; shard s belongs to rank s mod ranks."""

    def __init__(self, actors: Actors, config: Config) -> None:
        self._actors = actors
        self._refreshes = config.feedback.refresh is not FeedbackRefresh.none

    async def update(
        self,
        trajectories: Shards[Trajectories],
        advantage: Sequence[Tensor],
        reference: Shards[ReferenceLogprobs],
        hidden: Shards[Hidden],
    ) -> tuple[Stats, Shards[Hidden]]:
        rows, base = refs(trajectories), refs(reference)
        fresh: dict[int, Any] = dict(enumerate(refs(hidden)))
        calls = []
        for i, shard_ids in _by_owner(self._actors, len(rows), idle=True):
            returned = len(shard_ids) if self._refreshes else 0
            done, *records = _several(
                self._actors.handles[i].update,
                1 + returned,
                shard_ids,
                [advantage[s] for s in shard_ids],
                *[rows[s] for s in shard_ids],
                *[base[s] for s in shard_ids],
            )
            calls.append((self._actors.names[i], done))
            fresh.update(zip(shard_ids, records, strict=False))
        stats = await self._actors.settle("policy update", calls)
        return stats[0], self._stored(fresh)

    async def hidden(self, trajectories: Shards[Trajectories]) -> Shards[Hidden]:
        rows = refs(trajectories)
        found: dict[int, Any] = {}
        calls = []
        for i, shard_ids in _by_owner(self._actors, len(rows), idle=True):
            done, *records = _several(
                self._actors.handles[i].hidden, 1 + len(shard_ids), *[rows[s] for s in shard_ids]
            )
            calls.append((self._actors.names[i], done))
            found.update(zip(shard_ids, records, strict=True))
        await self._actors.settle("policy states", calls)
        return self._stored(found)

    async def save(self, directory: Path) -> None:
        await self._actors.all("save policy", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._actors.all("load policy", "load", directory)

    def _stored(self, found: dict[int, Any]) -> list[Stored]:
        return [Stored(found[s], self._actors.timeout_s) for s in sorted(found)]


class RewardRole:
    """Reward replicas; shard s is annotated, and its head gradient computed, by replica s mod replicas."""

    def __init__(self, actors: Actors, *, verify_every: int) -> None:
        self._actors = actors
        self._verify_every = verify_every

    async def annotate(
        self, trajectories: Shards[Trajectories], hidden: Shards[Hidden], *, omega: float, step: int
    ) -> Shards[Annotation]:
        owners = [self._actors.owner(s) for s in range(len(trajectories))]
        answers = [
            _several(self._actors.handles[i].annotate, 2, rows, states, omega, step)
            for i, rows, states in zip(owners, refs(trajectories), refs(hidden), strict=True)
        ]
        calls = [(self._actors.names[i], done) for i, (done, _) in zip(owners, answers, strict=True)]
        await self._actors.settle("annotate", calls)
        return [Stored(record, self._actors.timeout_s) for _, record in answers]

    async def warm_up(self, human: LabelledPairs, *, omega: float) -> Stats:
        parts = self._parts(human.hidden, human.annotation)
        calls = self._actors.each("warm_up", lambda i: (omega, *parts[i]))
        stats: list[Stats] = await self._actors.settle("reward warm-up", calls)
        return stats[0]

    async def update(
        self,
        hidden: Shards[Hidden],
        annotation: Shards[Annotation],
        human: LabelledPairs,
        *,
        omega: float,
        step: int,
    ) -> Stats:
        own, pairs = self._parts(hidden, annotation), self._parts(human.hidden, human.annotation)
        calls = self._actors.each("update", lambda i: (omega, step, len(own[i]) // 2, *own[i], *pairs[i]))
        stats: list[Stats] = await self._actors.settle("reward update", calls)
        if len(self._actors) > 1 and self._verify_every and step % self._verify_every == 0:
            await require_agreement(self._actors, "reward update", "head_digests")
        return stats[0]

    async def attention(self, hidden: Ref[Hidden], annotation: Ref[Annotation]) -> Tensor:
        call = self._actors.handles[0].attention.remote(*refs([hidden, annotation]))
        weights: list[Tensor] = await self._actors.settle("attention", [(self._actors.names[0], call)])
        return weights[0]

    async def save(self, directory: Path) -> None:
        await self._actors.all("save reward head", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._actors.all("load reward head", "load", directory)

    def _parts(self, hidden: Shards[Hidden], annotation: Shards[Annotation]) -> list[list[Any]]:
        """For each replica, the states of its shards and then their annotations; none for some."""
        states, notes = refs(hidden), refs(annotation)
        owned = _by_owner(self._actors, len(states), idle=True)
        return [[*[states[s] for s in ids], *[notes[s] for s in ids]] for _, ids in owned]


def share(timeout_s: float) -> Callable[[Any], Stored]:
    """What puts a record into the object store."""
    return lambda record: Stored(ray.put(record), timeout_s)


def refs(shards: Sequence[Awaitable[Any]]) -> list[Any]:
    """The object references behind stored records: what an actor receives as the record itself."""
    return [shard.ref for shard in shards if isinstance(shard, Stored)]


def _several(method: Any, count: int, *arguments: Any) -> list[Any]:
    """Call an actor's method that returns ``count`` objects."""
    answer = method.options(num_returns=count).remote(*arguments)
    return list(answer) if count > 1 else [answer]


def _by_owner(actors: Actors, shards: int, *, idle: bool = False) -> list[tuple[int, list[int]]]:
    """Each actor with its shards; actors without any are listed only where all must take part (``idle``)."""
    owned = [(i, [s for s in range(shards) if actors.owner(s) == i]) for i in range(len(actors))]
    return [(i, shard_ids) for i, shard_ids in owned if shard_ids or idle]
