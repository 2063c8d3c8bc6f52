"""Waiting on actors: deadlines, errors that name the actor, and the typed errors of engines."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest
import ray
import torch
import torch.distributed as dist

from r2m_ray.errors import ActorLost, DeviceLost, InputError, Loss, PeersLost, RunError
from r2m_ray.runtime.actors import PolicyActor
from r2m_ray.runtime.device import Address, free_address, interface_of, join_environment
from r2m_ray.runtime.weight_sync import EngineClient
from r2m_ray.runtime.worker_group import Actors, raises_peers_lost
from tests.support.spawned import calls, spawned


class Worker:
    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def echo(self, value: int) -> int:
        return value

    def refuse(self) -> None:
        raise InputError("model.reward: has three labels")

    def fail(self) -> None:
        raise ZeroDivisionError("no tokens")

    def lose(self, kind: str) -> None:
        raise {"device": DeviceLost, "peers": PeersLost}[kind]("nvlink: gone")

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


@raises_peers_lost
class Rank:
    """One of two ranks over gloo, and ways to lose the other one."""

    def start(self, rank: int, address: Address) -> str:
        join_environment(rank, 2, address)
        dist.init_process_group("gloo")
        return os.environ["GLOO_SOCKET_IFNAME"]

    def reduce(self) -> float:
        total = torch.ones(1)
        dist.all_reduce(total)
        return total.item()

    def reduce_in_backward(self) -> None:
        weight = torch.ones(1, requires_grad=True)
        weight.register_hook(lambda gradient: dist.all_reduce(gradient))
        weight.sum().backward()

    def leave(self) -> None:
        dist.destroy_process_group()

    def die(self) -> None:
        os._exit(1)

    def mistake(self) -> None:
        torch.ones(2) @ torch.ones(3)


def test_a_lack_of_memory_inside_a_collective_is_no_loss_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same work would lack it again, so its own error must arrive."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    @raises_peers_lost
    class Full:
        def work(self, error: RuntimeError) -> None:
            source = "def fail(error):\n    raise error\n"
            scope = {"__name__": "torch.distributed.made_up"}
            exec(source, scope)
            scope["fail"](error)  # type: ignore[operator]

    with pytest.raises(torch.OutOfMemoryError):
        Full().work(torch.OutOfMemoryError("no memory"))
    with pytest.raises(PeersLost):
        Full().work(RuntimeError("connection closed"))


@pytest.fixture
def ranks(local_cluster: None) -> Iterator[Actors]:
    with spawned(Rank, "policy") as actors:
        address = free_address()
        starts = calls(actors, "start", *((i, address) for i in range(2)))
        assert set(asyncio.run(actors.settle("start", starts))) == {interface_of(address[0])}
        yield actors


@pytest.fixture(scope="module")
def workers(local_cluster: None) -> Iterator[Actors]:
    """Two actors; they start slowly, so the tests share them."""
    with spawned(Worker, "reward") as actors:
        asyncio.run(actors.all("start", "echo", 0))
        yield actors


def test_answers_come_back_in_rank_order(workers: Actors) -> None:
    async def ask() -> list[int]:
        return await workers.settle("ask", calls(workers, "echo", (10,), (11,)))

    assert asyncio.run(ask()) == [10, 11]


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
        sent = [workers.submit(0, "echo", 0)[0], workers.submit(1, "never")[0]]
        await workers.settle("annotate", sent, timeout_s=0.5)

    with pytest.raises(RunError, match=r"annotate: no answer from reward-1 within 0\.5 s"):
        asyncio.run(ask())


@pytest.mark.parametrize("cause", [Loss.device, Loss.peers])
def test_a_typed_failure_of_an_actor_is_a_loss_with_its_cause(workers: Actors, cause: Loss) -> None:
    with pytest.raises(ActorLost, match=rf"reward-\d lost its {cause} during update: nvlink: gone") as caught:
        asyncio.run(workers.all("update", "lose", cause.value))
    assert caught.value.cause is cause
    assert caught.value.concerns("reward")


def lost(ranks: Actors, first: str, second: str) -> ActorLost:
    """What two calls, of rank 0 and of rank 1, end with."""

    async def ask() -> None:
        assert await ranks.all("update", "reduce") == [2.0, 2.0]
        named = zip(ranks.names, ranks.handles, (first, second), strict=True)
        await ranks.settle(
            "update", [(name, getattr(handle, method).remote()) for name, handle, method in named]
        )

    with pytest.raises(ActorLost) as caught:
        asyncio.run(ask())
    return caught.value


def test_a_dead_rank_is_the_cause_of_its_peers_failure(ranks: Actors) -> None:
    error = lost(ranks, "reduce_in_backward", "die")
    assert error.cause is Loss.died
    assert error.actors == ("policy-1",)


@pytest.mark.parametrize("method", ["reduce", "reduce_in_backward"])
def test_a_collective_that_fails_between_living_ranks_is_a_loss_of_peers(ranks: Actors, method: str) -> None:
    error = lost(ranks, method, "leave")
    assert error.cause is Loss.peers
    assert error.actors == ("policy-0",)
    assert "policy-0 lost its peers during update: " in str(error)


def test_a_mistake_in_a_rank_is_not_a_loss(ranks: Actors) -> None:
    with pytest.raises(RunError, match=r"policy-\d failed during update") as caught:
        asyncio.run(ranks.all("update", "mistake"))
    assert type(caught.value) is RunError


def test_the_collectives_own_words_come_before_a_late_peer(workers: Actors) -> None:
    async def ask() -> None:
        sent = [workers.submit(0, "lose", "peers")[0], workers.submit(1, "never")[0]]
        await workers.settle("start", sent)

    with pytest.raises(ActorLost, match=r"reward-0 lost its peers during start: nvlink: gone") as caught:
        asyncio.run(ask())
    assert caught.value.actors == ("reward-0", "reward-1")


def test_an_address_belongs_to_an_interface_or_to_none() -> None:
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.1") is None


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


def test_a_transfer_that_fails_is_a_loss_of_the_device() -> None:
    """vLLM raises NCCL's errors as RuntimeErrors."""

    class Sender:
        def __init__(self, error: Exception) -> None:
            self._error = error
            self.version = 0

        def send_weights(self) -> None:
            raise self._error

    actor = PolicyActor()
    actor._client = Sender(RuntimeError())  # type: ignore[assignment]
    for error, raised in (
        (RuntimeError("NCCL error: unhandled cuda error"), DeviceLost),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (InputError("sync.backend: no such engine"), InputError),
    ):
        actor._sender = Sender(error)
        with pytest.raises(raised):
            actor.send_weights(3)
