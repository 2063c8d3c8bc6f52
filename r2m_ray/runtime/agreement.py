"""Actors of one role that must hold the same tensors, to the last bit, and the error where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from r2m_ray.errors import RunError
from r2m_ray.runtime.workers import Workers


async def require_agreement(actors: Workers, phase: str, method: str) -> None:
    """Compare the digests of every tensor, which ``method`` returns by name, between all actors.

    Raises RunError naming the first tensor that differs and who holds another than most; of two actors,
    another than rank 0.
    """
    difference = first_difference(actors.names, await actors.all(phase, method))
    if difference:
        raise RunError(
            f"{phase}: {difference}. Their memory or a collective is broken: nothing of this step was kept. "
            "Continue from the last checkpoint with run.resume=true, on other devices if it happens again."
        )


def first_difference(names: Sequence[str], digests: Sequence[Mapping[str, str]]) -> str | None:
    """The first tensor that actors do not agree on, in words; None where they agree on all."""
    for tensor in digests[0]:
        held = [digest[tensor] for digest in digests]
        common, _ = Counter(held).most_common(1)[0]
        others = [name for name, digest in zip(names, held, strict=True) if digest != common]
        if others:
            like = names[held.index(common)]
            return f"{tensor} of {', '.join(others)} is not that of {like}"
    return None
