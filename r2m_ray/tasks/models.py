"""Which pretrained models a run uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r2m_ray.config.schema import PREPARED, Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Directories or hub ids of the three pretrained models of a run."""

    policy: str
    reward: str
    reference: str

    @classmethod
    def of(cls, config: Config) -> Models:
        """The models that a config names; ``prepared`` stands for what ``r2m-ray prepare`` made for it."""
        policy, reward = config.model.policy, config.model.reward
        if PREPARED in (policy, reward):
            from r2m_ray.tasks.prepare.store import locate

            prepared = locate(config)
            policy = str(prepared.policy_dir) if policy == PREPARED else policy
            reward = str(prepared.reward_dir) if reward == PREPARED else reward
        names = (policy, reward, config.model.reference or policy)
        # Actors have working directories of their own.
        found = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in names]
        return cls(policy=found[0], reward=found[1], reference=found[2])
