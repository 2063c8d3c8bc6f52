"""The actors of one role, and every wait on them: with a deadline, and an error that names the actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from r2m_ray.errors import InputError, RunError


class Actors:
    """The actors of one role by name, in rank order."""

    def __init__(self, handles: Mapping[str, Any], *, timeout_s: float) -> None:
        self.names = list(handles)
        self.handles = list(handles.values())
        self._timeout_s = timeout_s

    def __len__(self) -> int:
        return len(self.handles)

    def owner(self, shard: int) -> int:
        """The actor that works on a shard; the same one throughout a step."""
        return shard % len(self.handles)

    def each(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[tuple[str, Any]]:
        """Call a method on every actor with arguments by rank; the named calls are yet to be settled."""
        return [
            (name, getattr(handle, method).remote(*arguments(i)))
            for i, (name, handle) in enumerate(zip(self.names, self.handles, strict=True))
        ]

    async def all(self, phase: str, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on every actor and wait for every answer."""
        return await self.settle(phase, self.each(method, lambda _: args), timeout_s=timeout_s)

    async def settle(
        self, phase: str, calls: Sequence[tuple[str, Awaitable[Any]]], *, timeout_s: float | None = None
    ) -> list[Any]:
        """Wait for calls, each with its actor's name; the first failure or the deadline ends the wait."""
        limit = timeout_s or self._timeout_s
        tasks = [asyncio.ensure_future(_value(name, phase, call)) for name, call in calls]
        done, pending = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for task in pending:
            task.cancel()
        for task in tasks:
            if task in done:
                task.result()
        if pending:
            late = [name for (name, _), task in zip(calls, tasks, strict=True) if task in pending]
            raise RunError(
                f"{phase}: no answer from {', '.join(late)} within {limit:g} s. "
                "If they are only slow, raise cluster.phase_timeout_s."
            )
        return [task.result() for task in tasks]

    def stop(self) -> None:
        for handle in self.handles:
            ray.kill(handle)


async def _value(name: str, phase: str, call: Awaitable[Any]) -> Any:
    try:
        return await call
    except RayActorError as error:
        raise RunError(f"{name} died during {phase}: {error}") from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, InputError | RunError):
            raise type(cause)(f"{name}, {phase}: {cause}") from error
        raise RunError(f"{name} failed during {phase}: {cause!r}\n{error}") from error
