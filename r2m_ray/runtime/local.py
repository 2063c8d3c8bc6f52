"""The roles of a run in one process, without Ray: ``cluster.address=none``.

The same workers with the same engines are called in turn, so that a debugger can step through a training
step, and a small study needs no cluster. A failure ends the run: nothing could replace a worker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from r2m_ray.config.schema import Config, FeedbackSource
from r2m_ray.core.roles import Ref, Roles, Rollout
from r2m_ray.driver.feedback import LearnerFeedback
from r2m_ray.runtime.actors import PolicyActor, ReferenceActor, RewardActor, RolloutActor
from r2m_ray.runtime.device import actor_environment
from r2m_ray.runtime.recovery import Once
from r2m_ray.runtime.roles import PolicyRole, ReferenceRole, RewardRole, RolloutRole
from r2m_ray.runtime.start import policy_width
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
    cluster = config.cluster
    os.environ.update(actor_environment(config, cluster.gpus_per_learner))
    torch.set_num_threads(cluster.threads_per_actor)
    disable_progress_bar()
    address = _free_address()
    exports = config.uses_feedback and config.feedback.source is FeedbackSource.rollout
    width = policy_width(models.policy) if config.uses_feedback else 0

    policy, rollout = PolicyActor(held), RolloutActor(held)
    reward, reference = RewardActor(held), ReferenceActor(held)
    policy.start(config, models.policy, 0, address, cluster.gpus_per_learner)
    rollout.start(config, models.policy, exports)
    reward.start(config, models.reward, width, 0, address, cluster.gpus_per_reward)
    reference.start(config, models.reference, cluster.gpus_per_reference)

    learner, engine = LocalWorker("policy-0", policy), LocalWorker("rollout-0", rollout)
    frozen = LocalWorker("reference-0", reference)
    policy_role = PolicyRole(learner, config)
    sampler: Rollout = RolloutRole(engine, Once(engine))
    if config.feedback.source is FeedbackSource.learner:
        sampler = LearnerFeedback(sampler, policy_role)
    return Roles(
        rollout=sampler,
        policy=policy_role,
        reference=ReferenceRole(frozen, Once(frozen)),
        reward=RewardRole(LocalWorker("reward-0", reward), verify_every=config.sync.verify_every),
        sync=ObjectStoreSync(config.sync, policy=learner, rollout=engine),
        share=Ref,
    )


def held(refs: Iterable[Ref[Any]]) -> list[Any]:
    """The records that references hold themselves."""
    return [ref.handle for ref in refs]


async def _answered(answer: Any) -> Any:
    return answer


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", int(probe.getsockname()[1])
