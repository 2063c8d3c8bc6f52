"""DeepSpeed's configuration: ours, with ``policy.deepspeed`` merged over it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r2m_ray.config.fields import leaves
from r2m_ray.config.schema import Config, Dtype
from r2m_ray.errors import InputError

MICROBATCHES = "micro-batches follow from policy.tokens_per_microbatch and algo.minibatch_prompts"
NORMALISED = "the loss is already normalised over all ranks"
PRECISION = "set model.dtype"

OWNED = {
    "train_batch_size": MICROBATCHES,
    "train_micro_batch_size_per_gpu": MICROBATCHES,
    "gradient_accumulation_steps": MICROBATCHES,
    "managed_gradient_accumulation": MICROBATCHES,
    "gradient_allreduce_op": NORMALISED,
    "prescale_gradients": NORMALISED,
    "gradient_predivide_factor": NORMALISED,
    "gradient_clipping": "set policy.max_grad_norm",
    "scheduler": "set policy.warmup_steps",
    "optimizer.params.lr": "set policy.learning_rate",
    "optimizer.params.weight_decay": "set policy.weight_decay",
    "fp16": PRECISION,
    "bf16.enabled": PRECISION,
    "bf16.check_grad_overflow": "non-finite steps are always skipped",
    "zero_optimization.compute_grad_norm": "non-finite steps are found by the norm",
}
"""Keys that would contradict a field of our own, and which one."""


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``: ZeRO-2 and torch's AdamW, where nothing else is asked for.

    Raises InputError naming the key that contradicts a field of ours, or that cannot be resumed from.
    """
    overrides = config.policy.deepspeed
    for path, _ in leaves(overrides):
        for owned, remedy in OWNED.items():
            if path == owned or path.startswith(f"{owned}."):
                raise InputError(f"policy.deepspeed.{path}: {remedy}; remove the key")
    merged = _merge(_base(config), overrides)
    kind = str(merged["optimizer"]["type"])
    if kind.lower() not in ("adam", "adamw"):
        raise InputError(
            f"policy.deepspeed.optimizer.type={kind}: checkpoints hold Adam's state only; use Adam or AdamW"
        )
    stage = merged["zero_optimization"]["stage"]
    if stage not in (0, 1, 2, 3):
        raise InputError(f"policy.deepspeed.zero_optimization.stage={stage}: choose 0, 1, 2 or 3")
    if stage == 0 and config.model.dtype is not Dtype.float32:
        raise InputError(
            f"policy.deepspeed.zero_optimization.stage=0 keeps no float32 copy of {config.model.dtype} "
            "weights; use stage 1, 2 or 3, or model.dtype=float32"
        )
    return merged


def _base(config: Config) -> dict[str, Any]:
    low_precision = config.model.dtype is not Dtype.float32
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.policy.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.policy.learning_rate,
                "weight_decay": config.policy.weight_decay,
                "torch_adam": True,
            },
        },
        "bf16": {"enabled": low_precision, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
