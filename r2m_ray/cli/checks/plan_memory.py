"""Memory of every actor of a run, by formula, before anything starts; all numbers are bytes.

An actor's peak is what it always holds (its process, weights, gradients, optimizer, cache) and the largest
of what its phases need for a while. The formulas assume decoder layers of the Llama kind;
``benchmarks/memory.py`` compares them with what real actors take.

Letters: P parameters, b bytes of a number in the model's dtype, R learner ranks, w width, f feed-forward
width, V vocabulary, T tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from r2m_ray.cli.checks.plan_batch import BatchPlan
from r2m_ray.cli.checks.plan_models import ModelSizes
from r2m_ray.cli.checks.plan_parts import (
    LOGIT_COPIES,
    MIB,
    SLOT_BYTES,
    activations,
    bucket_bytes,
    cached_tokens,
    feedback_width,
    head_parameters,
    inference,
    itemsize,
    logits_bytes,
    pass_tokens,
    slot_bytes,
)
from r2m_ray.config.schema import Config
from r2m_ray.engines.policy.deepspeed_config import deepspeed_config
from r2m_ray.engines.policy.state import FILE_BYTES

PROCESS_BYTES = {
    "rollout": 560 * MIB,
    "policy": 375 * MIB,
    "reference": 300 * MIB,
    "reward": 300 * MIB,
    "driver": 385 * MIB,
    "ray": 650 * MIB,
}
"""A process that has imported its engine, on a CPU: memory of its own (USS) with models of 0.4 M parameters,
less what the formulas below give for those (`python benchmarks/memory.py --case tiny`). ``ray`` is all of a
local cluster's own processes. A GPU's libraries take more, also on the GPU, and that is not counted."""
LEARNER_NUMBERS = 4
"""Bytes of the learner's gradients and of each of Adam's moments: float32 whatever the weights are."""
BATCHED_TOKENS = 2048
"""vLLM's tokens of a forward pass where ``max_num_batched_tokens`` is not given."""
SEQUENCES = 256
"""vLLM's rows of a forward pass where ``max_num_seqs`` is not given."""
REDUCE_BUCKET = LIVE_PARAMETERS = 500_000_000
"""DeepSpeed's defaults, in numbers; it keeps twice as many live parameters as a bucket has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMemory:
    """One of ``count`` actors of a role.

    On a CPU everything is in the machine's memory, and `buffers` is part of `working`. With ``gpu``, process
    and buffers are in the machine's memory and the rest is on the GPU. cache: keys, values and exported
    hidden states of the rollout engine; None where vLLM takes whatever its GPU has left.
    """

    role: str
    count: int
    gpu: bool
    process: int
    weights: int
    gradients: int
    optimizer: int
    cache: int | None
    working: int
    buffers: int

    @property
    def host(self) -> int:
        """Bytes of the machine's memory."""
        return self.process + self.buffers + (0 if self.gpu else self.device_parts)

    @property
    def device(self) -> int:
        """Bytes of the GPU's memory; an unknown cache is not counted."""
        return self.device_parts if self.gpu else 0

    @property
    def device_parts(self) -> int:
        """What lies beside the model: the sum of weights, gradients, optimizer, cache and working memory."""
        return self.weights + self.gradients + self.optimizer + (self.cache or 0) + self.working


def actor_memory(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> list[ActorMemory]:
    """Peak memory of each role whose model is known."""
    formulas = {"rollout": rollout, "policy": learner, "reference": reference, "reward": reward}
    needs: dict[str, tuple[str, ...]] = {
        "rollout": ("policy",),
        "policy": ("policy",),
        "reference": ("reference",),
        "reward": ("reward", "policy") if config.uses_feedback else ("reward",),
    }
    return [
        formula(config, batch, models)
        for role, formula in formulas.items()
        if all(name in models for name in needs[role])
    ]


def learner(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One rank of the learner; rank 0, which also writes, where ranks differ.

    weights: P·b, with ZeRO-3 P·b/R and the gathered layers, at most DeepSpeed's live parameters.
    gradients: 4P, from ZeRO-2 on 4P/R. optimizer: two moments, 8P; from ZeRO-1 on a float32 copy too, 12P/R.
    Phases: the backward pass (`activations`, the reduction's bucket, fresh h twice), Adam's step (two
    temporaries and the flat gradient, 4P/R each), a weight bucket, and a checkpoint's file in the making.
    """
    model, b, ranks = models["policy"], itemsize(config.model.dtype), config.policy.ranks
    zero = deepspeed_config(config)["zero_optimization"]
    stage, gpu = zero["stage"], config.cluster.gpus_per_learner > 0
    parameters = model.parameters
    share = math.ceil(parameters / ranks)
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    live = int(zero.get("stage3_max_live_parameters", 2 * LIVE_PARAMETERS))
    weights = parameters * b if stage < 3 else (share + min(live, parameters)) * b
    gradients = LEARNER_NUMBERS * (share if stage >= 2 else parameters)
    optimizer = LEARNER_NUMBERS * (3 * share if stage else 2 * parameters)
    # On a CPU the bucket's pages exist once they are written.
    reduction = (bucket if gpu and stage else min(bucket, parameters)) * (b if stage else LEARNER_NUMBERS)
    fresh = 2 * batch.tokens_most // ranks * feedback_width(config, models) * b
    tokens = pass_tokens(config.policy.tokens_per_microbatch, batch.rows_per_rank, batch.row_tokens)
    checkpoint = _checkpoint_buffer(model, b, stage=stage, gpu=gpu)
    return _actor(
        "policy",
        ranks,
        gpu,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        phases=[
            (activations(model, tokens, b, config.policy.gradient_checkpointing) + reduction, fresh),
            (LEARNER_NUMBERS * (3 * share if stage else 2 * parameters), fresh),
            (0, bucket_bytes(config, model)),
            (0, checkpoint),
        ],
    )


def rollout(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One vLLM engine.

    weights: P·b. cache: `cached_tokens` slots of keys and values, and where hidden states are exported a row
    of width w and 16 bytes beside each. Phases: a forward pass with its logits and the exports of its share
    of a step, twice; loading weights, a second copy of the largest tensor beside the bucket.
    """
    model, b = models["policy"], itemsize(config.model.dtype)
    args, gpu = config.rollout.engine_args, config.cluster.gpus_per_rollout > 0
    slots = cached_tokens(config, model)
    rows = min(int(args.get("max_num_seqs", SEQUENCES)), batch.rows)
    tokens = min(int(args.get("max_num_batched_tokens", BATCHED_TOKENS)), rows * batch.row_tokens)
    share = batch.shards_per_replica["rollout"][1] * batch.rows_per_shard * batch.row_tokens
    width = feedback_width(config, models)
    exports = 2 * share * (width * b + SLOT_BYTES) if width else 0
    logits = LOGIT_COPIES * 4 * rows * model.vocabulary
    return _actor(
        "rollout",
        config.rollout.replicas,
        gpu,
        weights=model.parameters * b,
        cache=None if slots is None else slots * slot_bytes(config, model),
        phases=[
            (inference(model, tokens, b) + logits, exports),
            (model.largest * b, bucket_bytes(config, model)),
        ],
    )


def reference(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One reference replica: weights P·b, and the forward pass of one shard with its logits."""
    model, b = models["reference"], itemsize(config.model.dtype)
    tokens = pass_tokens(config.reference.tokens_per_microbatch, batch.rows_per_shard, batch.row_tokens)
    return _actor(
        "reference",
        config.reference.replicas,
        config.cluster.gpus_per_reference > 0,
        weights=model.parameters * b,
        phases=[(inference(model, tokens, b) + logits_bytes(model, tokens), 0)],
    )


def reward(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One reward replica: the frozen trunk, P·b, and the R2M head in float32.

    The head has 2·D·E + 2·w·E + D numbers: itself, two gradients (Eqs. 5 and 6 apart), two moments, and
    for a while their parts and Adam's temporaries. Conversations are taken to be as long as the policy's
    rows.
    """
    model, b = models["reward"], itemsize(config.model.reward_dtype)
    head = 4 * head_parameters(config, models)
    length = batch.row_tokens + 1
    tokens = pass_tokens(config.reward.tokens_per_microbatch, batch.rows_per_shard, length)
    states = batch.rows_per_shard * batch.row_tokens * feedback_width(config, models) * 4
    noise = 3 * states if config.feedback.noise else 0
    gpu = config.cluster.gpus_per_reward > 0
    return _actor(
        "reward",
        config.reward.replicas,
        gpu,
        weights=model.parameters * b + head,
        gradients=2 * head,
        optimizer=2 * head,
        # On a CPU h is read where it lies, in the object store.
        phases=[(inference(model, tokens, b), 0), (3 * head + noise + (states if gpu else 0), 0)],
    )


def _checkpoint_buffer(model: ModelSizes, b: int, *, stage: int, gpu: bool) -> int:
    """What rank 0 gathers to write: copies, except of what already lies whole in the machine's memory."""
    copied = gpu or stage > 0
    state = min(12 * model.parameters, FILE_BYTES + 12 * model.largest) if copied else 0
    return state + (model.parameters * b if gpu or stage == 3 else 0)


def _actor(
    role: str,
    count: int,
    gpu: bool,
    *,
    weights: int,
    phases: list[tuple[int, int]],
    gradients: int = 0,
    optimizer: int = 0,
    cache: int | None = 0,
) -> ActorMemory:
    """``phases``: what each needs for a while, where the model lies and in the machine's memory."""
    return ActorMemory(
        role=role,
        count=count,
        gpu=gpu,
        process=PROCESS_BYTES[role],
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        cache=cache,
        working=max(there + (0 if gpu else host) for there, host in phases),
        buffers=max(host for _, host in phases) if gpu else 0,
    )
