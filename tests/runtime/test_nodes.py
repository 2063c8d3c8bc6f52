"""Placement over several raylets of this machine: who shares a node, and who waits for a dead one."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMON = """
import asyncio, ray
from ray.cluster_utils import Cluster
from r2m_ray.config.schema import Config
from r2m_ray.runtime.placement import Placement

made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [made.add_node(num_cpus=4) for _ in range(3)]
ray.init(made.address, logging_level="ERROR")
config = Config()
config.cluster.cpus_per_actor = 1.0
config.policy.ranks, config.rollout.replicas, config.reward.replicas = 4, 3, 2

class Worker:
    def where(self):
        return ray.get_runtime_context().get_node_id()

def ids(placement, role):
    return [placement.node(role, rank) for rank in range(placement.count(role))]
"""
SHARED = """
placement = Placement(config)
print(len(set(ids(placement, "policy"))))
placement.release()
"""
LOST = """
config.policy.ranks, config.rollout.replicas, config.reward.replicas = 1, 3, 1
config.cluster.placement = "SPREAD"
placement = Placement(config)
victim = next(n for n in nodes if n.node_id in ids(placement, "rollout"))
rank = ids(placement, "rollout").index(victim.node_id)
before = placement.spawn(Worker, "rollout", rank)
assert ray.get(before.where.remote(), timeout=120) == victim.node_id
made.remove_node(victim, allow_graceful=False)
asyncio.run(placement.settled("rollout", [rank]))
after = placement.spawn(Worker, "rollout", rank)
print(ray.get(after.where.remote(), timeout=120) != victim.node_id)
"""


def printed(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_learner_ranks_share_a_node_where_they_fit() -> None:
    assert printed(SHARED) == "1"


def test_a_successor_does_not_start_on_a_node_that_is_dead_and_not_yet_known_to_be() -> None:
    assert printed(LOST) == "True"
