"""What the learner tells vLLM's own weight transfer about buffers and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from r2m_ray.engines.rollout import vllm_sender
from r2m_ray.engines.rollout.vllm_sender import ranks_per_engine, weight_sender


class Learner:
    """Two parameters, of 64 and 8000 bytes."""

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [("norm", torch.float32, (16,)), ("embedding", torch.bfloat16, (100, 40))]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter([])


@pytest.mark.parametrize(("bucket", "expected"), [(1000, 8000), (9000, 9000)])
def test_the_shared_buffer_holds_the_largest_parameter(
    bucket: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What opens a transfer needs a GPU; what it is opened with is looked at here.
    monkeypatch.setattr(
        vllm_sender.WeightTransferTrainerFactory, "trainer_init", lambda info, client, source: info
    )
    arguments: dict[str, Any] = {"rank": 0, "address": ("127.0.0.1", 1), "world_size": 3}
    ipc = weight_sender(Learner(), None, backend="ipc", bucket_bytes=bucket, **arguments)
    assert ipc.packed_buffer_size_bytes == expected
    assert ipc.packed
    # A broadcast grows its buffer by itself.
    nccl = weight_sender(Learner(), None, backend="nccl", bucket_bytes=bucket, **arguments)
    assert (nccl.packed_buffer_size_bytes, nccl.world_size) == (bucket, 3)


@pytest.mark.parametrize(
    ("engine_args", "ranks"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}, 6),
    ],
)
def test_every_process_of_an_engine_counts_in_a_transfer(engine_args: Mapping[str, int], ranks: int) -> None:
    assert ranks_per_engine(engine_args) == ranks
