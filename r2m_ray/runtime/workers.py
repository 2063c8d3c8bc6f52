"""What a role needs of the workers that play it, wherever they run."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from r2m_ray.core.roles import Ref

Call = tuple[str, Awaitable[Any]]
"""A call that was sent: the worker's name, and its answer to come."""


class Workers(Protocol):
    """The workers of one role by name, in rank order."""

    names: list[str]

    def __len__(self) -> int: ...

    def owner(self, shard: int) -> int:
        """The rank that works on a shard; the same one throughout a step."""
        ...

    def submit(
        self, rank: int, method: str, *arguments: Any, returns: int = 1
    ) -> tuple[Call, list[Ref[Any]]]:
        """Send a call whose worker returns ``returns`` objects: the light one to wait for, and the others."""
        ...

    async def settle(self, phase: str, calls: Sequence[Call]) -> list[Any]:
        """Wait for calls and return their answers; a failure or the deadline ends the wait."""
        ...

    async def all(self, phase: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every worker and wait for every answer."""
        ...
