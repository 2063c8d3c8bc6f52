"""Actors of a class on the cluster that runs, ended afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from r2m_ray.runtime.worker_group import Actors, Call

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@contextmanager
def spawned(kind: type, role: str, count: int = 2) -> Iterator[Actors]:
    remote = ray.remote(kind).options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT})
    actors = Actors({f"{role}-{i}": remote.remote() for i in range(count)}, timeout_s=240)
    yield actors
    for handle in actors.handles:
        ray.kill(handle)


def calls(actors: Actors, method: str, *arguments: tuple[object, ...]) -> list[Call]:
    """A call of each actor with arguments of its own."""
    return [actors.submit(rank, method, *own)[0] for rank, own in enumerate(arguments)]
