"""The roles of a run in one process, without Ray: ``cluster.address=none``.

The same workers with the same engines are called in turn, so that a debugger can step through a training
step, and a small study needs no cluster. A failure ends the run: nothing could replace a worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Ref, Roles
from r2m_ray.runtime.device import actor_environment, free_address
from r2m_ray.runtime.recovery import Once
from r2m_ray.runtime.start import played_by, start_arguments
from r2m_ray.runtime.weight_sync import ObjectStoreSync
from r2m_ray.runtime.workers import Call
from r2m_ray.tasks.models import Models


class LocalWorker:
    """The one worker of a role, in this process; a call is done before it is waited for."""

    def __init__(self, name: str, worker: Any) -> None:
        self.names = [name]
        self._worker = worker

    def __len__(self) -> int:
        return 1

    def owner(self, shard: int) -> int:
        """Rank 0."""
        return 0

    def submit(
        self, rank: int, method: str, *arguments: Any, returns: int = 1
    ) -> tuple[Call, list[Ref[Any]]]:
        """Call a method; see `Workers.submit`."""
        answer = getattr(self._worker, method)(*arguments)
        light, *records = answer if returns > 1 else [answer]
        return (self.names[rank], _answered(light)), [Ref(record) for record in records]

    async def settle(self, phase: str, calls: Sequence[Call]) -> list[Any]:
        """The answers, which are there."""
        return [await answer for _, answer in calls]

    async def all(self, phase: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method and return its answer, as the only one."""
        return [getattr(self._worker, method)(*arguments)]


def local_roles(config: Config, models: Models) -> Roles:
    """Start the engines of a run one after another, and the roles that they play.

    Raises InputError where an engine refuses its model or options.
    """
    os.environ.update(actor_environment(config, config.cluster.gpus_per_learner))
    torch.set_num_threads(config.cluster.threads_per_actor)
    disable_progress_bar()
    address = free_address("127.0.0.1")
    workers = {}
    for role, (worker_class, arguments) in start_arguments(config, models).items():
        worker = worker_class(held)
        worker.start(*arguments(0, address))
        workers[role] = LocalWorker(f"{role}-0", worker)
    return played_by(
        workers,
        config,
        sync=ObjectStoreSync(config.sync, policy=workers["policy"], rollout=workers["rollout"]),
        sample=Once(workers["rollout"]),
        score=Once(workers["reference"]),
        share=Ref,
    )


def held(refs: Iterable[Ref[Any]]) -> list[Any]:
    """The records that references hold themselves."""
    return [ref.handle for ref in refs]


async def _answered(answer: Any) -> Any:
    return answer
