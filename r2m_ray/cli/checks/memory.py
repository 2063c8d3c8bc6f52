"""Batches, memory and traffic of a run by formula, from its configuration and the sizes of its models.

An actor holds its process, weights, gradients, optimizer and cache, and for a while what its largest pass
needs. The formulas assume decoder layers of the Llama kind; `benchmarks/memory.py` compares them with what
real actors take. All sizes are bytes.

P parameters, b bytes of a number in the model's dtype, R learner ranks, w policy width, D reward width, E
attention width of the head, f feed-forward width, kv numbers of a key and a value, T packed tokens and N rows
of a step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from r2m_ray.cli.checks.preflight import GIB, OPTIMIZER_BYTES, itemsize
from r2m_ray.config.schema import Config, FeedbackRefresh, FeedbackSource, OldLogprobs
from r2m_ray.engines.policy.causal import LOGITS_AT_ONCE
from r2m_ray.engines.policy.deepspeed_config import deepspeed_config
from r2m_ray.engines.policy.state import FILE_BYTES
from r2m_ray.runtime.demand import demands

MIB = 2**20
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
MASTER = 4
"""Bytes of the learner's gradients and of each of Adam's moments: float32 whatever the weights are."""
LOGIT_COPIES = 4
"""Logits, the same in float32, divided by the temperature, and their log-softmax or gradient."""
BATCHED_TOKENS, SEQUENCES = 2048, 256
"""vLLM's tokens and rows of a forward pass where ``engine_args`` do not give them."""
CPU_BLOCK, GPU_BLOCK = 128, 16
"""vLLM's tokens of a block of the KV cache where ``block_size`` is not given."""
SOURCE_BYTES = 16
"""Token and position of a cached token, which prove whose hidden state its slot holds."""
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in numbers."""
TRAJECTORY_BYTES = 8 + 8 + 1 + 4 + 4
"""Of a packed token: input, label, mask, log-prob, and about 4 characters of the row's text."""
REFERENCE_BYTES = 4 + 4
"""Of a packed token: its log-prob at the sampling temperature and at 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What a step consists of.

    shards_per_replica: the least and the most shards that one replica or rank of a role gets. minibatches:
    of one epoch. optimizer_steps: of all epochs. rows_per_rank: rows of a mini-batch that one learner rank
    has at most. row_tokens: input tokens of a row at most, one less than prompt and response together.
    tokens: T at most. passes_per_minibatch: forward passes of a rank over its part of a mini-batch, at most.
    policy_passes: those of the step, π_old's included.
    """

    rows: int
    shards: int
    rows_per_shard: int
    shards_per_replica: Mapping[str, tuple[int, int]]
    minibatches: int
    optimizer_steps: int
    rows_per_rank: int
    row_tokens: int
    tokens: int
    passes_per_minibatch: int
    policy_passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What memory depends on.

    parameters: all of them, tied ones once; largest: those of the largest tensor. key_value: numbers that a
    key and a value take together in one layer.
    """

    parameters: int
    largest: int
    width: int
    layers: int
    feed_forward: int
    key_value: int
    vocabulary: int

    def inference(self, tokens: int, b: int) -> int:
        """Bytes of one layer's states: input, residual, query, keys, values, output, feed-forward."""
        return tokens * b * (4 * self.width + self.key_value + 3 * self.feed_forward)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits' copies at a time, float32; beyond ``LOGITS_AT_ONCE`` they are cut."""
        return LOGIT_COPIES * 4 * min(tokens * self.vocabulary, LOGITS_AT_ONCE)

    def activations(self, tokens: int, b: int, *, checkpointing: bool) -> int:
        """What a forward pass keeps for the backward pass, and what that needs at a time.

        Of a layer and token: both norms keep input, normalised input and output (6w), attention its query,
        keys and values, and its output in two layouts (3w + kv), the gated feed-forward four states (4f). All
        layers of that, or with gradient checkpointing one layer and the input of the others; the gradients of
        one layer; the logits' copies.
        """
        layer = 9 * self.width + self.key_value + 4 * self.feed_forward
        kept = self.layers * self.width + layer if checkpointing else self.layers * layer
        return tokens * b * (kept + layer) + self.logits(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMemory:
    """One of ``count`` actors of a role.

    On a CPU everything is in the machine's memory. With ``gpu``, process and buffers are in the machine's
    memory, and the rest is on each of the actor's GPUs. cache: keys, values and exported states of all slots;
    None where vLLM takes what is left of its GPU. phases: what each phase needs for a while, beside the model
    and in the machine's memory.
    """

    role: str
    count: int
    gpu: bool
    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int | None = 0
    phases: tuple[tuple[int, int], ...]

    @property
    def process(self) -> int:
        """Bytes of the process itself."""
        return PROCESS_BYTES[self.role]

    @property
    def largest_pass(self) -> int:
        """Bytes of the largest phase; on a CPU its buffers too."""
        return max(there + (0 if self.gpu else host) for there, host in self.phases)

    @property
    def buffers(self) -> int:
        """Bytes of the machine's memory that phases on a GPU need."""
        return max(host for _, host in self.phases) if self.gpu else 0

    @property
    def host(self) -> int:
        """Bytes of the machine's memory."""
        return self.process + self.buffers + (0 if self.gpu else self._model)

    @property
    def device(self) -> int:
        """Bytes of each GPU's memory, without a cache that takes the rest."""
        return self._model if self.gpu else 0

    @property
    def _model(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.cache or 0) + self.largest_pass


def batch_plan(config: Config) -> BatchPlan:
    """The batch arithmetic of a valid configuration.

    A row has 1 to `max_prompt_tokens + max_new_tokens − 1` input tokens. A forward pass takes at least
    `max(1, tokens_per_microbatch // row_tokens)` rows while there are as many, in either layout of
    `engines.policy.blocks`, which bounds the passes from above.
    """
    algo = config.algo
    rows = algo.prompts_per_step * algo.responses_per_prompt
    shards = algo.prompts_per_step // algo.prompts_per_shard
    minibatches = algo.prompts_per_step // algo.minibatch_prompts
    row_tokens = config.task.max_prompt_tokens + config.task.max_new_tokens - 1
    rows_per_rank = algo.minibatch_prompts // config.policy.ranks * algo.responses_per_prompt
    passes = math.ceil(rows_per_rank / max(1, config.policy.tokens_per_microbatch // row_tokens))
    # The first mini-batch's own training pass scores π_old.
    scoring = minibatches - 1 if algo.old_logp is OldLogprobs.learner else 0
    each = {d.role: (shards // d.count, math.ceil(shards / d.count)) for d in demands(config)}
    return BatchPlan(
        rows=rows,
        shards=shards,
        rows_per_shard=rows // shards,
        shards_per_replica=each,
        minibatches=minibatches,
        optimizer_steps=algo.epochs * minibatches,
        rows_per_rank=rows_per_rank,
        row_tokens=row_tokens,
        tokens=rows * row_tokens,
        passes_per_minibatch=passes,
        policy_passes=(algo.epochs * minibatches + scoring) * passes,
    )


def actor_memory(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> list[ActorMemory]:
    """Peak memory of one actor of each role; ``models`` has ``policy``, ``reference`` and ``reward``."""
    return [formula(config, batch, models) for formula in (rollout, learner, reference, reward)]


def learner(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One rank of the learner; rank 0, which also writes, where ranks differ.

    weights: P·b, with ZeRO-3 P·b/R and the gathered layers, at most DeepSpeed's live parameters.
    gradients: 4P, from ZeRO-2 on 4P/R. optimizer: two moments, 8P; from ZeRO-1 on a float32 copy too, 12P/R.
    Phases: the backward pass (`activations`, the reduction's bucket, fresh h twice), Adam's step (two
    temporaries and the flat gradient, 4P/R each), a weight bucket, and a checkpoint's file in the making:
    copies of what rank 0 gathers, except of what is complete in the machine's memory already.
    """
    model, b, ranks = models["policy"], itemsize(config.model.dtype), config.policy.ranks
    zero = deepspeed_config(config)["zero_optimization"]
    stage, gpu, parameters = zero["stage"], config.cluster.gpus_per_learner > 0, model.parameters
    share = math.ceil(parameters / ranks)
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    live = int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
    # On a CPU the bucket's pages exist once they are written.
    reduction = (bucket if gpu and stage else min(bucket, parameters)) * (b if stage else MASTER)
    fresh = 2 * batch.tokens // ranks * feedback_width(config, models) * b
    tokens = pass_tokens(config.policy.tokens_per_microbatch, batch.rows_per_rank, batch.row_tokens)
    backward = model.activations(tokens, b, checkpointing=config.policy.gradient_checkpointing)
    gathered = gpu or stage > 0
    state = min(OPTIMIZER_BYTES * parameters, FILE_BYTES + OPTIMIZER_BYTES * model.largest) if gathered else 0
    moments = MASTER * (3 * share if stage else 2 * parameters)
    return ActorMemory(
        role="policy",
        count=ranks,
        gpu=gpu,
        weights=parameters * b if stage < 3 else (share + min(live, parameters)) * b,
        gradients=MASTER * (share if stage >= 2 else parameters),
        optimizer=moments,
        phases=(
            (backward + reduction, fresh),
            (moments, fresh),
            (0, bucket_bytes(config, model)),
            (0, state + (parameters * b if gpu or stage == 3 else 0)),
        ),
    )


def rollout(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One vLLM engine; on GPUs, one of its tensor × pipeline parallel ranks.

    weights: P·b over the ranks. cache: of each of `cached_tokens` slots, keys and values over the ranks, and
    in the side buffer the rank's own columns of h, w/TP, and 16 bytes. Phases: a forward pass with its logits
    and the exports of its share of a step, twice; loading weights, a second copy of the largest tensor beside
    the bucket.
    """
    model, b = models["policy"], itemsize(config.model.dtype)
    args, gpu = config.rollout.engine_args, config.cluster.gpus_per_rollout > 0
    tensor = int(args.get("tensor_parallel_size", 1))
    # On a CPU all ranks are in the machine's memory.
    divided = tensor * int(args.get("pipeline_parallel_size", 1)) if gpu else 1
    rows = min(int(args.get("max_num_seqs", SEQUENCES)), batch.rows)
    tokens = min(int(args.get("max_num_batched_tokens", BATCHED_TOKENS)), rows * batch.row_tokens)
    share = batch.shards_per_replica["rollout"][1] * batch.rows_per_shard * batch.row_tokens
    width, slots = feedback_width(config, models), cached_tokens(config, model)
    slot = model.layers * model.key_value * b // divided
    if width and config.feedback.source is FeedbackSource.rollout:
        slot += width // tensor * b + SOURCE_BYTES if gpu else width * b + SOURCE_BYTES * tensor
    logits = LOGIT_COPIES * 4 * rows * model.vocabulary
    answers = 2 * share * (width * b + SOURCE_BYTES) if width else 0
    return ActorMemory(
        role="rollout",
        count=config.rollout.replicas,
        gpu=gpu,
        weights=model.parameters * b // divided,
        cache=None if slots is None else slots * slot,
        phases=(
            (model.inference(tokens, b) + logits, answers),
            (model.largest * b, bucket_bytes(config, model)),
        ),
    )


def reference(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One reference replica: weights P·b, and the forward pass of one shard with its logits."""
    model, b = models["reference"], itemsize(config.model.dtype)
    tokens = pass_tokens(config.reference.tokens_per_microbatch, batch.rows_per_shard, batch.row_tokens)
    return ActorMemory(
        role="reference",
        count=config.reference.replicas,
        gpu=config.cluster.gpus_per_reference > 0,
        weights=model.parameters * b,
        phases=((model.inference(tokens, b) + model.logits(tokens), 0),),
    )


def reward(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> ActorMemory:
    """One reward replica: the frozen trunk, P·b, and the R2M head in float32.

    The head has two gradients (Eqs. 5 and 6 apart), two moments, and for a while their parts and Adam's
    temporaries. Conversations are taken to be as long as the policy's rows.
    """
    model, b = models["reward"], itemsize(config.model.reward_dtype)
    head = 4 * head_parameters(config, models)
    tokens = pass_tokens(config.reward.tokens_per_microbatch, batch.rows_per_shard, batch.row_tokens + 1)
    states = batch.rows_per_shard * batch.row_tokens * feedback_width(config, models) * 4
    noise = 3 * states if config.feedback.noise else 0
    gpu = config.cluster.gpus_per_reward > 0
    return ActorMemory(
        role="reward",
        count=config.reward.replicas,
        gpu=gpu,
        weights=model.parameters * b + head,
        gradients=2 * head,
        optimizer=2 * head,
        # On a CPU h is read where it lies, in the object store.
        phases=((model.inference(tokens, b), 0), (3 * head + noise + (states if gpu else 0), 0)),
    )


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
    if gpu and "kv_cache_memory_bytes" not in args:
        return None
    space = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * GIB
    size = int(args.get("kv_cache_memory_bytes", space))
    return size // (block * model.layers * model.key_value * itemsize(config.model.dtype)) * block


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


def record_bytes(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> dict[str, int]:
    """Bytes of a step's records in the object store, rows of full length.

    trajectories 25·T + 9·N; hidden T·w·b; fresh_hidden the same where the learner refreshes it; annotation
    N·(4·D + 20); reference 8·T; human_pairs what 2 rows for each group add to trajectories, hidden and
    annotation.
    """
    hidden = batch.tokens * feedback_width(config, models) * itemsize(config.model.dtype)
    trajectories = batch.tokens * TRAJECTORY_BYTES + 9 * batch.rows
    annotation = batch.rows * (4 * models["reward"].width + 20)
    pairs = 2 * (trajectories + hidden + annotation) // config.algo.responses_per_prompt
    return {
        "trajectories": trajectories,
        "hidden": hidden,
        "fresh_hidden": hidden if config.feedback.refresh is not FeedbackRefresh.none else 0,
        "annotation": annotation,
        "reference": REFERENCE_BYTES * batch.tokens,
        "human_pairs": pairs if config.reward.anchor_fraction > 0 else 0,
    }


def checkpoint_bytes(config: Config, models: Mapping[str, ModelSizes]) -> int:
    """Bytes of one checkpoint: the policy in its own dtype, its exact state, the head and its moments."""
    policy = models["policy"].parameters * (itemsize(config.model.dtype) + OPTIMIZER_BYTES)
    return policy + OPTIMIZER_BYTES * head_parameters(config, models)
