"""Where each actor of a run goes on the cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from r2m_ray.config.schema import Config, SyncBackend
from r2m_ray.engines.faults import ACTOR, fault_environment
from r2m_ray.errors import RunError
from r2m_ray.runtime.demand import demands, shortage
from r2m_ray.runtime.device import actor_environment

CONNECT_S = 2.0
"""Until a node must have accepted a connection."""
POLL_S = 0.5


class Placement:
    """A place for every actor of the run, or for none.

    With PACK, learner ranks are packed by themselves, so that they share nodes as far as they fit: no other
    role exchanges as much between its actors.

    Raises: RunError, where the cluster can never hold the run, or has no room before
    ``cluster.start_timeout_s``.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        wanted = demands(config)
        self._demands = {demand.role: demand for demand in wanted}
        strategy = str(config.cluster.placement)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        lacking = shortage(wanted, [node["Resources"] for node in nodes], strategy)
        if lacking:
            raise RunError(
                f"The cluster is too small for this run: {lacking}. "
                "Lower the role's replicas or cluster.gpus_per_*/cpus_per_actor, add nodes, or use "
                "cluster.placement=PACK."
            )
        # Weights by ipc need learner and engine on one GPU, so these stay in one group.
        apart = strategy == "PACK" and config.sync.backend is not SyncBackend.ipc
        parts = [wanted[:1], wanted[1:]] if apart else [wanted]
        bundles = [[{"CPU": d.cpus, "GPU": d.gpus} for d in p for _ in range(d.count)] for p in parts]
        self._groups: list[PlacementGroup] = [placement_group(b, strategy=strategy) for b in bundles]
        actors = [[(d.role, rank) for d in p for rank in range(d.count)] for p in parts]
        self._places = {
            actor: (group, bundle)
            for group, part in zip(self._groups, actors, strict=True)
            for bundle, actor in enumerate(part)
        }
        deadline = time.monotonic() + config.cluster.start_timeout_s
        if not all(group.wait(max(deadline - time.monotonic(), 0.0)) for group in self._groups):
            self.release()
            raise RunError(
                f"{sum(map(len, bundles))} actors found no place within {config.cluster.start_timeout_s:g} s "
                f"(cluster.placement={strategy}): {ray.cluster_resources()} exist, "
                f"{ray.available_resources()} are free. Stop other jobs or use cluster.placement=SPREAD."
            )

    def count(self, role: str) -> int:
        """How many actors the role has."""
        return self._demands[role].count

    def spawn(self, actor_class: type, role: str, rank: int) -> Any:
        """Start one actor of a role in its bundle, which whoever had it before must have left."""
        demand, (group, bundle) = self._demands[role], self._places[role, rank]
        environment = actor_environment(self._config, demand.gpus)
        return (
            ray.remote(actor_class)
            .options(
                num_cpus=demand.cpus,
                num_gpus=demand.gpus,
                runtime_env={"env_vars": {**environment, **fault_environment(), ACTOR: f"{role}-{rank}"}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
        )

    def node(self, role: str, rank: int) -> str:
        """The id of the node where an actor's bundle lies; empty while Ray is moving it."""
        group, bundle = self._places[role, rank]
        return str(placement_group_table(group)["bundles_to_node_id"].get(bundle, ""))

    async def settled(self, role: str, ranks: Sequence[int]) -> None:
        """Wait until no bundle of these ranks lies on a node that cannot be reached.

        Ray needs up to half a minute to find a node dead, and then moves its bundles. A successor that starts
        before would start on the dead node, and be lost as well. The wait ends after
        ``cluster.start_timeout_s`` in any case: then the start of the successor fails, and says so.
        """
        deadline = time.monotonic() + self._config.cluster.start_timeout_s
        for rank in ranks:
            while time.monotonic() < deadline:
                nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
                node = nodes.get(self.node(role, rank))
                if node and await _reachable(node["NodeManagerAddress"], node["NodeManagerPort"]):
                    break
                await asyncio.sleep(POLL_S)

    def release(self) -> None:
        """End every actor of the run and give its place back."""
        for group in self._groups:
            remove_placement_group(group)


async def _reachable(address: str, port: int) -> bool:
    """Whether a node's raylet accepts connections."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(address, port)
        writer.close()
        return True
    return False
