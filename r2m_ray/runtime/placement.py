"""How many actors a run needs, whether the cluster can hold them, and where each one goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from r2m_ray.config.schema import Config
from r2m_ray.engines.faults import ACTOR, fault_environment
from r2m_ray.errors import RunError
from r2m_ray.runtime.device import actor_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one role asks of the cluster: ``count`` actors of ``cpus`` and ``gpus`` each."""

    role: str
    count: int
    cpus: float
    gpus: float


def demands(config: Config) -> list[Demand]:
    """The demand of every role, in the order in which bundles are laid out."""
    cluster = config.cluster
    counts = {
        "policy": (config.policy.ranks, cluster.gpus_per_learner),
        "rollout": (config.rollout.replicas, cluster.gpus_per_rollout),
        "reward": (config.reward.replicas, cluster.gpus_per_reward),
        "reference": (config.reference.replicas, cluster.gpus_per_reference),
    }
    return [
        Demand(role=role, count=count, cpus=cluster.cpus_per_actor, gpus=gpus)
        for role, (count, gpus) in counts.items()
    ]


def shortage(wanted: list[Demand], resources: Mapping[str, float]) -> str | None:
    """What the cluster lacks for the demands, in words; None if nothing."""
    lines = []
    for resource, total in (
        ("CPU", sum(d.count * d.cpus for d in wanted)),
        ("GPU", sum(d.count * d.gpus for d in wanted)),
    ):
        available = resources.get(resource, 0.0)
        if total > available + 1e-9:
            parts = ", ".join(
                f"{d.role} {d.count}×{d.cpus if resource == 'CPU' else d.gpus:g}" for d in wanted
            )
            lines.append(f"{resource}: {total:g} needed ({parts}), {available:g} in the cluster")
    return "; ".join(lines) or None


class Placement:
    """One placement group for the whole run: every actor gets its place, or none does."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._demands = demands(config)
        lacking = shortage(self._demands, ray.cluster_resources())
        if lacking:
            raise RunError(
                f"The cluster is too small for this run: {lacking}. "
                "Lower the role's replicas or cluster.gpus_per_*/cpus_per_actor, or add nodes."
            )
        bundles = [{"CPU": d.cpus, "GPU": d.gpus} for d in self._demands for _ in range(d.count)]
        self._group: PlacementGroup = placement_group(bundles, strategy=config.cluster.placement)
        if not self._group.wait(config.cluster.start_timeout_s):
            self.release()
            raise RunError(
                f"{len(bundles)} actors found no place within {config.cluster.start_timeout_s:g} s "
                f"(cluster.placement={config.cluster.placement}): {ray.cluster_resources()} exist, "
                f"{ray.available_resources()} are free. Stop other jobs or use cluster.placement=SPREAD."
            )

    def count(self, role: str) -> int:
        """How many actors the role has."""
        return next(demand.count for demand in self._demands if demand.role == role)

    def spawn(self, actor_class: type, role: str, rank: int) -> Any:
        """Start one actor of a role in its bundle, which whoever had it before must have left."""
        places = [demand for demand in self._demands for _ in range(demand.count)]
        bundle = [i for i, demand in enumerate(places) if demand.role == role][rank]
        environment = actor_environment(self._config, places[bundle].gpus)
        return (
            ray.remote(actor_class)
            .options(
                num_cpus=places[bundle].cpus,
                num_gpus=places[bundle].gpus,
                runtime_env={"env_vars": {**environment, **fault_environment(), ACTOR: f"{role}-{rank}"}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
        )

    def release(self) -> None:
        """End every actor of the run and give its place back."""
        remove_placement_group(self._group)
