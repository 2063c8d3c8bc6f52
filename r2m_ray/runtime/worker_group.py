"""The actors of one role: their start, every wait on them, the error that names the lost one, its successor.

A wait has a deadline. An actor's loss is a typed error with its cause (`errors.Loss`); no message is read to
decide what happens next.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from r2m_ray.core.roles import Ref
from r2m_ray.errors import ActorLost, DeviceLost, InputError, Loss, PeersLost, RunError
from r2m_ray.runtime.device import Address, free_address
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.workers import Call, Workers

PEER_GRACE_S = 5.0
"""After a failure, how long to wait for its cause: a rank that died makes its peers fail too."""
DEATH_GRACE_S = 0.5
"""After a death, how long to wait for others that died with it."""
COLLECTIVES = "torch.distributed."
"""Modules that start collectives, or wait for them."""
CAUSES = (Loss.died, Loss.device, Loss.peers, Loss.silent, Loss.record)
"""Losses that came together, from what causes others to what others cause."""
OUT_OF_MEMORY = re.compile(r"Memory usage \S+ exceeded threshold of [^\n]*")
LOG_LINES = 12
LOG_BYTES = 2**16
"""Bytes read from the end of a log."""

Arguments = Callable[[int, Address], tuple[Any, ...]]
Kind = TypeVar("Kind")


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

    async def all(self, phase: str, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on every actor and wait for every answer."""
        calls = [self.submit(rank, method, *args)[0] for rank in range(len(self))]
        return await self.settle(phase, calls, timeout_s=timeout_s)

    async def settle(self, phase: str, calls: Sequence[Call], *, timeout_s: float | None = None) -> list[Any]:
        """Wait for calls, each with its actor's name; a failure or the deadline ends the wait.

        Returns: the answers, in the order of the calls.
        Raises: what caused the failure: ActorLost for actors that are lost, InputError and RunError as the
            actor raised them, RunError with the traceback for anything else.
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
        errors = [error for task in done if (error := task.exception())]
        waited = f"within {limit:g} s"
        if pending and errors:
            died = any(isinstance(error, ActorLost) and error.cause is Loss.died for error in errors)
            grace_s = DEATH_GRACE_S if died else PEER_GRACE_S
            _, pending = await asyncio.wait(pending, timeout=grace_s)
            waited = f"within {grace_s:g} s of a peer's failure"
        for task in pending:
            task.cancel()
        return [
            _late(name, phase, waited) if task in pending else task.exception() or task.result()
            for (name, _), task in zip(calls, tasks, strict=True)
        ]

    async def _answer(self, name: str, phase: str, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except RayTaskError as error:
            raise _raised(name, phase, error) from error
        except (RayActorError, OutOfMemoryError) as error:
            raise self._dead(name, phase, str(error)) from error
        except RayError as error:
            # An object that went with its node, or a store that could not take one.
            raise ActorLost(f"{name}, {phase}: {_on_one_line(error)}", (), Loss.record) from error

    def _dead(self, name: str, phase: str, text: str) -> ActorLost:
        reason = _reason(text)
        if memory := OUT_OF_MEMORY.search(text):
            reason = (
                f"Ray's memory monitor ended it ({memory.group()}). Lower the role's tokens_per_microbatch "
                "or the number of actors on its node, or raise RAY_memory_usage_threshold"
            )
        pid = self.pids.get(name)
        return ActorLost(f"{name} died during {phase}: {reason}.{last_lines(pid) if pid else ''}", (name,))


class WorkerGroup:
    """The actors of one role, and how to start and replace them.

    Args:
        role: names the actors, with their rank.
        actor_class: what Ray starts; has a method ``start``.
        placement: gives each actor its place.
        arguments: of an actor's ``start``, by its rank and the rendezvous address, where rank 0 listens. What
            ``start`` returns is the digest of weights that never change, if there are any: a successor must
            return the same.
        start_timeout_s: until engines must be ready, in seconds.
        phase_timeout_s: until any other call must have its answer, in seconds.
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
            {f"{role}-{rank}": placement.spawn(actor_class, role, rank) for rank in self._ranks},
            timeout_s=phase_timeout_s,
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
        rendezvous = found[0][1]
        starts = [
            handle.start.remote(*self._arguments(rank, rendezvous))
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
        await self._placement.settled(self.role, chosen)
        for rank in chosen:
            self.actors.handles[rank] = self._placement.spawn(self._class, self.role, rank)
        await self.start(chosen)

    async def _settle(self, names: Sequence[str], calls: Sequence[Any]) -> list[Any]:
        named = list(zip(names, calls, strict=True))
        return await self.actors.settle("start", named, timeout_s=self._start_timeout_s)


async def together(*doings: Awaitable[None]) -> None:
    """Wait until all have ended; then raise the first failure, if there is one."""
    for result in await asyncio.gather(*doings, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def raises_peers_lost(kind: type[Kind]) -> type[Kind]:
    """Class decorator: every public method raises PeersLost where a collective fails inside it.

    torch gives NCCL's failures a type, and engines raise DeviceLost for them. It gives gloo's failures none:
    they are RuntimeErrors, so the module that raised them distinguishes them.
    """

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(*args: Any, **options: Any) -> Any:
            try:
                return method(*args, **options)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                *_, (last, _) = traceback.walk_tb(error.__traceback__)
                peers = int(os.environ.get("WORLD_SIZE", "1")) - 1
                if peers and f"{last.f_globals['__name__']}.".startswith(COLLECTIVES):
                    raise PeersLost(str(error)) from error
                raise

        return called

    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, guarded(method))
    return kind


async def require_agreement(actors: Workers, phase: str, method: str) -> None:
    """Compare the digests of every tensor, which ``method`` returns by name, between all actors.

    Raises: RunError, naming the first tensor that differs and who holds another than most; of two actors,
        another than rank 0.
    """
    difference = first_difference(actors.names, await actors.all(phase, method))
    if difference:
        raise RunError(
            f"{phase}: {difference}. Their memory or a collective is broken: nothing of this step was kept. "
            "Continue from the last checkpoint with run.resume=true, on other devices if it happens again."
        )


def first_difference(names: Sequence[str], digests: Sequence[Mapping[str, str]]) -> str | None:
    """The first tensor that actors do not agree on, in words; None where they agree on all."""
    for tensor in digests[0]:
        held = [digest[tensor] for digest in digests]
        common, _ = Counter(held).most_common(1)[0]
        others = [name for name, digest in zip(names, held, strict=True) if digest != common]
        if others:
            like = names[held.index(common)]
            return f"{tensor} of {', '.join(others)} is not that of {like}"
    return None


def last_lines(pid: int) -> str:
    """The last lines on the standard error of a process of this machine, as a paragraph, if there are any."""
    logs = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "session_latest" / "logs"
    lines: list[str] = []
    for file in sorted(logs.glob(f"worker-*-{pid}.err")):
        try:
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - LOG_BYTES))
                lines += stream.read().decode(errors="replace").splitlines()
        except OSError as error:
            lines.append(f"({file} cannot be read: {error.strerror})")
    said = [line for line in lines if line.strip() and not line.startswith(":")]
    return "".join(["\nIts last lines:", *(f"\n  {line}" for line in said[-LOG_LINES:])]) if said else ""


def _whereabouts(_: object) -> tuple[int, Address]:
    return os.getpid(), free_address()


def _raised(name: str, phase: str, error: RayTaskError) -> Exception:
    """What an actor's method raised, as a typed error that names the actor."""
    cause = error.cause
    if isinstance(cause, RayError):
        # What it works with went with another actor or a node; it is alive itself.
        return ActorLost(f"{name}, {phase}: {_on_one_line(cause)}", (), Loss.record)
    if isinstance(cause, DeviceLost):
        return ActorLost(f"{name} lost its device during {phase}: {cause}", (name,), Loss.device)
    if isinstance(cause, PeersLost):
        return ActorLost(f"{name} lost its peers during {phase}: {cause}", (name,), Loss.peers)
    if type(cause) is InputError:
        return InputError(f"{name}, {phase}: {cause}")
    if type(cause) is RunError:
        return RunError(f"{name}, {phase}: {cause}")
    return RunError(f"{name} failed during {phase}: {cause!r}\n{error}")


def _late(name: str, phase: str, waited: str) -> ActorLost:
    return ActorLost(
        f"{phase}: no answer from {name} {waited}. If it is only slow, raise "
        f"cluster.{'start' if phase == 'start' else 'phase'}_timeout_s.",
        (name,),
        Loss.silent,
    )


def _root_cause(failures: Sequence[Exception]) -> Exception:
    """Of failures that came together, the one that caused the others."""
    lost = [failure for failure in failures if isinstance(failure, ActorLost)]
    own = [failure for failure in failures if not isinstance(failure, ActorLost)]
    dead = [failure for failure in lost if failure.cause in (Loss.died, Loss.device)]
    if own and not dead:
        return own[0]
    first = min(dead or lost, key=lambda failure: CAUSES.index(failure.cause))
    actors = tuple(dict.fromkeys(name for failure in dead or lost for name in failure.actors))
    return ActorLost(str(first), actors, first.cause)


def _reason(text: str) -> str:
    """Ray's reason in its own words, without the advice around it."""
    match = re.search(
        r"(?:dead because|Worker exit detail:) *(.+?)(?:\. Some common|\n|$)",
        text.split("Worker exit type")[-1],
    )
    return (match.group(1) if match else _on_one_line(text)).strip(" .")[:300]


def _on_one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
