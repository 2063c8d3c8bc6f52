"""The learner's side of vLLM's own weight transfer (``nccl`` and ``ipc``): GPU to GPU, past the object store.

vLLM drives the whole round: it opens the update on the engines, sends every parameter, and closes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


class Weights(Protocol):
    """A learner rank, as far as its weights go."""

    def weight_shapes(self) -> list[tuple[str, Any, tuple[int, ...]]]: ...

    def weights(self) -> Iterator[tuple[str, Tensor]]: ...


class LearnerSource(WeightSource):  # type: ignore[misc]
    """A learner's parameters as vLLM reads them: Hugging Face names, whole tensors, one at a time."""

    def __init__(self, learner: Weights) -> None:
        self._learner = learner

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self._learner.weight_shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._learner.weights()


def weight_sender(
    learner: Weights,
    client: Any,
    *,
    backend: str,
    rank: int,
    address: tuple[str, int],
    world_size: int,
    bucket_bytes: int,
) -> Any:
    """vLLM's sender for a learner rank; every rank makes one, rank 0 speaks to the engines.

    client: the engines, as vLLM's ``VLLMWeightSyncClient``. address: where rank 0 listens (nccl).
    world_size: the sender and all engine ranks together (nccl). Returns an object whose ``send_weights()``
    runs one complete update and must be called on every rank.
    """
    if backend == "nccl":
        info: Any = NCCLTrainerInitInfo(
            rank=rank,
            master_address=address[0],
            master_port=address[1],
            world_size=world_size,
            packed_buffer_size_bytes=bucket_bytes,
        )
    else:
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=LearnerSource(learner))
