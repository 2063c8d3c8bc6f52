"""What runs inside each Ray actor: an engine, started once its peers are known, and nothing else.

Every method returns something light first and the heavy records after it as separate objects, so
the driver can wait for the light part without pulling a tensor through its own node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import (
    Annotation,
    Hidden,
    PolicyBatch,
    ReferenceLogprobs,
    RewardBatch,
    SamplePlan,
    Trajectories,
)
from r2m_ray.engines.faults import reach
from r2m_ray.engines.weights import WeightBucket, WeightDigest
from r2m_ray.runtime.device import device_of, free_address, join_environment
from r2m_ray.runtime.weight_sync import EngineClient
from r2m_ray.runtime.worker_group import raises_peers_lost


class RolloutActor:
    """A vLLM engine."""

    def start(self, config: Config, model_dir: str, export_hidden: bool) -> None:
        from r2m_ray.engines.rollout.engine import RolloutEngine

        self._engine = RolloutEngine(
            model_dir=model_dir,
            dtype=config.model.dtype.value,
            seed=config.run.seed,
            max_model_len=config.task.max_prompt_tokens + config.task.max_new_tokens,
            export_hidden=export_hidden,
            engine_args=config.rollout.engine_args,
            weight_backend=config.sync.backend.value,
        )

    def sample(self, plans: Sequence[SamplePlan]) -> tuple[Any, ...]:
        """One (light) count of tokens, then Trajectories and Hidden of each plan in turn."""
        reach("sample", plans[0].step)
        shards = self._engine.sample(plans)
        tokens = sum(int(trajectories.action_T.sum()) for trajectories, _ in shards)
        return tokens, *(record for shard in shards for record in shard)

    def ready(self) -> None:
        """Answer, and so show that this process lives."""

    def begin_weight_update(self, verify: bool) -> None:
        self._engine.begin_weight_update(verify=verify)

    def load_bucket(self, bucket: WeightBucket) -> None:
        reach("load_bucket")
        self._engine.load_bucket(bucket)

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        self._engine.init_weight_transfer(init_info)

    def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        self._engine.receive_weights(update_info)

    def finish_weight_update(self, version: int, digest: str | None) -> None:
        self._engine.finish_weight_update(version=version, digest=digest)


@raises_peers_lost
class PolicyActor:
    """One rank of the DeepSpeed learner."""

    def address(self) -> tuple[str, int]:
        return free_address()

    def start(self, config: Config, model_dir: str, rank: int, address: tuple[str, int], gpus: float) -> None:
        from r2m_ray.engines.policy.learner import PolicyLearner

        self._rank = rank
        join_environment(rank, config.policy.ranks, address)
        self._learner = PolicyLearner(
            config=config,
            model_dir=model_dir,
            rank=rank,
            world_size=config.policy.ranks,
            device=device_of(gpus),
        )

    def update(self, shard_ids: Sequence[int], advantage: Sequence[torch.Tensor], *records: Any) -> Any:
        """Stats, then each shard's fresh Hidden if any; records are Trajectories, then ReferenceLogprobs."""
        count = len(shard_ids)
        trajectories: Sequence[Trajectories] = records[:count]
        reference: Sequence[ReferenceLogprobs] = records[count:]
        reach("update", trajectories[0].version + 1 if trajectories else None)
        batches = [
            PolicyBatch(trajectories=t, advantage_N=a, reference=r)
            for t, a, r in zip(trajectories, advantage, reference, strict=True)
        ]
        stats, hidden = self._learner.update(batches, shard_ids)
        return (stats, *hidden) if hidden else stats

    def hidden(self, *trajectories: Trajectories) -> tuple[Any, ...]:
        return len(trajectories), *self._learner.hidden(trajectories)

    def begin_weights(self, bucket_bytes: int, digest: bool) -> None:
        """Begin a pass over all weights; rank 0 sends them, the other ranks take part and may hash them."""
        self._buckets = self._learner.weight_buckets(bucket_bytes, pack=digest or self._rank == 0)
        self._digest = WeightDigest() if digest else None

    def next_bucket(self) -> tuple[int | None, WeightBucket | None]:
        """From rank 0 the next bucket and its size in bytes; from the others, and after the last, None."""
        bucket = next(self._buckets, None)
        if bucket is None:
            return None, None
        if self._digest:
            self._digest.update(bucket)
        return (bucket.data.numel(), bucket) if self._rank == 0 else (None, None)

    def weight_digest(self) -> str | None:
        return self._digest.hexdigest() if self._digest else None

    def weight_digests(self) -> dict[str, str]:
        return self._learner.weight_digests()

    def join_transfer(self, config: Config, engines: Sequence[Any], address: tuple[str, int]) -> None:
        """Open vLLM's own transfer to the rollout engines (``sync.backend`` nccl or ipc)."""
        from r2m_ray.engines.rollout.vllm_sender import ranks_per_engine, weight_sender

        ranks = ranks_per_engine(config.rollout.engine_args)
        self._client = EngineClient(
            engines, ranks_per_engine=ranks, timeout_s=0.9 * config.cluster.phase_timeout_s
        )
        self._sender = weight_sender(
            self._learner,
            self._client,
            backend=config.sync.backend.value,
            rank=self._rank,
            address=address,
            world_size=1 + ranks * len(engines),
            bucket_bytes=config.sync.bucket_mb * 2**20,
        )

    def send_weights(self, version: int) -> None:
        self._client.version = version
        self._sender.send_weights()

    def save(self, directory: Path) -> None:
        reach("save")
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        self._learner.load(directory)


class ReferenceActor:
    """The frozen reference policy."""

    def start(self, config: Config, model_dir: str, gpus: float) -> str:
        """Load the model; returns the digest of its weights."""
        from r2m_ray.engines.policy.reference import ReferencePolicy

        self._reference = ReferencePolicy(config=config, model_dir=model_dir, device=device_of(gpus))
        return self._reference.digest()

    def logprobs(self, trajectories: Trajectories) -> tuple[int, ReferenceLogprobs]:
        reach("logprobs", trajectories.version + 1)
        return trajectories.layout.tokens, self._reference.logprobs(trajectories)


@raises_peers_lost
class RewardActor:
    """The frozen reward model with its R2M head, one replica."""

    def start(
        self,
        config: Config,
        model_dir: str,
        policy_width: int,
        rank: int,
        address: tuple[str, int],
        gpus: float,
    ) -> str:
        """Load model and head; returns the digest of the frozen weights."""
        from r2m_ray.engines.reward.engine import RewardEngine
        from r2m_ray.tasks.task import gold_total

        join_environment(rank, config.reward.replicas, address)
        self._rank = rank
        self._engine = RewardEngine(
            config=config,
            model_dir=model_dir,
            policy_width=policy_width,
            rank=rank,
            world_size=config.reward.replicas,
            device=device_of(gpus),
            gold=gold_total(config),
        )
        return self._engine.trunk_digest()

    def annotate(
        self, trajectories: Trajectories, hidden: Hidden, omega: float, step: int
    ) -> tuple[int, Annotation]:
        reach("annotate", step)
        return trajectories.layout.rows, self._engine.annotate(trajectories, hidden, omega, step)

    def warm_up(self, omega: float, *records: Any) -> dict[str, float]:
        """One step of the warm-up from this replica's shards; records are Hidden…, then Annotation…."""
        reach("warm_up", 0)
        return self._engine.warm_up(_reward_batches(records), omega)

    def update(self, omega: float, step: int, own: int, *records: Any) -> dict[str, float]:
        """One update from this replica's shards; records are Hidden…, then Annotation…, of ``own`` shards of
        the step, and then of those of human pairs."""
        reach("update", step)
        batches, human = _reward_batches(records[: 2 * own]), _reward_batches(records[2 * own :])
        return self._engine.update(batches, omega, step, human)

    def attention(self, hidden: Hidden, annotation: Annotation) -> torch.Tensor:
        return self._engine.attention(hidden, annotation)

    def head_digests(self) -> dict[str, str]:
        return self._engine.digests()

    def save(self, directory: Path) -> None:
        reach("save")
        # Replicas are equal; one writes.
        if self._rank == 0:
            self._engine.save(directory)

    def load(self, directory: Path) -> None:
        self._engine.load(directory)


def _reward_batches(records: Sequence[Any]) -> list[RewardBatch]:
    """Shards from their Hidden…, then Annotation…."""
    count = len(records) // 2
    return [
        RewardBatch(hidden=h, annotation=a) for h, a in zip(records[:count], records[count:], strict=True)
    ]
