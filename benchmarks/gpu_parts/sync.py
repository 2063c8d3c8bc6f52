"""Weight sync by object store and by shared memory (ipc): equal weights at the end, seconds and bytes.

The rollout engine starts with other weights than the learner and samples between the syncs. So each sync
must bring all weights, and must reset the prefix cache of an engine that schedules asynchronously; states
from a prefix of the old weights would be far from transformers'. Whether the engines of the two backends then
sample equal rows, to the bit, is reported; a GPU does not promise it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import ray
import torch
from gpu_parts import setup
from gpu_parts.export import compared_states

from r2m_ray.config.schema import Config, SyncBackend
from r2m_ray.core.batch import Hidden, SamplePlan, Trajectories
from r2m_ray.runtime.actors import PolicyActor, RolloutActor
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import Once
from r2m_ray.runtime.roles import RolloutRole
from r2m_ray.runtime.weight_sync import weight_sync
from r2m_ray.runtime.worker_group import WorkerGroup, together


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Every backend that this machine has, one after the other; what it has not is named."""
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    absent = {"nccl": "nccl sends between GPUs; run two nodes or two GPUs by r2m-ray itself"}
    if not gpus:
        absent["ipc"] = "ipc shares the memory of one GPU, and there is none here"
    backends = [backend.value for backend in SyncBackend if backend.value not in absent]
    old, new = setup.policy_dir(scratch, sizes), setup.policy_dir(scratch, sizes, seed=1)
    plans = [setup.plan(sizes)]
    configs = {
        name: setup.run_config(scratch, sizes, f"sync.backend={name}", "sync.verify_every=2", share=0.2)
        for name in backends
    }
    found, sampled = {}, {}
    with cluster(configs["object_store"].cluster):
        for name, config in configs.items():
            found[name], sampled[name] = asyncio.run(_synced(config, old, new, plans, sizes.syncs))
    for name, (rows, hidden) in sampled.items():
        saved = {"input_T": rows.input_T, "offsets": rows.layout.offsets, "hidden_TP": hidden.hidden_TP}
        found[name]["exactness"] = compared_states(new, sizes, saved)
    exact = all(result["exactness"]["within_rounding"] for result in found.values())
    return {
        "passed": exact and all(result["weights_arrived"] for result in found.values()),
        "backends": found,
        "absent": absent,
        "backends_sample_equal_rows": len({_digest(*batch) for batch in sampled.values()}) == 1,
    }


async def _synced(
    config: Config, old: Path, new: Path, plans: Sequence[SamplePlan], repeats: int
) -> tuple[dict[str, Any], tuple[Trajectories, Hidden]]:
    """Sync `new` into an engine that began with `old`, sampling before and after each sync."""
    placement = Placement(config)
    limits = {
        "start_timeout_s": config.cluster.start_timeout_s,
        "phase_timeout_s": config.cluster.phase_timeout_s,
    }
    try:
        policy = WorkerGroup(
            "policy",
            PolicyActor,
            placement,
            lambda rank, meeting: (config, str(new), rank, meeting, config.cluster.gpus_per_learner),
            **limits,
        )
        rollout = WorkerGroup(
            "rollout", RolloutActor, placement, lambda rank, _: (config, str(old), True), **limits
        )
        await together(policy.start(), rollout.start())
        sync = weight_sync(config, policy=policy.actors, rollout=rollout.actors)
        sampler = RolloutRole(rollout.actors, Once(rollout.actors))
        before = _digest(*await _sampled(sampler, plans))
        times: dict[bool, list[float]] = {True: [], False: []}
        digests = set()
        for version in range(2 * repeats + 1):
            start = time.perf_counter()
            stats = await sync(version=version)
            seconds = time.perf_counter() - start
            if version:  # The first one joins and warms up.
                times[bool(stats.get("verified"))].append(seconds)
            rows, hidden = await _sampled(sampler, plans)
            if rows.version != version:
                raise RuntimeError(f"rows of version {rows.version} after the sync of {version}")
            digests.add(_digest(rows, hidden))
    finally:
        placement.release()
    return {
        "bytes": stats.get("bytes"),
        "seconds": {
            name: measure.summary(times[verified])
            for name, verified in (("with_digest", True), ("without_digest", False))
            if times[verified]
        },
        "digests_equal": len(times[True]) if config.sync.backend is SyncBackend.object_store else None,
        "prefix_cache_resets": 2 * repeats + 1,
        "weights_arrived": before not in digests,
        "batches_equal": len(digests) == 1,
    }, (rows, hidden)


async def _sampled(sampler: RolloutRole, plans: Sequence[SamplePlan]) -> tuple[Trajectories, Hidden]:
    _, (rows,), (hidden,) = await sampler.sample(plans)
    return ray.get(rows.handle), ray.get(hidden.handle)


def _digest(rows: Trajectories, hidden: Hidden) -> str:
    """sha256 of the sampled tokens, their log-probs and their states."""
    digest = hashlib.sha256()
    for tensor in (rows.label_T, rows.rollout_logp_T, hidden.hidden_TP):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
