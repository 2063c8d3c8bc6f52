"""Weight sync from GPU to GPU by vLLM's own transfer engines: ``sync.backend=nccl`` or ``ipc``.

``nccl`` broadcasts from learner rank 0 to every engine; ``ipc`` shares memory between processes on the
same GPUs. Versions and the quarantine of a torn update are those of the object-store path. The learner ranks
are compared with one another, every ``sync.verify_every`` steps; with the engines they are not, since no
bytes pass through a place where both sides could hash them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Stats
from r2m_ray.runtime.agreement import require_agreement
from r2m_ray.runtime.worker_group import Actors

PHASE = "weight sync"


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
