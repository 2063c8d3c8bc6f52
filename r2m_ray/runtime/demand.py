"""How many actors a run has, what each one asks of the cluster, and whether a cluster can ever hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r2m_ray.config.schema import Config

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one role asks of the cluster: ``count`` actors of ``cpus`` and ``gpus`` each.

    An actor lies on one node, so the tensor-parallel ranks of an engine share a node.
    """

    role: str
    count: int
    cpus: float
    gpus: float

    def of(self, resource: str) -> float:
        """What one actor asks of ``CPU`` or ``GPU``."""
        return self.cpus if resource == "CPU" else self.gpus


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


def shortage(wanted: Sequence[Demand], nodes: Sequence[Mapping[str, float]], strategy: str) -> str | None:
    """What a cluster of ``nodes``, by their resources, can never give to the demands; None if nothing."""
    lines = []
    for resource in ("CPU", "GPU"):
        offers = [node.get(resource, 0.0) for node in nodes]
        total, largest = sum(d.count * d.of(resource) for d in wanted), max(offers, default=0.0)
        parts = ", ".join(f"{d.role} {d.count}×{d.of(resource):g}" for d in wanted)
        if total > sum(offers) + ROUNDING:
            lines.append(f"{resource}: {total:g} needed ({parts}), {sum(offers):g} in the cluster")
        elif strategy == "STRICT_PACK" and total > largest + ROUNDING:
            lines.append(f"{resource}: {total:g} needed on one node ({parts}), the largest has {largest:g}")
        elif largest + ROUNDING < max(d.of(resource) for d in wanted):
            lines.append(f"{resource}: an actor lies on one node, the largest has {largest:g} ({parts})")
    actors = sum(demand.count for demand in wanted)
    if strategy == "STRICT_SPREAD" and actors > len(nodes):
        lines.append(f"STRICT_SPREAD puts {actors} actors on as many nodes, {len(nodes)} in the cluster")
    return "; ".join(lines) or None
