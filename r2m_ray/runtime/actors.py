"""What runs inside each actor: an engine, started once its peers are known, and nothing else.

A method takes references to records and reads them itself. It returns something light first and the heavy
records after it as separate objects, so the driver can wait for the light part without pulling a tensor
through its own node. A worker does not know whether it is a Ray actor or an object of the driver's process:
``read`` is how it gets at records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import (
    Annotation,
    Hidden,
    PolicyBatch,
    ReferenceKL,
    ReferenceLogprobs,
    RewardBatch,
    RowText,
    SampledRows,
    SamplePlan,
    Scores,
    Trajectories,
)
from r2m_ray.core.roles import Ref, Shards
from r2m_ray.engines.faults import reach
from r2m_ray.engines.weights import WeightBucket, WeightDigest
from r2m_ray.errors import DeviceLost
from r2m_ray.runtime.device import device_of, free_address, join_environment
from r2m_ray.runtime.weight_sync import EngineClient
from r2m_ray.runtime.worker_group import raises_peers_lost

Read = Callable[[Sequence[Ref[Any]]], list[Any]]
"""The records behind references, in their order."""


def read_objects(refs: Sequence[Ref[Any]]) -> list[Any]:
    """Read records from Ray's object store; whoever waits for the caller has the deadline."""
    records: list[Any] = ray.get([ref.handle for ref in refs])
    return records


class RolloutActor:
    """A vLLM engine."""

    def __init__(self, read: Read = read_objects) -> None:
        self._read = read

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
        """SampledRows of each plan; then the Trajectories of each, and the Hidden of each."""
        reach("sample", plans[0].step)
        shards = self._engine.sample(plans)
        trajectories, hidden = zip(*shards, strict=True)
        return [SampledRows.of(shard) for shard in trajectories], *trajectories, *hidden

    def texts(self, trajectories: Ref[Trajectories], rows: int) -> list[RowText]:
        (shard,) = self._read([trajectories])
        return self._engine.texts(shard, rows)

    def ready(self) -> None:
        """Answer, and so show that this process lives."""

    def begin_weight_update(self, verify: bool) -> None:
        self._engine.begin_weight_update(verify=verify)

    def load_bucket(self, bucket: Ref[WeightBucket]) -> None:
        reach("load_bucket")
        self._engine.load_bucket(*self._read([bucket]))

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        self._engine.init_weight_transfer(init_info)

    def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        self._engine.receive_weights(update_info)

    def finish_weight_update(self, version: int, digest: str | None) -> None:
        self._engine.finish_weight_update(version=version, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyWork:
    """One rank's share of a policy update: per shard, its number in the step and what is known of it."""

    shard_ids: Sequence[int]
    advantage: Sequence[Tensor]
    trajectories: Shards[Trajectories]
    reference: Shards[ReferenceLogprobs]


@contextmanager
def _transfer() -> Iterator[None]:
    """Raise DeviceLost where vLLM's transfer fails: its NCCL errors are RuntimeErrors without a type."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DeviceLost(f"weight transfer: {error}; the process is replaced") from error


@raises_peers_lost
class PolicyActor:
    """One rank of the DeepSpeed learner."""

    def __init__(self, read: Read = read_objects) -> None:
        self._read = read

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

    def update(self, work: PolicyWork) -> Any:
        """Stats, then each shard's fresh Hidden if any."""
        trajectories: list[Trajectories] = self._read(work.trajectories)
        reference: list[ReferenceLogprobs] = self._read(work.reference)
        reach("update", trajectories[0].version + 1 if trajectories else None)
        batches = [
            PolicyBatch(trajectories=t, advantage_N=a, reference=r)
            for t, a, r in zip(trajectories, work.advantage, reference, strict=True)
        ]
        stats, hidden = self._learner.update(batches, work.shard_ids)
        return (stats, *hidden) if hidden else stats

    def hidden(self, trajectories: Shards[Trajectories]) -> Any:
        """The number of shards, then each one's Hidden."""
        records = self._learner.hidden(self._read(trajectories))
        return (len(records), *records) if records else 0

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
        with _transfer():
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
        with _transfer():
            self._sender.send_weights()

    def save(self, directory: Path) -> None:
        reach("save")
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        self._learner.load(directory)


class ReferenceActor:
    """The frozen reference policy."""

    def __init__(self, read: Read = read_objects) -> None:
        self._read = read

    def start(self, config: Config, model_dir: str, gpus: float) -> str:
        """Load the model; returns the digest of its weights."""
        from r2m_ray.engines.policy.reference import ReferencePolicy

        self._reference = ReferencePolicy(config=config, model_dir=model_dir, device=device_of(gpus))
        return self._reference.digest()

    def logprobs(self, trajectories: Ref[Trajectories]) -> tuple[ReferenceKL, ReferenceLogprobs]:
        (rows,) = self._read([trajectories])
        reach("logprobs", rows.version + 1)
        return self._reference.logprobs(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardWork:
    """One replica's share of a reward update: per shard, its h and its annotation."""

    hidden: Shards[Hidden]
    annotation: Shards[Annotation]


@raises_peers_lost
class RewardActor:
    """The frozen reward model with its R2M head, one replica."""

    def __init__(self, read: Read = read_objects) -> None:
        self._read = read

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
        from r2m_ray.tasks.task import gold_scorer

        join_environment(rank, config.reward.replicas, address)
        self._rank = rank
        self._engine = RewardEngine(
            config=config,
            model_dir=model_dir,
            policy_width=policy_width,
            rank=rank,
            world_size=config.reward.replicas,
            device=device_of(gpus),
            gold=gold_scorer(config),
        )
        return self._engine.trunk_digest()

    def annotate(
        self, trajectories: Ref[Trajectories], hidden: Ref[Hidden], omega: float, step: int
    ) -> tuple[Scores, Annotation]:
        reach("annotate", step)
        rows, states = self._read([trajectories, hidden])
        return self._engine.annotate(rows, states, omega, step)

    def warm_up(self, human: RewardWork, omega: float) -> dict[str, float]:
        """One step of the warm-up from this replica's shards of human pairs."""
        reach("warm_up", 0)
        return self._engine.warm_up(self._batches(human), omega)

    def update(self, own: RewardWork, human: RewardWork, omega: float, step: int) -> dict[str, float]:
        """One update from this replica's shards of the step, and those of human pairs."""
        reach("update", step)
        return self._engine.update(self._batches(own), omega, step, self._batches(human))

    def attention(self, hidden: Ref[Hidden], annotation: Ref[Annotation], rows: int) -> list[list[float]]:
        """The head's weight on each token of the first rows."""
        states, notes = self._read([hidden, annotation])
        weight_T = self._engine.attention(states, notes)
        shown = range(min(rows, notes.layout.rows))
        return [weight_T[notes.layout.slice_of(n)].tolist() for n in shown]

    def head_digests(self) -> dict[str, str]:
        return self._engine.digests()

    def save(self, directory: Path) -> None:
        reach("save")
        # Replicas are equal; one writes.
        if self._rank == 0:
            self._engine.save(directory)

    def load(self, directory: Path) -> None:
        self._engine.load(directory)

    def _batches(self, work: RewardWork) -> list[RewardBatch]:
        records = zip(self._read(work.hidden), self._read(work.annotation), strict=True)
        return [RewardBatch(hidden=hidden, annotation=annotation) for hidden, annotation in records]
