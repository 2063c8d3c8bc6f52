"""Policy feedback from the learner instead of the rollout engine (``feedback.source=learner``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r2m_ray.core.batch import Hidden, SamplePlan, Trajectories
from r2m_ray.core.roles import Policy, Rollout, Shards


@dataclass(frozen=True, slots=True)
class LearnerFeedback:
    """A rollout whose h comes from the learner's own pass over the sampled rows, π_old at that moment."""

    rollout: Rollout
    policy: Policy

    async def sample(self, plans: Sequence[SamplePlan]) -> tuple[Shards[Trajectories], Shards[Hidden]]:
        trajectories, _ = await self.rollout.sample(plans)
        return trajectories, await self.policy.hidden(trajectories)
