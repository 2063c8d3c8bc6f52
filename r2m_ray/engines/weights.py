"""Weights on their way from learner to rollout engine: named tensors in flat buckets, with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2m_ray.engines.hardware import host_buffer, wait_for_copies
from r2m_ray.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some named parameters, end to end in one buffer.

    names, dtypes (``"float32"``, ``"bfloat16"`` …), shapes: one entry per parameter, in order.
    data: uint8, contiguous, on the CPU; each parameter's bytes, each starting at a multiple of 16.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    data: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters as views into ``data``; they may not be written to."""
        start = 0
        for name, dtype_name, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            yield name, self.data[start : start + size].view(dtype).view(shape)
            start += _aligned(size)


def pack_buckets(
    parameters: Iterable[tuple[str, Tensor]], bucket_bytes: int, *, pack: bool = True
) -> Iterator[WeightBucket | None]:
    """Pack named tensors, in order, into buckets of at most ``bucket_bytes`` (or of one larger tensor).

    Without ``pack`` it yields None for each bucket, and copies and keeps nothing.
    """
    pending: list[tuple[str, Tensor]] = []
    count, size = 0, 0
    for name, tensor in parameters:
        nbytes = _aligned(tensor.numel() * tensor.element_size())
        if count and size + nbytes > bucket_bytes:
            yield _pack(pending) if pack else None
            pending, count, size = [], 0, 0
        if pack:
            pending.append((name, tensor))
        count, size = count + 1, size + nbytes
    if count:
        yield _pack(pending) if pack else None


class WeightDigest:
    """sha256 over every bucket's names, dtypes, shapes and bytes, in order of arrival."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, bucket: WeightBucket) -> None:
        self._hash.update(repr((bucket.names, bucket.dtypes, bucket.shapes)).encode())
        self._hash.update(bucket.data.numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise RunError, naming the tensor, where a value of it is NaN or infinite."""
    # A finite sum proves all terms finite, and costs no memory; an infinite one may only have overflowed.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise RunError(
            f"{name}: {broken} of {tensor.numel()} values are NaN or infinite; it is neither saved nor "
            "synced. Go back to the last checkpoint with run.resume=true, and lower policy.learning_rate or "
            "reward.learning_rate."
        )


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(_bytes(tensor).cpu().numpy().data).hexdigest()


def module_digest(module: nn.Module) -> str:
    """sha256 over all parameters of a module, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tensor_digest(parameter)}\n".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8, on its device."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _pack(parameters: list[tuple[str, Tensor]]) -> WeightBucket:
    sizes = [_aligned(t.numel() * t.element_size()) for _, t in parameters]
    device = parameters[0][1].device
    data = host_buffer([sum(sizes)], torch.uint8, device)
    start = 0
    for (_, tensor), size in zip(parameters, sizes, strict=True):
        raw = _bytes(tensor)
        data[start : start + raw.numel()].copy_(raw, non_blocking=True)
        start += size
    wait_for_copies(device)
    return WeightBucket(
        names=tuple(name for name, _ in parameters),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for _, t in parameters),
        shapes=tuple(tuple(t.shape) for _, t in parameters),
        data=data,
    )


def _aligned(nbytes: int) -> int:
    # Views of a wider dtype need an aligned start.
    return (nbytes + 15) // 16 * 16
