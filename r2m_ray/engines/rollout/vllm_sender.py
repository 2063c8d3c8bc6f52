"""The learner's side of vLLM's own weight transfer (``nccl`` and ``ipc``): GPU to GPU, past the object store.

vLLM drives the complete update: it opens the update on the engines, sends every parameter, and closes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from r2m_ray.engines.policy.learner import PolicyLearner


class LearnerSource(WeightSource):  # type: ignore[misc]
    """A learner's parameters as vLLM reads them: Hugging Face names, full tensors, one at a time."""

    def __init__(self, learner: PolicyLearner) -> None:
        self._learner = learner

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self._learner.weight_shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._learner.weights()


def ranks_per_engine(engine_args: Mapping[str, Any]) -> int:
    """Processes of one engine that take part in a transfer: tensor × pipeline parallel ranks."""
    return int(engine_args.get("tensor_parallel_size", 1)) * int(engine_args.get("pipeline_parallel_size", 1))


def weight_sender(
    learner: PolicyLearner,
    client: Any,
    *,
    backend: str,
    rank: int,
    address: tuple[str, int],
    world_size: int,
    bucket_bytes: int,
) -> Any:
    """vLLM's sender for a learner rank; every rank makes one, rank 0 speaks to the engines.

    Args:
        learner: the rank whose weights are sent.
        client: the engines, as vLLM's ``VLLMWeightSyncClient``.
        backend: "nccl" or "ipc".
        rank: of the learner.
        address: where rank 0 listens (nccl).
        world_size: the sender and all ranks of all engines together (nccl), see `ranks_per_engine`.
        bucket_bytes: bytes that are sent at a time, or the largest parameter where that is more.

    Returns an object whose ``send_weights()`` runs one complete update and must be called on every rank.
    """
    if backend == "nccl":
        info: NCCLTrainerInitInfo | IPCTrainerInitInfo = NCCLTrainerInitInfo(
            rank=rank,
            master_address=address[0],
            master_port=address[1],
            world_size=world_size,
            packed_buffer_size_bytes=bucket_bytes,
        )
    else:
        # One buffer is shared during the complete transfer, and no parameter may be larger than it.
        sizes = (math.prod(shape) * dtype.itemsize for _, dtype, shape in learner.weight_shapes())
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(bucket_bytes, *sizes))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=LearnerSource(learner))
