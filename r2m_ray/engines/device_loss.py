"""Failures after which an engine's process must be replaced, as one type: ``DeviceLost``.

An error of an accelerator leaves its context unusable, and a peer that is gone leaves a collective
unfinished. Neither is a mistake of the user, and neither can be repaired inside the process. torch has
a type for each, so no message is read. Running out of memory is not among them: the same work would
run out of memory again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed import DistError

from r2m_ray.errors import DeviceLost

Engine = TypeVar("Engine")


@contextmanager
def device_loss(engine: str) -> Iterator[None]:
    """Raise DeviceLost, naming the engine, where an accelerator or a collective fails inside the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (torch.AcceleratorError, DistError) as error:
        raise DeviceLost(
            f"{engine}: its device or a peer failed: {type(error).__name__}: {error}; the process is replaced"
        ) from error


def raises_device_loss(engine: str) -> Callable[[type[Engine]], type[Engine]]:
    """Class decorator: the constructor and every public method raise DeviceLost as `device_loss` does."""

    guard = device_loss(engine)

    def iterated(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(method)
        def guarded(*args: Any, **options: Any) -> Iterator[Any]:
            with device_loss(engine):
                yield from method(*args, **options)

        return guarded

    def decorated(kind: type[Engine]) -> type[Engine]:
        for name, method in list(vars(kind).items()):
            if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
                guarded = iterated(method) if inspect.isgeneratorfunction(method) else guard(method)
                setattr(kind, name, guarded)
        return kind

    return decorated
