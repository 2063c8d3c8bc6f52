"""All actors of a run, started, and the roles they play."""

from __future__ import annotations

from typing import Any

import ray
from transformers import AutoConfig

from r2m_ray.config.schema import Config, FeedbackSource
from r2m_ray.core.roles import Ref, Roles, Rollout
from r2m_ray.driver.feedback import LearnerFeedback
from r2m_ray.runtime.actors import PolicyActor, ReferenceActor, RewardActor, RolloutActor
from r2m_ray.runtime.device import Address
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import InPlace, Notify, ReliableSync, replace
from r2m_ray.runtime.roles import PolicyRole, ReferenceRole, RewardRole, RolloutRole
from r2m_ray.runtime.weight_sync import weight_sync
from r2m_ray.runtime.worker_group import Arguments, WorkerGroup, together
from r2m_ray.tasks.models import Models


class Crew:
    """The four teams of a run."""

    def __init__(self, config: Config, models: Models, placement: Placement, notify: Notify) -> None:
        self._config = config
        self._notify = notify
        cluster = config.cluster
        exports = config.uses_feedback and config.feedback.source is FeedbackSource.rollout
        width = policy_width(models.policy) if config.uses_feedback else 0

        def policy(rank: int, meeting: Address) -> tuple[Any, ...]:
            return config, models.policy, rank, meeting, cluster.gpus_per_learner

        def rollout(rank: int, _: Address) -> tuple[Any, ...]:
            return config, models.policy, exports

        def reward(rank: int, meeting: Address) -> tuple[Any, ...]:
            return config, models.reward, width, rank, meeting, cluster.gpus_per_reward

        def reference(rank: int, _: Address) -> tuple[Any, ...]:
            return config, models.reference, cluster.gpus_per_reference

        def team(role: str, actor_class: type, arguments: Arguments) -> WorkerGroup:
            return WorkerGroup(
                role,
                actor_class,
                placement,
                arguments,
                start_timeout_s=cluster.start_timeout_s,
                phase_timeout_s=cluster.phase_timeout_s,
            )

        self.policy = team("policy", PolicyActor, policy)
        self.rollout = team("rollout", RolloutActor, rollout)
        self.reward = team("reward", RewardActor, reward)
        self.reference = team("reference", ReferenceActor, reference)

    async def rebuild(self) -> None:
        """Replace what has state, and whatever else a failure has interrupted on its way back."""
        stateless = [team for team in (self.rollout, self.reference) if team.unready]
        await together(
            self.policy.replace(),
            self.reward.replace(),
            *(team.replace(sorted(team.unready)) for team in stateless),
        )

    async def start(self) -> Roles:
        """Start every engine side by side; returns the roles, which replace actors that are lost."""
        await together(*(t.start() for t in (self.policy, self.rollout, self.reward, self.reference)))
        config, limit = self._config, self._config.cluster.max_recoveries
        sync = ReliableSync(
            weight_sync(config, policy=self.policy.actors, rollout=self.rollout.actors),
            self.rollout,
            limit=limit,
            notify=self._notify,
        )
        policy = PolicyRole(self.policy.actors, config)
        sampler: Rollout = RolloutRole(self.rollout.actors, InPlace(self.rollout, sync.revive, limit=limit))
        if config.feedback.source is FeedbackSource.learner:
            sampler = LearnerFeedback(sampler, policy)
        return Roles(
            rollout=sampler,
            policy=policy,
            reference=ReferenceRole(
                self.reference.actors,
                InPlace(
                    self.reference, lambda lost: replace(self.reference, lost, self._notify), limit=limit
                ),
            ),
            reward=RewardRole(self.reward.actors, verify_every=config.sync.verify_every),
            sync=sync,
            share=lambda record: Ref(ray.put(record)),
        )


def policy_width(model: str) -> int:
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return int(config.get_text_config().hidden_size)
