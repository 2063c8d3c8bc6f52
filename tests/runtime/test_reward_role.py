"""The reward role: each replica gets the shards that it owns, of the step and of human pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from r2m_ray.core.batch import RewardBatch
from r2m_ray.core.roles import LabelledPairs, Ref
from r2m_ray.runtime.actors import RewardActor
from r2m_ray.runtime.local import held
from r2m_ray.runtime.roles import RewardRole
from r2m_ray.runtime.worker_group import Actors


class Engine:
    """Keeps what it was asked to learn from."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def update(
        self, batches: Sequence[RewardBatch], omega: float, step: int, human: Sequence[RewardBatch]
    ) -> dict[str, float]:
        self.calls.append(("update", omega, step, named(batches), named(human)))
        return {"calls": float(len(self.calls))}

    def warm_up(self, human: Sequence[RewardBatch], omega: float) -> dict[str, float]:
        self.calls.append(("warm up", omega, named(human)))
        return {"calls": float(len(self.calls))}


def named(batches: Sequence[RewardBatch]) -> list[tuple[Any, Any]]:
    return [(batch.hidden, batch.annotation) for batch in batches]


def called(method: Any) -> Any:
    async def remote(*arguments: Any) -> Any:
        return method(*arguments)

    return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote), remote=remote)


def stored(*names: str) -> list[Ref[Any]]:
    return [Ref(name) for name in names]


@pytest.fixture
def engines() -> list[Engine]:
    return [Engine(), Engine()]


@pytest.fixture
def role(engines: list[Engine]) -> RewardRole:
    """Two replicas in this process, whose transport passes names instead of records."""
    handles = {}
    for i, engine in enumerate(engines):
        actor: Any = RewardActor(held)
        actor._engine = engine
        handles[f"reward-{i}"] = SimpleNamespace(update=called(actor.update), warm_up=called(actor.warm_up))
    return RewardRole(Actors(handles, timeout_s=60), verify_every=0)


def test_an_update_brings_each_replica_its_shards_of_both_kinds(
    role: RewardRole, engines: list[Engine]
) -> None:
    human = LabelledPairs(hidden=stored("p0", "p1"), annotation=stored("q0", "q1"))
    call = role.update(stored("h0", "h1", "h2"), stored("a0", "a1", "a2"), human, omega=0.7, step=4)
    assert asyncio.run(call) == {"calls": 1.0}
    assert engines[0].calls == [("update", 0.7, 4, [("h0", "a0"), ("h2", "a2")], [("p0", "q0")])]
    assert engines[1].calls == [("update", 0.7, 4, [("h1", "a1")], [("p1", "q1")])]


def test_every_replica_takes_part_though_it_has_no_pair(role: RewardRole, engines: list[Engine]) -> None:
    none = LabelledPairs(hidden=(), annotation=())
    asyncio.run(role.update(stored("h0"), stored("a0"), none, omega=1.0, step=1))
    asyncio.run(role.warm_up(LabelledPairs(hidden=stored("p0"), annotation=stored("q0")), omega=0.6))
    assert engines[0].calls == [("update", 1.0, 1, [("h0", "a0")], []), ("warm up", 0.6, [("p0", "q0")])]
    assert engines[1].calls == [("update", 1.0, 1, [], []), ("warm up", 0.6, [])]
