"""Rules between fields, and every problem of a configuration at once.

Rules are pure: they look at values only, never at files or the machine (``preflight`` does that), and
they return problems instead of raising, so that all of them reach the user at once. A rule names
the fields it reads, and is skipped where one of them is already known to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from r2m_ray.config.fields import fields, value_problems, values
from r2m_ray.config.schema import (
    GOLD_TASKS,
    PREPARED,
    Advantage,
    Config,
    Dtype,
    FeedbackRefresh,
    KLEstimator,
    KLPlace,
    OmegaSchedule,
    OnAlarm,
    PairSource,
    RewardScale,
    RewardShape,
    SyncBackend,
    TaskName,
)
from r2m_ray.errors import Problem, shown

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU backend computes."""
LEAST_OBJECT_STORE_GB = 0.08
GPUS = tuple(f"cluster.gpus_per_{role}" for role in ("learner", "rollout", "reference", "reward"))

Check = Callable[[Config], Iterator[Problem]]
RULES: list[tuple[tuple[str, ...], Check]] = []
"""The dotted paths that a check reads, and the check."""


def rule(*reads: str) -> Callable[[Check], Check]:
    """Add a check, with the paths that it reads, to the rules."""

    def register(check: Check) -> Check:
        RULES.append((reads, check))
        return check

    return register


def validate(config: Config, wrong: Collection[str] = ()) -> list[Problem]:
    """Every problem of a configuration: values that a field does not take, then rules that are broken.

    ``wrong`` are paths of fields that could not be read, whose values in ``config`` nobody wrote.
    """
    problems = [problem for problem in value_problems(config) if problem.path not in wrong]
    excluded = {*wrong, *(problem.path for problem in problems)}
    for reads, check in RULES:
        if excluded.isdisjoint(reads):
            problems += check(config)
    return problems


# What a run computes: its name, data, batches, losses and models


@rule("run.name")
def _run_name(config: Config) -> Iterator[Problem]:
    if not RUN_NAME.fullmatch(config.run.name):
        yield Problem(
            "run.name",
            f"'{shown(config.run.name)}' is not 1 to 100 of A-Z a-z 0-9 . _ - (no dot first); "
            "choose such a name, and say where by run.root",
        )


@rule("run.root", "prepare.root", "model.policy", "model.reward", "cluster.address")
def _empty_names(config: Config) -> Iterator[Problem]:
    names = values(config, "run.root", "prepare.root", "model.policy", "model.reward", "cluster.address")
    for path, value in names.items():
        if not value.strip():
            yield Problem(path, "is empty; give a value or leave the field out")


@rule("task.name", "task.train_file", "task.eval_file")
def _data_files(config: Config) -> Iterator[Problem]:
    reads_files = config.task.name is TaskName.preferences
    for path, value in values(config, "task.train_file", "task.eval_file").items():
        if reads_files and not value:
            yield Problem(path, f"is needed for preferences: JSONL, Parquet or a datasets id; give {path}=…")
        elif value and not reads_files:
            yield Problem(
                path, f"{shown(value)} is read by task=preferences alone; choose that or leave it out"
            )


@rule(
    "cluster.address", "policy.ranks", "rollout.replicas", "reward.replicas", "reference.replicas",
    "sync.backend",
)  # fmt: skip
def _one_process(config: Config) -> Iterator[Problem]:
    if config.cluster.address != "none":
        return
    counts = values(config, "policy.ranks", "rollout.replicas", "reward.replicas", "reference.replicas")
    for path, count in counts.items():
        if count != 1:
            yield Problem(path, f"{count}, but cluster.address=none runs one worker of each role; use 1")
    if config.sync.backend is not SyncBackend.object_store:
        backend = config.sync.backend.value
        yield Problem("sync.backend", f"{backend}, but cluster.address=none has no peers; use object_store")


@rule("algo.prompts_per_step", "algo.prompts_per_shard")
def _complete_shards(config: Config) -> Iterator[Problem]:
    step, shard = config.algo.prompts_per_step, config.algo.prompts_per_shard
    if step % shard:
        message = f"{step} is not a multiple of algo.prompts_per_shard={shard}; use {_near(step, shard)}"
        yield Problem("algo.prompts_per_step", message)


@rule("algo.prompts_per_step", "algo.minibatch_prompts", "algo.prompts_per_shard", "policy.ranks")
def _complete_minibatches(config: Config) -> Iterator[Problem]:
    step, minibatch = config.algo.prompts_per_step, config.algo.minibatch_prompts
    shard, ranks = config.algo.prompts_per_shard, config.policy.ranks
    if minibatch % (shard * ranks):
        yield Problem(
            "algo.minibatch_prompts",
            f"{minibatch} is not a multiple of {shard * ranks} (algo.prompts_per_shard={shard} × "
            f"policy.ranks={ranks}); use {_near(minibatch, shard * ranks)}",
        )
    elif minibatch > step:
        message = f"{minibatch} is more than algo.prompts_per_step={step}; use at most {step}"
        yield Problem("algo.minibatch_prompts", message)
    elif step % minibatch:
        message = f"{step} is not a multiple of algo.minibatch_prompts={minibatch}; "
        yield Problem("algo.prompts_per_step", f"{message}use {_near(step, minibatch)}")


@rule(
    "algo.prompts_per_step", "algo.prompts_per_shard",
    "rollout.replicas", "reward.replicas", "reference.replicas",
)  # fmt: skip
def _idle_replicas(config: Config) -> Iterator[Problem]:
    shards = -(-config.algo.prompts_per_step // config.algo.prompts_per_shard)
    for path, count in values(config, "rollout.replicas", "reward.replicas", "reference.replicas").items():
        if count > shards:
            message = (
                f"{count} are more than a step's {shards} shards (algo.prompts_per_step / prompts_per_shard)"
            )
            yield Problem(path, f"{message}, so some never work; use at most {shards}, or smaller shards")


@rule("algo.responses_per_prompt", "reward.entropy_weight", "reward.update_steps")
def _groups_of_two(config: Config) -> Iterator[Problem]:
    alpha = config.reward.entropy_weight
    if config.algo.responses_per_prompt > 2 or config.reward.update_steps == 0 or alpha == 0:
        return
    yield Problem(
        "reward.entropy_weight",
        f"{alpha:g}, but group reward entropy (Eq. 6) is constant with algo.responses_per_prompt=2, so "
        f"{'nothing is learned' if alpha == 1 else 'it has no effect'}; use 3 responses or more, or weight 0",
        warning=alpha < 1,
    )


@rule(
    "feedback.refresh", "algo.epochs", "algo.minibatch_prompts", "algo.prompts_per_step",
    "reward.update_steps", "reward.omega_floor",
)  # fmt: skip
def _refresh(config: Config) -> Iterator[Problem]:
    learns_from_h = config.uses_feedback and config.reward.update_steps > 0
    one_step = config.algo.epochs == 1 and config.algo.minibatch_prompts >= config.algo.prompts_per_step
    if learns_from_h and one_step and config.feedback.refresh is FeedbackRefresh.last_epoch:
        yield Problem(
            "feedback.refresh",
            "last_epoch, but with algo.epochs=1 and one minibatch h is computed before the policy moves, so "
            "it is not refreshed; use algo.epochs=2, smaller minibatches, or feedback.refresh=exact",
            warning=True,
        )


@rule("task.name", "reward.pair_source", "reward.gold_weight")
def _gold(config: Config) -> Iterator[Problem]:
    if config.task.name in GOLD_TASKS:
        return
    unknown = f"task.name={config.task.name.value} knows no gold score; use task.name={GOLD_TASKS[0].value}"
    if config.reward.pair_source is PairSource.gold:
        yield Problem("reward.pair_source", f"gold, but {unknown}, or another source of pairs")
    if config.reward.gold_weight:
        yield Problem("reward.gold_weight", f"{config.reward.gold_weight:g}, but {unknown}, or weight 0")


@rule("reward.pair_source", "reward.pair_min_margin")
def _random_margin(config: Config) -> Iterator[Problem]:
    if config.reward.pair_source is PairSource.random and config.reward.pair_min_margin:
        message = f"{config.reward.pair_min_margin:g}, but pairs drawn at random have no margin"
        yield Problem("reward.pair_min_margin", f"{message}; use 0, or another reward.pair_source")


@rule("reward.scale", "algo.advantage", "algo.kl_place", "algo.kl_weight", "reward.gold_weight")
def _scale(config: Config) -> Iterator[Problem]:
    algo = config.algo
    own_scale = algo.advantage in (Advantage.grpo, Advantage.reinforce_pp)
    charged = algo.kl_place is KLPlace.reward and algo.kl_weight > 0
    mixed = 0 < config.reward.gold_weight < 1
    if config.reward.scale is RewardScale.match_frozen and own_scale and not (charged or mixed):
        yield Problem(
            "reward.scale",
            f"match_frozen has no effect: algo.advantage={algo.advantage.value} divides by the rewards' own "
            "spread; use raw, or rloo, dr_grpo or remax",
            warning=True,
        )


@rule("reward.shape", "reward.omega_schedule", "reward.omega_floor", "reward.gold_weight", "algo.advantage")
def _shape(config: Config) -> Iterator[Problem]:
    reward, shape = config.reward, config.reward.shape
    if shape is RewardShape.raw:
        return
    if config.uses_feedback and reward.omega_schedule is OmegaSchedule.cosine:
        yield Problem(
            "reward.omega_schedule",
            f"cosine, but reward.shape={shape.value} measures rewards from the initial policy's, which are "
            f"read at ω = {reward.omega_floor:g}; use constant",
        )
    if config.algo.advantage is Advantage.grpo:
        yield Problem(
            "reward.shape",
            f"{shape.value} bounds what a group's best can gain, and algo.advantage=grpo divides by the "
            "group's spread again; use rloo, dr_grpo or remax",
            warning=True,
        )
    if reward.gold_weight == 1:
        message = f"{shape.value}, but with reward.gold_weight=1 no advantage comes from the reward model"
        yield Problem("reward.shape", message, warning=True)


@rule("reward.pair_source", "reward.pair_min_margin", "reward.update_steps")
def _pairs_unused(config: Config) -> Iterator[Problem]:
    if config.reward.update_steps > 0:
        return
    for path, chosen in values(config, "reward.pair_source", "reward.pair_min_margin").items():
        if chosen != fields()[path].default:
            message = f"{chosen}, but with reward.update_steps=0 no pair is learned from"
            yield Problem(path, message, warning=True)


@rule("reward.anchor_fraction", "reward.update_steps", "reward.entropy_weight")
def _anchor(config: Config) -> Iterator[Problem]:
    reward = config.reward
    if reward.anchor_fraction > 0 and reward.update_steps == 0:
        yield Problem(
            "reward.anchor_fraction",
            f"{reward.anchor_fraction:g}, but with reward.update_steps=0 no step learns from human pairs; "
            "use reward.update_steps=1, or reward.warmup_pairs to learn before the first step",
        )
    elif reward.anchor_fraction > 0 and reward.entropy_weight == 1:
        yield Problem(
            "reward.anchor_fraction",
            f"{reward.anchor_fraction:g} is a share of Bradley–Terry, which reward.entropy_weight=1 leaves "
            "no weight; lower that, or use anchor_fraction=0",
        )


@rule("reward.warmup_pairs", "reward.warmup_learning_rate", "task.name", "prepare.pair_rows")
def _warm_up(config: Config) -> Iterator[Problem]:
    pairs, rows = config.reward.warmup_pairs, config.prepare.pair_rows
    if config.task.name is TaskName.note2answer and pairs > rows:
        message = f"{pairs}, but the task has prepare.pair_rows={rows} training pairs; use at most {rows}"
        yield Problem("reward.warmup_pairs", message)
    if pairs > 0 and config.reward.warmup_learning_rate == 0:
        message = f"0, so reward.warmup_pairs={pairs} teach nothing; use 1e-3, or no pairs"
        yield Problem("reward.warmup_learning_rate", message)


@rule("reward.warmup_pairs", "reward.omega_schedule", "reward.omega_floor")
def _omega_of_the_warm_up(config: Config) -> Iterator[Problem]:
    reward = config.reward
    if reward.warmup_pairs > 0 and config.uses_feedback and reward.omega_schedule is OmegaSchedule.cosine:
        yield Problem(
            "reward.omega_schedule",
            f"cosine reads the head at ω near 1 first, but reward.warmup_pairs={reward.warmup_pairs} fit it "
            f"at ω = {reward.omega_floor:g}; use constant",
            warning=True,
        )


@rule("algo.kl_weight", "algo.kl_place", "algo.kl_estimator")
def _kl_gradient(config: Config) -> Iterator[Problem]:
    algo = config.algo
    if algo.kl_weight == 0:
        return
    if algo.kl_place is KLPlace.loss and algo.kl_estimator is KLEstimator.k1:
        yield Problem(
            "algo.kl_estimator",
            "k1 as a term of the loss has an expected gradient of zero on the policy's own samples; use k3, "
            "k2, or algo.kl_place=reward",
            warning=True,
        )
    elif algo.kl_place is KLPlace.reward and algo.kl_estimator is not KLEstimator.k1:
        yield Problem(
            "algo.kl_estimator",
            f"{algo.kl_estimator.value} as a part of the reward is not differentiated, and the gradient of "
            "the KL is then missing a part; use k1, or algo.kl_place=loss",
            warning=True,
        )


@rule("monitor.on_alarm", "monitor.steps", "algo.steps")
def _alarms_in_time(config: Config) -> Iterator[Problem]:
    monitor, steps = config.monitor, config.algo.steps
    if monitor.on_alarm is OnAlarm.stop and monitor.steps >= steps:
        yield Problem(
            "monitor.steps",
            f"{monitor.steps} steps must pass before there can be an alarm, and algo.steps={steps}, so "
            "monitor.on_alarm=stop would never stop this run; use fewer",
            warning=True,
        )


# What `r2m-ray prepare` makes


@rule("prepare.policy_width", "prepare.policy_heads", "prepare.reward_width", "prepare.reward_heads")
def _heads(config: Config) -> Iterator[Problem]:
    prepare = config.prepare
    for role, width, heads in (
        ("policy", prepare.policy_width, prepare.policy_heads),
        ("reward", prepare.reward_width, prepare.reward_heads),
    ):
        # Rotary positions turn one half of a head against the other.
        if width % (2 * heads):
            yield Problem(
                f"prepare.{role}_width",
                f"{width} does not give prepare.{role}_heads={heads} heads an even width each; "
                f"use {_near(width, 2 * heads)}",
            )


@rule(
    "prepare.policy_width", "prepare.policy_heads", "model.policy", "cluster.gpus_per_rollout",
)  # fmt: skip
def _head_size(config: Config) -> Iterator[Problem]:
    width, heads = config.prepare.policy_width, config.prepare.policy_heads
    sampled_on_cpu = config.model.policy == PREPARED and config.cluster.gpus_per_rollout == 0
    if sampled_on_cpu and width % (2 * heads) == 0 and width // heads not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        closest = min(CPU_HEAD_SIZES, key=lambda size: abs(size - width / heads))
        yield Problem(
            "prepare.policy_width",
            f"{width} gives prepare.policy_heads={heads} heads {width // heads} each, and vLLM's attention "
            f"on a CPU has {sizes}; use {closest * heads}",
        )


# Where a run computes: engines, GPUs, weight sync, cluster, deadlines


@rule("sync.backend", "cluster.gpus_per_learner", "cluster.gpus_per_rollout")
def _sync_backend(config: Config) -> Iterator[Problem]:
    learner, rollout = config.cluster.gpus_per_learner, config.cluster.gpus_per_rollout
    backend = config.sync.backend
    given = f"cluster.gpus_per_learner={learner:g} and cluster.gpus_per_rollout={rollout:g}"
    if backend is not SyncBackend.object_store and 0 in (learner, rollout):
        message = f"{backend.value} joins GPUs, but {given}; give both one, or use object_store"
        yield Problem("sync.backend", message)
    elif backend is SyncBackend.ipc and learner + rollout > 1:
        message = f"ipc shares the memory of one GPU, but with {given} no two of them share one"
        yield Problem("sync.backend", f"{message}; use nccl, or shares that add up to 1")


@rule(*GPUS)
def _complete_gpus(config: Config) -> Iterator[Problem]:
    for path, count in values(config, *GPUS).items():
        if count > 1 and path != "cluster.gpus_per_rollout":
            yield Problem(path, f"{count:g}, but each of these actors computes on one GPU; use 1")
        elif count > 1 and count % 1:
            near = f"use {int(count)} or {int(count) + 1}"
            yield Problem(path, f"{count:g} is neither a share of one GPU nor a whole number; {near}")


@rule("policy.ranks", "reward.replicas", "cluster.gpus_per_learner", "cluster.gpus_per_reward")
def _shared_gpus(config: Config) -> Iterator[Problem]:
    counts = values(config, "policy.ranks", "reward.replicas")
    gpus = values(config, "cluster.gpus_per_learner", "cluster.gpus_per_reward")
    for (field, count), (path, share) in zip(counts.items(), gpus.items(), strict=True):
        if count > 1 and 0 < share < 1:
            message = f"{share:g} may put two of {field}={count} on one GPU, where NCCL cannot join them"
            yield Problem(path, f"{message}; use 1, or {field}=1")


@rule("rollout.engine_args", "cluster.gpus_per_rollout")
def _engine_gpus(config: Config) -> Iterator[Problem]:
    args, gpus = config.rollout.engine_args, config.cluster.gpus_per_rollout
    sizes = {}
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        sizes[name] = args.get(name, 1)
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            path = f"rollout.engine_args.{name}"
            yield Problem(path, f"{shown(sizes[name])} is not a whole number ≥ 1; leave it out for 1")
            return
    if sizes["data_parallel_size"] > 1:
        message = f"{sizes['data_parallel_size']}, but engines are replicated by rollout.replicas; use that"
        yield Problem("rollout.engine_args.data_parallel_size", message)
    ranks = sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"]
    if ranks > 1 and args.get("distributed_executor_backend") != "mp":
        yield Problem(
            "rollout.engine_args.distributed_executor_backend",
            f"an engine of {ranks} ranks runs inside the placement of its actor; set it to mp",
        )
    # On CPUs the ranks share the cores of their actor.
    if gpus and ranks != max(gpus, 1) and (gpus <= 1 or gpus == int(gpus)):
        yield Problem(
            "cluster.gpus_per_rollout",
            f"{gpus:g}, but an engine computes on tensor_parallel_size × pipeline_parallel_size = {ranks} "
            f"(rollout.engine_args); make them equal",
        )


@rule("cluster.phase_timeout_s", "cluster.stop_grace_s")
def _deadlines(config: Config) -> Iterator[Problem]:
    grace, phase = config.cluster.stop_grace_s, config.cluster.phase_timeout_s
    if grace >= phase:
        yield Problem(
            "cluster.stop_grace_s",
            f"{grace:g} is not less than cluster.phase_timeout_s={phase:g}, so after a stop signal it would "
            f"first replace an actor that hangs; use {0.9 * phase:g} or less",
        )


@rule("model.dtype", "model.reward_dtype")
def _half_precision_on_cpu(config: Config) -> Iterator[Problem]:
    gpus = values(config, *GPUS)
    reward = gpus.pop("cluster.gpus_per_reward")
    for path, dtype, on_cpu in (
        ("model.dtype", config.model.dtype, 0 in gpus.values()),
        ("model.reward_dtype", config.model.reward_dtype, reward == 0),
    ):
        if dtype is Dtype.bfloat16 and on_cpu:
            message = "bfloat16 is slow and less exact on a CPU; use float32, or give every role of it a GPU"
            yield Problem(path, message, warning=True)


@rule(
    "cluster.address", "cluster.cpus", "cluster.cpus_per_actor",
    "policy.ranks", "rollout.replicas", "reward.replicas", "reference.replicas",
)  # fmt: skip
def _local_cpus(config: Config) -> Iterator[Problem]:
    cpus, each = config.cluster.cpus, config.cluster.cpus_per_actor
    counts = values(config, "policy.ranks", "rollout.replicas", "reward.replicas", "reference.replicas")
    actors = sum(counts.values())
    if config.cluster.address == "local" and actors * each > cpus:
        yield Problem(
            "cluster.cpus_per_actor",
            f"{actors} actors of {each:g} need more than cluster.cpus={cpus}; use {cpus / actors:.3g}, "
            "fewer replicas, or more cpus",
        )


@rule("cluster.address", "cluster.object_store_gb")
def _object_store(config: Config) -> Iterator[Problem]:
    size = config.cluster.object_store_gb
    if config.cluster.address == "local" and size < LEAST_OBJECT_STORE_GB:
        message = f"{size:g} is less than Ray starts with; use {LEAST_OBJECT_STORE_GB} or more"
        yield Problem("cluster.object_store_gb", message)


@rule("rollout.engine_args")
def _model_code(config: Config) -> Iterator[Problem]:
    path = "rollout.engine_args.trust_remote_code"
    if config.rollout.engine_args.get("trust_remote_code"):
        yield Problem(path, "code that comes with a model is never run; use a model that vLLM knows itself")


def _near(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, at least one unit."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
