"""The parts that an actor's memory is made of, each by a formula of its own; all numbers are bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping

from r2m_ray.cli.checks.plan_models import ModelSizes
from r2m_ray.config.schema import Config, Dtype, FeedbackSource
from r2m_ray.engines.policy.causal import LOGITS_AT_ONCE

MIB = 2**20
LOGIT_COPIES = 4
"""Logits, the same in float32, over the temperature, and their log-softmax or gradient."""
CPU_BLOCK, GPU_BLOCK = 128, 16
"""vLLM's tokens of a block of the KV cache where ``block_size`` is not given."""
SLOT_BYTES = 16
"""Token and position of a cached token, which prove whose hidden state its slot holds."""


def activations(model: ModelSizes, tokens: int, b: int, checkpointing: bool) -> int:
    """What a forward pass keeps for the backward pass, and what that needs at a time.

    Of a layer and token: both norms keep input, normalised input and output (6w), attention its query, keys
    and values, and its output in two layouts (3w + kv), the gated feed-forward four states (4f). All layers
    of that, or with gradient checkpointing one layer and the input of the others; the gradients of one layer;
    the logits' copies.
    """
    layer = 9 * model.width + model.key_value + 4 * model.feed_forward
    kept = model.layers * model.width + layer if checkpointing else model.layers * layer
    return tokens * b * (kept + layer) + logits_bytes(model, tokens)


def inference(model: ModelSizes, tokens: int, b: int) -> int:
    """States of one layer without gradients: input, residual, query, keys, values, output, feed-forward."""
    return tokens * b * (4 * model.width + model.key_value + 3 * model.feed_forward)


def logits_bytes(model: ModelSizes, tokens: int) -> int:
    """Copies of the logits that exist at a time, float32; beyond ``LOGITS_AT_ONCE`` they are cut."""
    return LOGIT_COPIES * 4 * min(tokens * model.vocabulary, LOGITS_AT_ONCE)


def pass_tokens(budget: int, rows: int, row_tokens: int) -> int:
    """Tokens of the largest forward pass: the budget, but one row at least and all rows at most."""
    return max(row_tokens, min(budget, rows * row_tokens))


def cached_tokens(config: Config, model: ModelSizes) -> int | None:
    """Slots of one engine's KV cache; None where vLLM takes what is left of its GPU's memory.

    As ``num_gpu_blocks_override`` or ``kv_cache_memory_bytes`` of ``rollout.engine_args`` say, and on a CPU
    else VLLM_CPU_KVCACHE_SPACE GiB, 1 where that is not set.
    """
    args, gpu = config.rollout.engine_args, config.cluster.gpus_per_rollout > 0
    block = int(args.get("block_size", GPU_BLOCK if gpu else CPU_BLOCK))
    if "num_gpu_blocks_override" in args:
        return int(args["num_gpu_blocks_override"]) * block
    key_value_bytes = model.layers * model.key_value * itemsize(config.model.dtype)
    if "kv_cache_memory_bytes" in args:
        return int(args["kv_cache_memory_bytes"]) // (block * key_value_bytes) * block
    if gpu:
        return None
    space = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    return int(space * 2**30) // (block * key_value_bytes) * block


def slot_bytes(config: Config, model: ModelSizes) -> int:
    """Bytes of a cached token: keys and values of every layer, and the hidden state where it is exported."""
    b = itemsize(config.model.dtype)
    exported = model.width * b + SLOT_BYTES if exports_hidden(config) else 0
    return model.layers * model.key_value * b + exported


def exports_hidden(config: Config) -> bool:
    """Whether the rollout engine exports hidden states."""
    return config.uses_feedback and config.feedback.source is FeedbackSource.rollout


def feedback_width(config: Config, models: Mapping[str, ModelSizes]) -> int:
    """Width of h; 0 in a run without feedback."""
    return models["policy"].width if config.uses_feedback else 0


def head_parameters(config: Config, models: Mapping[str, ModelSizes]) -> int:
    """Numbers of the R2M head: W_q, W_o of D·E, W_k, W_v of w·E, and φ of D."""
    width, attention = models["reward"].width, config.reward.attention_width
    return 2 * attention * (width + feedback_width(config, models)) + width


def bucket_bytes(config: Config, model: ModelSizes) -> int:
    """Bytes of one transfer of weights: the bucket's limit, the largest tensor, or all there is."""
    b = itemsize(config.model.dtype)
    return min(max(config.sync.bucket_mb * MIB, model.largest * b), model.parameters * b)


def itemsize(dtype: Dtype) -> int:
    """Bytes of one number."""
    return 2 if dtype is Dtype.bfloat16 else 4
