"""Stop requests: the first SIGTERM or SIGINT ends a run in order, the second one ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from r2m_ray.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_S = 1.0
"""Seconds in which a repeated signal is the same request: some senders signal the process and its group."""
SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Whether somebody asked the run to stop; a context manager that listens for the signals.

    While actors start or are replaced, the run ends where it is. While it trains (``deferred``), the request
    waits for the end of the step, where the driver saves and checks, for ``grace_s`` seconds at most.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._name: str | None = None
        self._deferred = False
        self._since = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._name is not None

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            # Ray's own handler of SIGTERM, while it starts.
            self._name = signal.SIGTERM.name
            raise self.preempted("nothing was under way") from error

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """``asyncio.run``, ended in order by a signal: raises Preempted."""
        try:
            asyncio.run(self._listening(main))
        except asyncio.CancelledError:
            if not self.requested:
                raise
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
        """Raise Preempted if a stop was requested."""
        if self.requested:
            raise self.preempted("the last commit is kept")

    def preempted(self, state: str) -> Preempted:
        """The error that ends a run after a stop request."""
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
        if not self._note(number):
            return
        assert self._task is not None
        if self._deferred:
            print(f"{self._name}: saving at the end of this step; once more to stop at once", file=sys.stderr)
            asyncio.get_running_loop().call_later(self._grace_s, self._task.cancel)
        else:
            self._task.cancel()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._note(number):
            raise self.preempted("nothing was under way")

    def _note(self, number: int) -> bool:
        """Record a signal; returns whether it is the first one."""
        if not self.requested:
            self._name, self._since = signal.Signals(number).name, time.monotonic()
            return True
        if time.monotonic() - self._since > REPEAT_S:
            # A second request means: do not wait. The last commit is complete in any case.
            leave(Preempted.exit_code)
        return False


def leave(code: int) -> NoReturn:
    """End this process at once, and show the cursor that the live panel has hidden."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
        sys.stderr.flush()
    os._exit(code)
