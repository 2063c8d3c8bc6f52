"""The roles of ``r2m_ray.roles`` played by Ray actors: shards out, references back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from r2m_ray.batch import Annotation, Hidden, ReferenceLogprobs, Trajectories
from r2m_ray.config import Config, FeedbackRefresh
from r2m_ray.roles import Ref, SamplePlan, Shards, Stats
from r2m_ray.runtime.group import Actors


class RolloutRole:
    """Rollout engines; each samples its shards as one batch."""

    def __init__(self, actors: Actors) -> None:
        self._actors = actors

    async def sample(self, plans: Sequence[SamplePlan]) -> tuple[Shards[Trajectories], Shards[Hidden]]:
        trajectories: dict[int, Any] = {}
        hidden: dict[int, Any] = {}
        calls = []
        for i, shard_ids in _by_owner(self._actors, len(plans)):
            handle = self._actors.handles[i]
            done, *records = handle.sample.options(num_returns=1 + 2 * len(shard_ids)).remote(
                [plans[s] for s in shard_ids]
            )
            calls.append((self._actors.names[i], done))
            for position, s in enumerate(shard_ids):
                trajectories[s], hidden[s] = records[2 * position], records[2 * position + 1]
        await self._actors.settle("sample", calls)
        return _in_order(trajectories), _in_order(hidden)


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
        fresh: dict[int, Any] = dict(enumerate(hidden))
        calls = []
        for i, shard_ids in _by_owner(self._actors, len(trajectories), idle=True):
            returned = len(shard_ids) if self._refreshes else 0
            answer = (
                self._actors.handles[i]
                .update.options(num_returns=1 + returned)
                .remote(
                    shard_ids,
                    [advantage[s] for s in shard_ids],
                    *[trajectories[s] for s in shard_ids],
                    *[reference[s] for s in shard_ids],
                )
            )
            done, *records = answer if returned else [answer]
            calls.append((self._actors.names[i], done))
            fresh.update(zip(shard_ids, records, strict=False))
        stats = await self._actors.settle("policy update", calls)
        return stats[0], _in_order(fresh)

    async def hidden(self, trajectories: Shards[Trajectories]) -> Shards[Hidden]:
        refs: dict[int, Any] = {}
        calls = []
        for i, shard_ids in _by_owner(self._actors, len(trajectories), idle=True):
            answer = (
                self._actors.handles[i]
                .hidden.options(num_returns=1 + len(shard_ids))
                .remote(*[trajectories[s] for s in shard_ids])
            )
            done, *records = answer if shard_ids else [answer]
            calls.append((self._actors.names[i], done))
            refs.update(zip(shard_ids, records, strict=True))
        await self._actors.settle("policy states", calls)
        return _in_order(refs)

    async def save(self, directory: Path) -> None:
        await self._actors.all("save policy", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._actors.all("load policy", "load", directory)


class ReferenceRole:
    """Reference policies; each shard goes to one of them."""

    def __init__(self, actors: Actors) -> None:
        self._actors = actors

    async def logprobs(self, trajectories: Shards[Trajectories]) -> Shards[ReferenceLogprobs]:
        answers = [
            self._actors.handles[self._actors.owner(s)].logprobs.options(num_returns=2).remote(shard)
            for s, shard in enumerate(trajectories)
        ]
        return await _second(self._actors, "reference log-probs", answers)


class RewardRole:
    """Reward replicas; shard s is annotated, and its head gradient computed, by replica s mod replicas."""

    def __init__(self, actors: Actors) -> None:
        self._actors = actors

    async def annotate(
        self, trajectories: Shards[Trajectories], hidden: Shards[Hidden], *, omega: float, step: int
    ) -> Shards[Annotation]:
        answers = [
            self._actors.handles[self._actors.owner(s)]
            .annotate.options(num_returns=2)
            .remote(rows, states, omega, step)
            for s, (rows, states) in enumerate(zip(trajectories, hidden, strict=True))
        ]
        return await _second(self._actors, "annotate", answers)

    async def update(
        self, hidden: Shards[Hidden], annotation: Shards[Annotation], *, omega: float, step: int
    ) -> Stats:
        calls = [
            (
                self._actors.names[i],
                self._actors.handles[i].update.remote(
                    omega, step, *[hidden[s] for s in shard_ids], *[annotation[s] for s in shard_ids]
                ),
            )
            for i, shard_ids in _by_owner(self._actors, len(hidden), idle=True)
        ]
        stats: list[Stats] = await self._actors.settle("reward update", calls)
        return stats[0]

    async def attention(self, hidden: Ref[Hidden], annotation: Ref[Annotation]) -> Tensor:
        call = self._actors.handles[0].attention.remote(hidden, annotation)
        weights: list[Tensor] = await self._actors.settle("attention", [(self._actors.names[0], call)])
        return weights[0]

    async def save(self, directory: Path) -> None:
        await self._actors.all("save reward head", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._actors.all("load reward head", "load", directory)


def share(record: Any) -> Any:
    """Put a record into the object store."""
    return ray.put(record)


def _by_owner(actors: Actors, shards: int, *, idle: bool = False) -> list[tuple[int, list[int]]]:
    """Each actor with its shards; actors without any are listed only where all must take part (``idle``)."""
    owned = [(i, [s for s in range(shards) if actors.owner(s) == i]) for i in range(len(actors))]
    return [(i, shard_ids) for i, shard_ids in owned if shard_ids or idle]


def _in_order(refs: dict[int, Any]) -> list[Any]:
    return [refs[s] for s in sorted(refs)]


async def _second(actors: Actors, phase: str, answers: Sequence[Sequence[Any]]) -> list[Any]:
    calls = [(actors.names[actors.owner(s)], done) for s, (done, _) in enumerate(answers)]
    await actors.settle(phase, calls)
    return [record for _, record in answers]
