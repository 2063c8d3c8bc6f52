"""Told to stop: the first SIGTERM or SIGINT ends a run in order, the second one at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from r2m_ray.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the run was told to stop; a context manager that listens for the signals.

    While actors start or are replaced, the run ends where it is. While it trains (``deferred``), the request
    waits for the end of the step, where the driver saves and checks, but no longer than ``grace_s``.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._name: str | None = None
        self._deferred = False
        self._task: asyncio.Task[None] | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._name is not None

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """``asyncio.run``, ended in order by a signal: raises Preempted."""
        try:
            asyncio.run(self._listening(main))
        except asyncio.CancelledError:
            raise self.preempted("the last commit is kept") from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a request waits for the next ``check``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Preempted where the run was told to stop."""
        if self.requested:
            raise self.preempted("the last commit is kept")

    def preempted(self, state: str) -> Preempted:
        """The error that ends a run that was told to stop."""
        return Preempted(f"stopped by {self._name}; {state}. Continue with run.resume=true.")

    async def _listening(self, main: Coroutine[Any, Any, None]) -> None:
        loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(main)
        for number in SIGNALS:
            loop.add_signal_handler(number, self._in_loop, number)
        try:
            await self._task
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, self._on_signal)

    def _in_loop(self, number: int) -> None:
        self._note(number)
        assert self._task is not None
        if self._deferred:
            print(
                f"{self._name}: saving at the end of this step; once more to stop at once",
                file=sys.stderr,
            )
            asyncio.get_running_loop().call_later(self._grace_s, self._task.cancel)
        else:
            self._task.cancel()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._note(number)
        raise self.preempted("nothing was under way")

    def _note(self, number: int) -> None:
        if self.requested:
            # Whoever asks twice does not want to wait; the last commit is whole in any case.
            os._exit(Preempted.exit_code)
        self._name = signal.Signals(number).name
