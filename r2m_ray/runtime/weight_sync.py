"""The one place that carries weights from the learner into the rollout engines.

``sync.backend=object_store``: the learner packs parameters into buckets. Each travels once through the object
store to every engine, while the learner packs the next. A sha256 over all buckets is compared on both sides,
and between all learner ranks, at the first sync, after a recovery, and every ``sync.verify_every`` steps.

``nccl`` and ``ipc``: vLLM's own transfer engines send from GPU to GPU. ``nccl`` broadcasts from learner rank
0 to every engine; ``ipc`` shares memory between processes on the same GPUs. The learner ranks are compared
with one another every ``sync.verify_every`` steps; with the engines they are not, because no bytes pass
through a place where both sides could hash them.

Either way, every batch sampled afterwards carries the version, and a failed sync leaves the engines
quarantined: they refuse to sample until one completes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from r2m_ray.config.schema import Config, SyncBackend, SyncConfig
from r2m_ray.core.roles import Ref, Stats, WeightSync
from r2m_ray.runtime.worker_group import Actors, require_agreement
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


class EngineClient:
    """Rollout engines as vLLM's trainer side addresses them; lives in the learner's rank 0."""

    def __init__(self, engines: Sequence[Any], *, ranks_per_engine: int, timeout_s: float) -> None:
        self._engines = engines
        self._ranks = ranks_per_engine
        self._timeout_s = timeout_s
        self.version = 0

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Let every engine join; in a group with ranks, each gets its own after the sender's 0."""
        infos = [dict(init_info) for _ in self._engines]
        for i, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] = 1 + i * self._ranks
        self._wait(
            [e.init_weight_transfer.remote(info) for e, info in zip(self._engines, infos, strict=True)]
        )

    def start_weight_update(self) -> None:
        self._wait([engine.begin_weight_update.remote(False) for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        self._wait([engine.receive_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait([engine.finish_weight_update.remote(self.version, None) for engine in self._engines])

    def _wait(self, calls: list[Any]) -> None:
        ray.get(calls, timeout=self._timeout_s)


class DirectSync:
    """A weight sync that vLLM drives from inside the learner ranks."""

    def __init__(self, config: Config, *, policy: Actors, rollout: Actors) -> None:
        self._config = config
        self._policy = policy
        self._rollout = rollout
        self._members: list[Any] = []

    async def __call__(self, *, version: int) -> Stats:
        start = time.monotonic()
        every = self._config.sync.verify_every
        if len(self._policy) > 1 and every and version % every == 0:
            await require_agreement(self._policy, PHASE, "weight_digests")
        # A dead engine is blamed before the learner that would wait for it.
        await self._rollout.all(PHASE, "ready")
        members = [*self._policy.handles, *self._rollout.handles]
        if members != self._members:
            address = (await self._policy.all(PHASE, "address"))[0]
            await self._policy.all(PHASE, "join_transfer", self._config, self._rollout.handles, address)
            self._members = members
        await self._policy.all(PHASE, "send_weights", version)
        return {"time/transfer": time.monotonic() - start}
