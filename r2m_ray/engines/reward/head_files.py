"""The R2M head on disk: safetensors and JSON, read back by three lines.

    from r2m_ray.engines.reward.head_files import load_head

    head, info = load_head("runs/x/checkpoints/step-000020/reward_head")
    reward_N = head(rte_ND, hidden_TP, offsets, info.omega)

rte_ND: input of the reward model's score layer at the last token of prompt + response. hidden_TP: the
policy's last-layer states at every token but the last of each row, end to end; offsets: where rows start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_ray.core.head import R2MHead
from r2m_ray.engines.weights import require_finite
from r2m_ray.errors import InputError

TENSORS_FILE = "head.safetensors"
INFO_FILE = "head.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInfo:
    """What must be known to use a head.

    policy_width P, reward_width D, attention_width E: the axes of its weights. score_bias: whether φ has one.
    omega: ω of the last training step, the one to score with. reward_model: the trunk that it reads.
    """

    policy_width: int
    reward_width: int
    attention_width: int
    score_bias: bool
    omega: float
    reward_model: str


def save_head(head: R2MHead, info: HeadInfo, directory: Path) -> None:
    """Write ``head.safetensors`` and ``head.json`` into a directory, which is made if absent.

    Raises RunError, naming the parameter, where one is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    for name, tensor in tensors.items():
        require_finite(f"{name} of the R2M head", tensor)
    save_file(tensors, directory / TENSORS_FILE)
    (directory / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")


def load_head(directory: str | Path) -> tuple[R2MHead, HeadInfo]:
    """A saved head (float32, on the CPU) and what it was saved with.

    Raises InputError, naming file and field, where a file is absent, damaged or of other sizes than it says.
    """
    info = HeadInfo(**read_json(Path(directory) / INFO_FILE, [field.name for field in fields(HeadInfo)]))
    head = R2MHead(
        info.policy_width,
        info.reward_width,
        info.attention_width,
        torch.zeros(info.reward_width),
        torch.zeros(1) if info.score_bias else None,
    )
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    head.load_state_dict(read_tensors(Path(directory) / TENSORS_FILE, shapes))
    return head, info


def read_tensors(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have exactly these names and shapes; else InputError."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}; use another checkpoint") from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted({name for name, _ in found.items() ^ shapes.items()})
    if wrong:
        raise InputError(
            f"{path}: "
            + "; ".join(
                f"{name} is {_size(found.get(name))}, not {_size(shapes.get(name))}" for name in wrong
            )
            + "; use a checkpoint of this model and reward.attention_width"
        )
    return tensors


def read_json(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The object in a JSON file, which must have exactly these fields; else InputError."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; use another checkpoint") from error
    if not isinstance(stored, dict) or sorted(stored) != sorted(names):
        raise InputError(f"{path} must hold exactly the fields {', '.join(names)}; use another checkpoint")
    return stored


def _size(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
