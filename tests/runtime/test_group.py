"""Waiting on actors: deadlines, errors that name the actor, and the typed errors of engines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
import ray

from r2m_ray.errors import InputError, RunError
from r2m_ray.runtime.actors import read_objects
from r2m_ray.runtime.direct_sync import EngineClient
from r2m_ray.runtime.worker_group import Actors


class Worker:
    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def echo(self, value: int) -> int:
        return value

    def several(self, first: int) -> tuple[int, int, int]:
        return first, first + 1, first + 2

    def refuse(self) -> None:
        raise InputError("model.reward: has three labels")

    def fail(self) -> None:
        raise ZeroDivisionError("no tokens")

    def die(self) -> None:
        os._exit(1)

    async def never(self) -> None:
        await asyncio.Event().wait()

    def init_weight_transfer(self, init_info: dict[str, object]) -> None:
        self.log.append(("init", init_info.get("rank_offset")))

    def begin_weight_update(self, verify: bool) -> None:
        self.log.append(("begin", verify))

    def receive_weights(self, update_info: object) -> None:
        self.log.append(("receive", update_info))

    def finish_weight_update(self, version: int, digest: str | None) -> None:
        self.log.append(("finish", version, digest))

    def seen(self) -> list[tuple[object, ...]]:
        return self.log


@pytest.fixture(scope="module")
def workers(local_cluster: None) -> Iterator[Actors]:
    """Two actors; they start slowly, so the tests share them."""
    remote = ray.remote(Worker).options(num_cpus=0)
    actors = Actors({f"reward-{i}": remote.remote() for i in range(2)}, timeout_s=120)
    asyncio.run(actors.all("start", "echo", 0))
    yield actors
    for handle in actors.handles:
        ray.kill(handle)


def test_answers_come_back_in_rank_order(workers: Actors) -> None:
    async def ask() -> list[int]:
        return await workers.settle("ask", workers.each("echo", lambda i: (10 + i,)))

    assert asyncio.run(ask()) == [10, 11]


def test_a_call_returns_something_light_and_references_to_the_rest(workers: Actors) -> None:
    async def ask() -> tuple[list[int], list[list[int]]]:
        sent = [workers.submit(rank, "several", 3 * rank, returns=3) for rank in (1, 0)]
        assert [name for (name, _), _ in sent] == ["reward-1", "reward-0"]
        light = await workers.settle("ask", [call for call, _ in sent])
        return light, [read_objects(records) for _, records in sent]

    assert asyncio.run(ask()) == ([3, 0], [[4, 5], [1, 2]])


def test_shards_are_dealt_in_turn(workers: Actors) -> None:
    assert [workers.owner(s) for s in range(5)] == [0, 1, 0, 1, 0]


def test_an_error_names_actor_and_phase(workers: Actors) -> None:
    with pytest.raises(RunError, match=r"reward-\d failed during annotate: ZeroDivisionError\('no tokens'\)"):
        asyncio.run(workers.all("annotate", "fail"))


def test_a_users_mistake_stays_one(workers: Actors) -> None:
    with pytest.raises(InputError, match=r"reward-\d, start: model\.reward: has three labels"):
        asyncio.run(workers.all("start", "refuse"))


def test_a_silent_actor_meets_the_deadline(workers: Actors) -> None:
    async def ask() -> None:
        calls = [workers.each("echo", lambda i: (i,))[0], workers.each("never", lambda _: ())[1]]
        await workers.settle("annotate", calls, timeout_s=0.5)

    with pytest.raises(RunError, match=r"annotate: no answer from reward-1 within 0\.5 s"):
        asyncio.run(ask())


def test_each_engine_gets_ranks_of_its_own_in_a_direct_transfer(workers: Actors) -> None:
    client = EngineClient(workers.handles, ranks_per_engine=4, timeout_s=60)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 9})
    client.version = 7
    client.start_weight_update()
    client.update_weights({"names": ["w"]})
    client.finish_weight_update()
    logs = ray.get([handle.seen.remote() for handle in workers.handles], timeout=60)
    assert [log[0] for log in logs] == [("init", 1), ("init", 5)]
    rest = [("begin", False), ("receive", {"names": ["w"]}), ("finish", 7, None)]
    assert [log[1:] for log in logs] == [rest, rest]


def test_a_dead_actor_is_named(workers: Actors) -> None:
    # Last, because it ends the actors that the tests share.
    with pytest.raises(RunError, match=r"reward-\d died during annotate"):
        asyncio.run(workers.all("annotate", "die"))
