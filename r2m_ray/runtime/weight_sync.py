"""The one place that carries weights from the learner into the rollout engines.

The learner packs parameters into buckets; each travels once through the object store to every
engine, while the learner packs the next. Every batch sampled afterwards carries the version, and
a sha256 over all buckets is compared on both sides, and between all learner ranks, at the first
sync, after a recovery, and every ``sync.verify_every`` steps. A failed sync leaves the engines
quarantined: they refuse to sample until one completes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from r2m_ray.config.schema import Config, SyncBackend, SyncConfig
from r2m_ray.core.roles import Ref, Stats, WeightSync
from r2m_ray.runtime.agreement import require_agreement
from r2m_ray.runtime.direct_sync import DirectSync
from r2m_ray.runtime.worker_group import Actors
from r2m_ray.runtime.workers import Workers

PHASE = "weight sync"


def weight_sync(config: Config, *, policy: Actors, rollout: Actors) -> WeightSync:
    """The sync that ``sync.backend`` names."""
    if config.sync.backend is SyncBackend.object_store:
        return ObjectStoreSync(config.sync, policy=policy, rollout=rollout)
    return DirectSync(config, policy=policy, rollout=rollout)


class ObjectStoreSync:
    """Weight sync through Ray's object store; works on any device."""

    def __init__(self, config: SyncConfig, *, policy: Workers, rollout: Workers) -> None:
        self._bucket_bytes = config.bucket_mb * 2**20
        self._verify_every = config.verify_every
        self._policy = policy
        self._rollout = rollout
        self._last: int | None = None

    async def __call__(self, *, version: int) -> Stats:
        start = time.monotonic()
        due = self._verify_every > 0 and version % self._verify_every == 0
        # A version that comes again, or an older one, is for actors that replace others.
        verify = self._last is None or version <= self._last or due
        await asyncio.gather(
            self._rollout.all(PHASE, "begin_weight_update", verify),
            self._policy.all(PHASE, "begin_weights", self._bucket_bytes, verify),
        )
        sent, buckets = 0, 0
        upcoming = asyncio.ensure_future(self._next_bucket())
        while True:
            size, bucket = await upcoming
            if size is None:
                break
            upcoming = asyncio.ensure_future(self._next_bucket())
            await self._rollout.all(PHASE, "load_bucket", bucket)
            sent, buckets = sent + size, buckets + 1
        digests = await self._policy.all(PHASE, "weight_digest")
        if len(set(digests)) > 1:
            await require_agreement(self._policy, PHASE, "weight_digests")
        await self._rollout.all(PHASE, "finish_weight_update", version, digests[0])
        self._last = version
        return {
            "bytes": float(sent),
            "buckets": float(buckets),
            "verified": float(verify),
            "time/transfer": time.monotonic() - start,
        }

    async def _next_bucket(self) -> tuple[int | None, Ref[Any]]:
        """Size and reference of the next bucket; every rank takes part, rank 0 holds the data."""
        sent = [self._policy.submit(rank, "next_bucket", returns=2) for rank in range(len(self._policy))]
        sizes = await self._policy.settle(PHASE, [call for call, _ in sent])
        _, (bucket,) = sent[0]
        return sizes[0], bucket
