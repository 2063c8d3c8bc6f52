"""What safetensors files say and hold, read without torch: headers, sizes, and NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy

HEADER_LIMIT = 100_000_000
"""Bytes of a header at most, by the format's own definition."""
SCANNED_BYTES = 2 * 2**30
"""Weights of a model that are read for NaN before a run; more would delay every start, and the first step
finds them as well."""
EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Of each floating-point type the bits of its exponent, which are all set in NaN and infinity alone."""
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its type by the format's name, and the bytes ``start`` to ``end`` it lies in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors that a safetensors file describes; ValueError with the reason for a damaged one."""
    if not file.is_file():
        raise ValueError("missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"cut off: {size} bytes end inside its header")
        if header_size > HEADER_LIMIT:
            raise ValueError("its header is not that of a safetensors file")
        content = stream.read(header_size)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, 8 + header_size) for name, entry in header.items()]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its header is not that of a safetensors file") from error
    expected = max((tensor.end for tensor in tensors), default=8 + header_size)
    if size != expected:
        raise ValueError(f"{size} bytes where its header says {expected}")
    return tensors


def damage(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and size; None if nothing."""
    try:
        stored_tensors(file)
    except ValueError as error:
        return str(error)
    return None


def nonfinite_tensor(file: Path) -> str | None:
    """Name of the first tensor of an undamaged file that holds NaN or infinity; None if none does."""
    status = file.stat()
    return _scanned(file, status.st_size, status.st_mtime_ns)


@cache
def _scanned(file: Path, size: int, changed: int) -> str | None:
    """`nonfinite_tensor` of a file in this state: runs of a sweep share their models."""
    floats = (tensor for tensor in stored_tensors(file) if tensor.dtype in EXPONENTS)
    return next((tensor.name for tensor in floats if _holds_nonfinite(file, tensor)), None)


def _holds_nonfinite(file: Path, tensor: StoredTensor) -> bool:
    kind, exponent = EXPONENTS[tensor.dtype]
    return any(
        bool(((bits & exponent) == exponent).any()) for bits in _chunks(file, tensor, numpy.dtype(kind))
    )


def _chunks(
    file: Path, tensor: StoredTensor, kind: numpy.dtype[numpy.unsignedinteger]
) -> Iterator[numpy.ndarray]:
    with file.open("rb") as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.end, _CHUNK_BYTES):
            yield numpy.frombuffer(stream.read(min(_CHUNK_BYTES, tensor.end - start)), kind)


def _stored(name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    """A header's entry; ValueError, KeyError or TypeError for one that contradicts itself."""
    start, end = entry["data_offsets"]
    tensor = StoredTensor(
        name, str(entry["dtype"]), tuple(map(int, entry["shape"])), base + start, base + end
    )
    width = int(EXPONENTS[tensor.dtype][0][-1]) if tensor.dtype in EXPONENTS else None
    if not 0 <= start <= end or (width is not None and math.prod(tensor.shape) * width != end - start):
        raise ValueError(name)
    return tensor
