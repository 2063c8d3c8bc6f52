"""Policy feedback from the learner instead of the rollout engine (``feedback.source=learner``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r2m_ray.core.batch import Hidden, RowText, SampledRows, SamplePlan, Trajectories
from r2m_ray.core.roles import Policy, Ref, Rollout, Shards


@dataclass(frozen=True, slots=True)
class LearnerFeedback:
    """A rollout whose h comes from the learner's own pass over the sampled rows, π_old at that moment."""

    rollout: Rollout
    policy: Policy

    async def sample(
        self, plans: Sequence[SamplePlan]
    ) -> tuple[Sequence[SampledRows], Shards[Trajectories], Shards[Hidden]]:
        """The rollout's rows, with h by the learner."""
        rows, trajectories, _ = await self.rollout.sample(plans)
        return rows, trajectories, await self.policy.hidden(trajectories)

    async def texts(self, trajectories: Ref[Trajectories], rows: int) -> Sequence[RowText]:
        """As the rollout has them."""
        return await self.rollout.texts(trajectories, rows)
