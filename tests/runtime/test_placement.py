"""What a run asks of a cluster, and what it says when the cluster cannot give it."""

from __future__ import annotations

import time

import pytest
import ray

from r2m_ray.config.schema import Config
from r2m_ray.errors import RunError
from r2m_ray.runtime.demand import Demand, demands, shortage
from r2m_ray.runtime.placement import Placement


def test_every_role_is_demanded_once_per_actor() -> None:
    config = Config()
    config.policy.ranks, config.rollout.replicas, config.reward.replicas = 4, 3, 2
    config.cluster.gpus_per_learner, config.cluster.gpus_per_rollout = 1.0, 0.5
    found = {d.role: (d.count, d.gpus) for d in demands(config)}
    assert found == {"policy": (4, 1.0), "rollout": (3, 0.5), "reward": (2, 0.0), "reference": (1, 0.0)}


def test_a_shortage_is_reported_with_numbers_and_roles() -> None:
    wanted = [
        Demand(role="policy", count=2, cpus=1, gpus=1.0),
        Demand(role="rollout", count=1, cpus=1, gpus=0.5),
    ]
    assert shortage(wanted, [{"CPU": 3.0, "GPU": 2.5}], "STRICT_PACK") is None
    assert shortage(wanted, [{"CPU": 2.0}], "PACK") == (
        "CPU: 3 needed (policy 2×1, rollout 1×1), 2 in the cluster; "
        "GPU: 2.5 needed (policy 2×1, rollout 1×0.5), 0 in the cluster"
    )


@pytest.mark.parametrize(
    ("strategy", "nodes", "words"),
    [
        ("PACK", 3, None),
        ("SPREAD", 3, None),
        ("STRICT_SPREAD", 3, "STRICT_SPREAD puts 5 actors on as many nodes, 3 in the cluster"),
        ("STRICT_SPREAD", 5, None),
        ("STRICT_PACK", 3, "CPU: 5 needed on one node (policy 3×1, rollout 2×1), the largest has 4"),
    ],
)
def test_a_strategy_that_can_never_be_met_is_known(strategy: str, nodes: int, words: str | None) -> None:
    wanted = [Demand(role=r, count=n, cpus=1, gpus=0.0) for r, n in (("policy", 3), ("rollout", 2))]
    assert shortage(wanted, nodes * [{"CPU": 4.0}], strategy) == words


def test_an_engine_larger_than_every_node_is_known() -> None:
    wanted = [Demand(role="rollout", count=1, cpus=1, gpus=8.0)]
    assert shortage(wanted, 2 * [{"CPU": 8.0, "GPU": 4.0}], "PACK") == (
        "GPU: an actor lies on one node, the largest has 4 (rollout 1×8)"
    )


def test_spread_over_too_few_nodes_is_refused_at_once(local_cluster: None) -> None:
    config = Config()
    config.cluster.placement = "STRICT_SPREAD"
    start = time.monotonic()
    with pytest.raises(RunError, match=r"4 actors on as many nodes, 1 in the cluster.*placement=PACK"):
        Placement(config)
    assert time.monotonic() - start < 0.1 * config.cluster.start_timeout_s


def test_a_cluster_that_is_too_small_is_refused_at_once(local_cluster: None) -> None:
    config = Config()
    config.cluster.gpus_per_learner = 1.0
    with pytest.raises(RunError, match=r"GPU: 1 needed \(policy 1×1.*0 in the cluster.*Lower"):
        Placement(config)


def test_a_released_placement_gives_its_resources_back(local_cluster: None) -> None:
    class Idle:
        def ready(self) -> bool:
            return True

    config = Config()
    config.cluster.cpus_per_actor = 0.5
    # Four actors of half a CPU fill the cluster; a second placement fits only after the first is gone.
    for _ in range(2):
        placement = Placement(config)
        actor = placement.spawn(Idle, "rollout", 0)
        assert ray.get(actor.ready.remote(), timeout=60)
        placement.release()
