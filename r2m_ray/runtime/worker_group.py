"""The actors of one role, and every wait on them: with a deadline, and an error that names the actor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from r2m_ray.core.roles import Ref
from r2m_ray.errors import ActorLost, InputError, RunError
from r2m_ray.runtime.postmortem import last_lines
from r2m_ray.runtime.workers import Call

PEER_GRACE_S = 5.0
"""After a failure, how long to wait for its cause: a rank that died makes its peers fail too."""
DEATH_GRACE_S = 0.5
"""After a death, how long to wait for others that died with it."""
COLLECTIVE = re.compile(r"gloo|nccl|Dist(Backend|Network|Store)Error", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"Memory usage \S+ exceeded threshold of [^\n]*")


class CollectiveFailure(RunError):
    """A rank lost its peers in a collective: a consequence, whose cause is another rank's."""


class Actors:
    """The actors of one role by name, in rank order."""

    def __init__(self, handles: Mapping[str, Any], *, timeout_s: float) -> None:
        self.names = list(handles)
        self.handles = list(handles.values())
        self.timeout_s = timeout_s
        self.pids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.handles)

    def owner(self, shard: int) -> int:
        """The actor that works on a shard; the same one throughout a step."""
        return shard % len(self.handles)

    def submit(
        self, rank: int, method: str, *arguments: Any, returns: int = 1
    ) -> tuple[Call, list[Ref[Any]]]:
        """Send a call to the actor that has the rank now; see `Workers.submit`."""
        answer = getattr(self.handles[rank], method).options(num_returns=returns).remote(*arguments)
        light, *records = answer if returns > 1 else [answer]
        return (self.names[rank], light), [Ref(record) for record in records]

    def each(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Call]:
        """Call a method on every actor with arguments by rank; the named calls are yet to be settled."""
        return [
            (name, getattr(handle, method).remote(*arguments(i)))
            for i, (name, handle) in enumerate(zip(self.names, self.handles, strict=True))
        ]

    async def all(self, phase: str, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on every actor and wait for every answer."""
        return await self.settle(phase, self.each(method, lambda _: args), timeout_s=timeout_s)

    async def settle(self, phase: str, calls: Sequence[Call], *, timeout_s: float | None = None) -> list[Any]:
        """Wait for calls, each with its actor's name; a failure or the deadline ends the wait.

        Raises what caused it: ActorLost for actors that died or stayed silent, InputError and RunError as
        the actor raised them, RunError with the traceback for anything else.
        """
        outcomes = await self.outcomes(phase, calls, timeout_s=timeout_s, patient=False)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if failures:
            raise _root_cause(failures)
        return outcomes

    async def outcomes(
        self, phase: str, calls: Sequence[Call], *, timeout_s: float | None = None, patient: bool = True
    ) -> list[Any]:
        """Each call's answer or typed error; a failure does not end a ``patient`` wait for the others."""
        limit = timeout_s or self.timeout_s
        tasks = [asyncio.ensure_future(self._answer(name, phase, call)) for name, call in calls]
        when = asyncio.ALL_COMPLETED if patient else asyncio.FIRST_EXCEPTION
        done, pending = await asyncio.wait(tasks, timeout=limit, return_when=when)
        errors = [task.exception() for task in done]
        waited = f"within {limit:g} s"
        if pending and any(errors):
            died = any(isinstance(error, ActorLost) for error in errors)
            grace_s = DEATH_GRACE_S if died else PEER_GRACE_S
            _, pending = await asyncio.wait(pending, timeout=grace_s)
            waited = f"within {grace_s:g} s of a peer's failure"
        for task in pending:
            task.cancel()
        return [
            self._late(name, phase, waited) if task in pending else task.exception() or task.result()
            for (name, _), task in zip(calls, tasks, strict=True)
        ]

    async def _answer(self, name: str, phase: str, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RayError):
                # What it works with went with another actor or a node; it is alive itself.
                raise ActorLost(f"{name}, {phase}: {_first_lines(cause)}", ()) from error
            if type(cause) in (InputError, RunError):
                raise type(cause)(f"{name}, {phase}: {cause}") from error
            if COLLECTIVE.search(f"{type(cause).__name__} {cause}"):
                raise CollectiveFailure(f"{name} lost its peers during {phase}: {cause}") from error
            raise RunError(f"{name} failed during {phase}: {cause!r}\n{error}") from error
        except (RayActorError, OutOfMemoryError) as error:
            raise self._dead(name, phase, str(error)) from error
        except RayError as error:
            # An object that went with its node, or a store that could not take one.
            raise ActorLost(f"{name}, {phase}: {_first_lines(error)}", ()) from error

    def _dead(self, name: str, phase: str, text: str) -> ActorLost:
        reason = _reason(text)
        if memory := OUT_OF_MEMORY.search(text):
            reason = (
                f"Ray's memory monitor ended it ({memory.group()}). Lower the role's tokens_per_microbatch "
                "or the number of actors on its node, or raise RAY_memory_usage_threshold"
            )
        pid = self.pids.get(name)
        return ActorLost(f"{name} died during {phase}: {reason}.{last_lines(pid) if pid else ''}", (name,))

    def _late(self, name: str, phase: str, waited: str) -> ActorLost:
        return ActorLost(
            f"{phase}: no answer from {name} {waited}. If it is only slow, raise "
            f"cluster.{'start' if phase == 'start' else 'phase'}_timeout_s.",
            (name,),
        )


def _root_cause(failures: Sequence[Exception]) -> Exception:
    """Of failures that came together, the one that made the others."""
    lost = [failure for failure in failures if isinstance(failure, ActorLost)]
    dead = [failure for failure in lost if " died during " in str(failure)]
    own = [f for f in failures if not isinstance(f, ActorLost | CollectiveFailure)]
    if own and not dead:
        return own[0]
    if dead or lost:
        chosen = dead or lost
        return ActorLost(str(chosen[0]), tuple(dict.fromkeys(n for f in chosen for n in f.actors)))
    names = tuple(str(failure).split(" ", 1)[0] for failure in failures)
    return ActorLost(f"{failures[0]} (no rank died)", names)


def _reason(text: str) -> str:
    """Ray's reason in its own words, without the advice around it."""
    match = re.search(
        r"(?:dead because|Worker exit detail:) *(.+?)(?:\. Some common|\n|$)",
        text.split("Worker exit type")[-1],
    )
    return (match.group(1) if match else _first_lines(text)).strip(" .")[:300]


def _first_lines(error: object) -> str:
    return " ".join(str(error).split())[:300]
