"""The roles of ``r2m_ray.core.roles`` played by worker groups: shards out, references back.

A group's workers are Ray actors or objects of the driver's process; a role does not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from r2m_ray.config.schema import Config, FeedbackRefresh
from r2m_ray.core.batch import (
    Annotation,
    Hidden,
    ReferenceKL,
    ReferenceLogprobs,
    RowText,
    SampledRows,
    SamplePlan,
    Scores,
    Trajectories,
)
from r2m_ray.core.roles import LabelledPairs, Ref, Shards, Stats
from r2m_ray.runtime.actors import PolicyWork, RewardWork
from r2m_ray.runtime.recovery import Job, Redo
from r2m_ray.runtime.worker_group import require_agreement
from r2m_ray.runtime.workers import Workers


class RolloutRole:
    """Rollout engines; each samples its shards as one batch, or its successor does."""

    def __init__(self, group: Workers, redo: Redo) -> None:
        self._group = group
        self._redo = redo

    async def sample(
        self, plans: Sequence[SamplePlan]
    ) -> tuple[Sequence[SampledRows], Shards[Trajectories], Shards[Hidden]]:
        owned = _by_owner(self._group, len(plans))
        jobs = [self._sampling(i, [plans[s] for s in shard_ids]) for i, shard_ids in owned]
        shards: dict[int, tuple[SampledRows, Ref[Trajectories], Ref[Hidden]]] = {}
        for (_, shard_ids), (rows, records) in zip(owned, await self._redo("sample", jobs), strict=True):
            trajectories, hidden = records[: len(shard_ids)], records[len(shard_ids) :]
            shards |= zip(shard_ids, zip(rows, trajectories, hidden, strict=True), strict=True)
        found = [shards[s] for s in range(len(plans))]
        return (
            [rows for rows, _, _ in found],
            [rows for _, rows, _ in found],
            [states for *_, states in found],
        )

    async def texts(self, trajectories: Ref[Trajectories], rows: int) -> Sequence[RowText]:
        job = Job(0, "texts", (trajectories, rows), 1, "texts of rows that were sampled")
        ((texts, _),) = await self._redo("texts", [job])
        found: Sequence[RowText] = texts
        return found

    def _sampling(self, rank: int, plans: Sequence[SamplePlan]) -> Job:
        indices = ", ".join(str(prompt.index) for plan in plans for prompt in plan.prompts)
        content = f"prompts {indices} of step {plans[0].step}"
        return Job(rank, "sample", (plans,), 1 + 2 * len(plans), content)


class ReferenceRole:
    """Reference policies; each shard goes to one of them, or to its successor."""

    def __init__(self, group: Workers, redo: Redo) -> None:
        self._group = group
        self._redo = redo

    async def logprobs(
        self, trajectories: Shards[Trajectories]
    ) -> tuple[Sequence[ReferenceKL], Shards[ReferenceLogprobs]]:
        jobs = [
            Job(self._group.owner(s), "logprobs", (shard,), 2, f"shard {s}")
            for s, shard in enumerate(trajectories)
        ]
        answers = await self._redo("reference log-probs", jobs)
        return [kl for kl, _ in answers], [record for _, (record,) in answers]


class PolicyRole:
    """Learner ranks; shard s belongs to rank s mod ranks."""

    def __init__(self, group: Workers, config: Config) -> None:
        self._group = group
        self._refreshes = config.feedback.refresh is not FeedbackRefresh.none

    async def update(
        self,
        trajectories: Shards[Trajectories],
        advantage: Sequence[Tensor],
        reference: Shards[ReferenceLogprobs],
        hidden: Shards[Hidden],
    ) -> tuple[Stats, Shards[Hidden]]:
        fresh = dict(enumerate(hidden))
        calls = []
        for i, shard_ids in _by_owner(self._group, len(trajectories), idle=True):
            work = PolicyWork(
                shard_ids=shard_ids,
                advantage=[advantage[s] for s in shard_ids],
                trajectories=[trajectories[s] for s in shard_ids],
                reference=[reference[s] for s in shard_ids],
            )
            returned = 1 + (len(shard_ids) if self._refreshes else 0)
            call, records = self._group.submit(i, "update", work, returns=returned)
            calls.append(call)
            fresh |= zip(shard_ids, records, strict=False)
        stats: list[Stats] = await self._group.settle("policy update", calls)
        return stats[0], [fresh[s] for s in sorted(fresh)]

    async def hidden(self, trajectories: Shards[Trajectories]) -> Shards[Hidden]:
        found: dict[int, Ref[Hidden]] = {}
        calls = []
        for i, shard_ids in _by_owner(self._group, len(trajectories), idle=True):
            shards = [trajectories[s] for s in shard_ids]
            call, records = self._group.submit(i, "hidden", shards, returns=1 + len(shard_ids))
            calls.append(call)
            found |= zip(shard_ids, records, strict=True)
        await self._group.settle("policy states", calls)
        return [found[s] for s in sorted(found)]

    async def save(self, directory: Path) -> None:
        await self._group.all("save policy", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._group.all("load policy", "load", directory)


class RewardRole:
    """Reward replicas; shard s is annotated, and its head gradient computed, by replica s mod replicas."""

    def __init__(self, group: Workers, *, verify_every: int) -> None:
        self._group = group
        self._verify_every = verify_every

    async def annotate(
        self, trajectories: Shards[Trajectories], hidden: Shards[Hidden], *, omega: float, step: int
    ) -> tuple[Sequence[Scores], Shards[Annotation]]:
        sent = [
            self._group.submit(self._group.owner(s), "annotate", rows, states, omega, step, returns=2)
            for s, (rows, states) in enumerate(zip(trajectories, hidden, strict=True))
        ]
        scores: list[Scores] = await self._group.settle("annotate", [call for call, _ in sent])
        return scores, [record for _, (record,) in sent]

    async def warm_up(self, human: LabelledPairs, *, omega: float) -> Stats:
        parts = self._parts(human.hidden, human.annotation)
        calls = [self._group.submit(i, "warm_up", part, omega)[0] for i, part in enumerate(parts)]
        stats: list[Stats] = await self._group.settle("reward warm-up", calls)
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
        calls = [
            self._group.submit(i, "update", own[i], pairs[i], omega, step)[0] for i in range(len(self._group))
        ]
        stats: list[Stats] = await self._group.settle("reward update", calls)
        if len(self._group) > 1 and self._verify_every and step % self._verify_every == 0:
            await require_agreement(self._group, "reward update", "head_digests")
        return stats[0]

    async def attention(
        self, hidden: Ref[Hidden], annotation: Ref[Annotation], rows: int
    ) -> Sequence[Sequence[float]]:
        call, _ = self._group.submit(0, "attention", hidden, annotation, rows)
        (weights,) = await self._group.settle("attention", [call])
        found: Sequence[Sequence[float]] = weights
        return found

    async def save(self, directory: Path) -> None:
        await self._group.all("save reward head", "save", directory)

    async def load(self, directory: Path) -> None:
        await self._group.all("load reward head", "load", directory)

    def _parts(self, hidden: Shards[Hidden], annotation: Shards[Annotation]) -> list[RewardWork]:
        """The work of each replica, which may be none."""
        owned = _by_owner(self._group, len(hidden), idle=True)
        return [
            RewardWork(hidden=[hidden[s] for s in ids], annotation=[annotation[s] for s in ids])
            for _, ids in owned
        ]


def _by_owner(group: Workers, shards: int, *, idle: bool = False) -> list[tuple[int, list[int]]]:
    """Each worker with its shards; workers without any are listed where all must take part (``idle``)."""
    owned = [(i, [s for s in range(shards) if group.owner(s) == i]) for i in range(len(group))]
    return [(i, shard_ids) for i, shard_ids in owned if shard_ids or idle]
