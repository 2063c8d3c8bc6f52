"""All actors of a run, started, and the roles they play."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from transformers import AutoConfig

from r2m_ray.config.schema import Config, FeedbackSource
from r2m_ray.core.roles import Ref, Roles, Rollout, WeightSync
from r2m_ray.driver.feedback import LearnerFeedback
from r2m_ray.runtime.actors import PolicyActor, ReferenceActor, RewardActor, RolloutActor
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import InPlace, Notify, Redo, ReliableSync, replace
from r2m_ray.runtime.roles import PolicyRole, ReferenceRole, RewardRole, RolloutRole
from r2m_ray.runtime.weight_sync import weight_sync
from r2m_ray.runtime.worker_group import Arguments, WorkerGroup, together
from r2m_ray.runtime.workers import Workers
from r2m_ray.tasks.models import Models


def start_arguments(config: Config, models: Models) -> dict[str, tuple[type, Arguments]]:
    """The worker class of each role, and the arguments of its ``start`` by rank and rendezvous address."""
    cluster = config.cluster
    exports = config.uses_feedback and config.feedback.source is FeedbackSource.rollout
    policy = AutoConfig.from_pretrained(models.policy, trust_remote_code=False)
    width = int(policy.get_text_config().hidden_size) if config.uses_feedback else 0
    return {
        "policy": (
            PolicyActor,
            lambda rank, address: (config, models.policy, rank, address, cluster.gpus_per_learner),
        ),
        "rollout": (RolloutActor, lambda rank, address: (config, models.policy, exports)),
        "reward": (
            RewardActor,
            lambda rank, address: (config, models.reward, width, rank, address, cluster.gpus_per_reward),
        ),
        "reference": (
            ReferenceActor,
            lambda rank, address: (config, models.reference, cluster.gpus_per_reference),
        ),
    }


def played_by(
    workers: Mapping[str, Workers],
    config: Config,
    *,
    sync: WeightSync,
    sample: Redo,
    score: Redo,
    share: Callable[[Any], Ref[Any]],
) -> Roles:
    """The roles of a run.

    Args:
        workers: of each role.
        config: of the run.
        sync: carries weights from the learner to the rollout engines.
        sample: does the rollout engines' jobs.
        score: does the reference's jobs.
        share: puts a record of the driver where workers can read it.
    """
    policy = PolicyRole(workers["policy"], config)
    rollout: Rollout = RolloutRole(workers["rollout"], sample)
    if config.feedback.source is FeedbackSource.learner:
        rollout = LearnerFeedback(rollout, policy)
    return Roles(
        rollout=rollout,
        policy=policy,
        reference=ReferenceRole(workers["reference"], score),
        reward=RewardRole(workers["reward"], verify_every=config.sync.verify_every),
        sync=sync,
        share=share,
    )


class Crew:
    """The worker groups of a run, one for each role."""

    def __init__(self, config: Config, models: Models, placement: Placement, notify: Notify) -> None:
        self._config = config
        self._notify = notify
        self._groups = {
            role: WorkerGroup(
                role,
                actor_class,
                placement,
                arguments,
                start_timeout_s=config.cluster.start_timeout_s,
                phase_timeout_s=config.cluster.phase_timeout_s,
            )
            for role, (actor_class, arguments) in start_arguments(config, models).items()
        }

    async def rebuild(self) -> None:
        """Replace what has state, and whatever else a failure has interrupted on its way back."""
        stateless = [group for role in ("rollout", "reference") if (group := self._groups[role]).unready]
        await together(
            self._groups["policy"].replace(),
            self._groups["reward"].replace(),
            *(group.replace(sorted(group.unready)) for group in stateless),
        )

    async def start(self) -> Roles:
        """Start every engine side by side; returns the roles, which replace actors that are lost."""
        await together(*(group.start() for group in self._groups.values()))
        config, limit = self._config, self._config.cluster.max_recoveries
        actors = {role: group.actors for role, group in self._groups.items()}
        rollout, reference = self._groups["rollout"], self._groups["reference"]
        transfer = weight_sync(config, policy=actors["policy"], rollout=actors["rollout"])
        sync = ReliableSync(transfer, rollout, limit=limit, notify=self._notify)
        return played_by(
            actors,
            config,
            sync=sync,
            sample=InPlace(rollout, sync.revive, limit=limit),
            score=InPlace(reference, partial(replace, reference, notify=self._notify), limit=limit),
            share=lambda record: Ref(ray.put(record)),
        )
