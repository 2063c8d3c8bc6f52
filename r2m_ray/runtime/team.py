"""A role's actors from their start to their replacement."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray

from r2m_ray.errors import RunError
from r2m_ray.runtime.device import Address, free_address
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.worker_group import Actors

Arguments = Callable[[int, Address], tuple[Any, ...]]


class Team:
    """The actors of one role, and how to start them anew.

    arguments: of an actor's ``start``, by its rank and the address where rank 0 listens. What ``start``
    returns is the digest of weights that never change, if there are any: a successor must return the same.
    """

    def __init__(
        self,
        role: str,
        actor_class: type,
        placement: Placement,
        arguments: Arguments,
        *,
        start_timeout_s: float,
        phase_timeout_s: float,
    ) -> None:
        self.role = role
        self._class = actor_class
        self._placement = placement
        self._arguments = arguments
        self._start_timeout_s = start_timeout_s
        self._frozen: dict[str, str | None] = {}
        self.unready: set[int] = set()
        self._ranks = range(placement.count(role))
        self.actors = Actors(
            {f"{role}-{rank}": self._spawn(rank) for rank in self._ranks}, timeout_s=phase_timeout_s
        )

    async def start(self, ranks: Sequence[int] | None = None) -> None:
        """Start engines, all of them or those of some ranks, and wait until they are ready.

        Ranks that meet in a collective must be started together.
        """
        chosen = list(self._ranks if ranks is None else ranks)
        self.unready |= set(chosen)
        handles = [self.actors.handles[i] for i in chosen]
        names = [self.actors.names[i] for i in chosen]
        found = await self._settle(names, [handle.__ray_call__.remote(_whereabouts) for handle in handles])
        here = ray.util.get_node_ip_address()
        # A number means a process on this node only where the actor lives on it.
        self.actors.pids |= {
            name: pid for name, (pid, (ip, _)) in zip(names, found, strict=True) if ip == here
        }
        meeting = found[0][1]
        starts = [
            handle.start.remote(*self._arguments(rank, meeting))
            for rank, handle in zip(chosen, handles, strict=True)
        ]
        for name, frozen in zip(names, await self._settle(names, starts), strict=True):
            known = self._frozen.setdefault(name, frozen)
            if frozen != known:
                raise RunError(
                    f"{name} was started again and holds other frozen weights than before ({known} then, "
                    f"{frozen} now): its model's files have changed. Put them back, and continue with "
                    "run.resume=true."
                )
        self.unready -= set(chosen)

    async def replace(self, ranks: Sequence[int] | None = None) -> None:
        """End actors, whatever state they are in, and start others in their places."""
        chosen = list(self._ranks if ranks is None else ranks)
        self.unready |= set(chosen)
        for rank in chosen:
            ray.kill(self.actors.handles[rank])
            self.actors.handles[rank] = self._spawn(rank)
        await self.start(chosen)

    def ranks_of(self, names: Sequence[str]) -> list[int]:
        """The ranks of actors given by name."""
        return [self.actors.names.index(name) for name in names]

    def _spawn(self, rank: int) -> Any:
        return self._placement.spawn(self._class, self.role, rank)

    async def _settle(self, names: Sequence[str], calls: Sequence[Any]) -> list[Any]:
        named = list(zip(names, calls, strict=True))
        return await self.actors.settle("start", named, timeout_s=self._start_timeout_s)


async def together(*doings: Awaitable[None]) -> None:
    """Wait until all have ended; then raise the first failure, if there is one."""
    for result in await asyncio.gather(*doings, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _whereabouts(_: object) -> tuple[int, Address]:
    return os.getpid(), free_address()
