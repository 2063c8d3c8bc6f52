"""What a run asks of a cluster, and what it says when the cluster cannot give it."""

from __future__ import annotations

import pytest
import ray

from r2m_ray.config.schema import Config
from r2m_ray.errors import RunError
from r2m_ray.runtime.placement import Demand, Placement, demands, shortage


def test_every_role_is_demanded_once_per_actor() -> None:
    config = Config()
    config.policy.ranks, config.rollout.replicas, config.reward.replicas = 4, 3, 2
    config.cluster.gpus_per_learner, config.cluster.gpus_per_rollout = 1.0, 0.5
    found = {d.role: (d.count, d.gpus) for d in demands(config)}
    assert found == {"policy": (4, 1.0), "rollout": (3, 0.5), "reward": (2, 0.0), "reference": (1, 0.0)}


def test_a_shortage_is_told_with_numbers_and_roles() -> None:
    wanted = [
        Demand(role="policy", count=2, cpus=1, gpus=1.0),
        Demand(role="rollout", count=1, cpus=1, gpus=0.5),
    ]
    assert shortage(wanted, {"CPU": 3.0, "GPU": 2.5}) is None
    told = shortage(wanted, {"CPU": 2.0})
    assert told == (
        "CPU: 3 needed (policy 2×1, rollout 1×1), 2 in the cluster; "
        "GPU: 2.5 needed (policy 2×1, rollout 1×0.5), 0 in the cluster"
    )


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
