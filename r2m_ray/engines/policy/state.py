"""The learner's exact state on disk: float32 weights and Adam's moments, by parameter name, nothing pickled.

Whatever the ZeRO stage and the number of ranks, a parameter has one entry ``<kind>/<name>`` of its full
shape in ``optimizer-NNNNN.safetensors``, beside ``optimizer.json``. So a run may resume with another stage or
number of ranks, and with the same ones it continues to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2m_ray.engines.policy.zero import STATE, ZeroEngine
from r2m_ray.engines.weights import require_finite
from r2m_ray.errors import RunError

COUNTERS = "optimizer.json"
FILE_BYTES = 2**31
"""Bytes after which a file is closed and the next begun, so that rank 0 never holds all of the state."""


def save_state(engine: ZeroEngine, directory: Path) -> None:
    """Write the state; every rank calls it, rank 0 writes. RunError for a value that is not finite."""
    pending: dict[str, Tensor] = {}
    files = 0

    def write() -> None:
        nonlocal files
        files += 1
        if engine.rank == 0:
            save_file(pending, directory / f"optimizer-{files:05d}.safetensors")
        pending.clear()

    for name in engine.parameters:
        for kind in STATE:
            value = engine.read_state(name, kind)
            require_finite(f"{kind} of policy weight {name}", value)
            if engine.rank == 0:
                pending[f"{kind}/{name}"] = value.cpu().contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES:
            write()
    write()
    if engine.rank == 0:
        (directory / COUNTERS).write_text(json.dumps({"optimizer_steps": engine.optimizer_steps}))


def load_state(engine: ZeroEngine, directory: Path) -> None:
    """Restore what `save_state` wrote; every rank calls it and reads the same files.

    Raises RunError, naming the tensor, where the files lack a parameter or hold one of another model.
    """
    missing = {f"{kind}/{name}": (name, kind) for name in engine.parameters for kind in STATE}
    for key, value in _stored(directory):
        if key not in missing or value.shape != engine.shapes[missing[key][0]]:
            raise RunError(
                f"{directory}: {key} {list(value.shape)} does not belong to this policy; resume with the "
                "model.policy that the run started with"
            )
        engine.write_state(*missing.pop(key), value)
    if missing:
        raise RunError(
            f"{directory}: the learner's state lacks {len(missing)} tensors, {min(missing)} among them; "
            "resume from another checkpoint"
        )
    engine.count_steps(int(json.loads((directory / COUNTERS).read_text())["optimizer_steps"]))


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(directory.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield key, tensors.get_tensor(key)
