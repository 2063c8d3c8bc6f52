"""How configuration fields must fit together: one rule per relation.

Rules are pure: they look at values only, never at files or the machine (``preflight`` does that), and
they return problems instead of raising, so that all of them reach the user at once. A rule names
the fields it reads, and is skipped where one of them is already known to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from r2m_ray.config import Config, Dtype, FeedbackRefresh, SyncBackend, TaskName
from r2m_ray.config_schema import range_problems
from r2m_ray.problems import Problem, hint, shown

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
LEAST_OBJECT_STORE_GB = 0.08

Check = Callable[[Config], Iterator[Problem]]
RULES: list[tuple[tuple[str, ...], Check]] = []


def rule(*reads: str) -> Callable[[Check], Check]:
    """Register a check together with the dotted paths it reads."""

    def register(check: Check) -> Check:
        RULES.append((reads, check))
        return check

    return register


def validate(config: Config, wrong: Collection[str] = ()) -> list[Problem]:
    """Every problem of a configuration: numbers out of range, then rules that are broken.

    ``wrong`` are paths of fields that could not be read, whose values in ``config`` nobody wrote.
    """
    problems = [problem for problem in range_problems(config) if problem.path not in wrong]
    excluded = {*wrong, *(problem.path for problem in problems)}
    for reads, check in RULES:
        if excluded.isdisjoint(reads):
            problems += check(config)
    return problems


@rule("run.name")
def _run_name(config: Config) -> Iterator[Problem]:
    if not RUN_NAME.fullmatch(config.run.name):
        yield Problem(
            "run.name",
            f"{shown(config.run.name)!r} is not 1 to 100 of A-Z a-z 0-9 . _ - (no dot first); "
            "choose such a name, and say where by run.root",
        )


@rule("run.root", "prepare.root", "model.policy", "model.reward", "cluster.address")
def _empty_names(config: Config) -> Iterator[Problem]:
    values = {
        "run.root": config.run.root,
        "prepare.root": config.prepare.root,
        "model.policy": config.model.policy,
        "model.reward": config.model.reward,
        "cluster.address": config.cluster.address,
    }
    for path, value in values.items():
        if not value.strip():
            yield Problem(path, "is empty; give a value or leave the field out")


@rule("algo.prompts_per_step", "algo.prompts_per_shard")
def _whole_shards(config: Config) -> Iterator[Problem]:
    step, shard = config.algo.prompts_per_step, config.algo.prompts_per_shard
    if step % shard:
        message = f"{step} is not a multiple of algo.prompts_per_shard={shard}; use {_near(step, shard)}"
        yield Problem("algo.prompts_per_step", message)


@rule("algo.prompts_per_step", "algo.minibatch_prompts", "algo.prompts_per_shard", "policy.ranks")
def _whole_minibatches(config: Config) -> Iterator[Problem]:
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
    replicas = {
        "rollout.replicas": config.rollout.replicas,
        "reward.replicas": config.reward.replicas,
        "reference.replicas": config.reference.replicas,
    }
    for path, count in replicas.items():
        if count > shards:
            yield Problem(
                path,
                f"{count} are more than the {shards} shards of a step (algo.prompts_per_step / "
                f"algo.prompts_per_shard), so some would never work; use at most {shards}, or smaller shards",
            )


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


@rule("sync.backend", "cluster.gpus_per_learner", "cluster.gpus_per_rollout")
def _sync_backend(config: Config) -> Iterator[Problem]:
    learner, rollout = config.cluster.gpus_per_learner, config.cluster.gpus_per_rollout
    if config.sync.backend is not SyncBackend.object_store and 0 in (learner, rollout):
        yield Problem(
            "sync.backend",
            f"{config.sync.backend.value} joins GPUs, but cluster.gpus_per_learner={learner:g} and "
            f"cluster.gpus_per_rollout={rollout:g}; give both one, or use object_store",
        )


@rule(
    "cluster.gpus_per_learner", "cluster.gpus_per_rollout",
    "cluster.gpus_per_reference", "cluster.gpus_per_reward",
)  # fmt: skip
def _whole_gpus(config: Config) -> Iterator[Problem]:
    for path, count in _gpus(config).items():
        if count > 1 and count % 1:
            below = int(count)
            message = (
                f"{count:g} is neither a share of one GPU nor a whole number; use {below} or {below + 1}"
            )
            yield Problem(path, message)


@rule("model.dtype", "model.reward_dtype")
def _half_precision_on_cpu(config: Config) -> Iterator[Problem]:
    gpus = _gpus(config)
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
    actors = sum(
        (config.policy.ranks, config.rollout.replicas, config.reward.replicas, config.reference.replicas)
    )
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


@rule("cluster.placement")
def _placement(config: Config) -> Iterator[Problem]:
    placement = config.cluster.placement
    if placement not in PLACEMENTS:
        message = f"{shown(placement)} is not one of {', '.join(PLACEMENTS)}."
        yield Problem("cluster.placement", message + hint(placement.upper(), PLACEMENTS))


@rule("task.name", "task.train_file", "task.eval_file")
def _data_files(config: Config) -> Iterator[Problem]:
    task = config.task
    for path, value in (("task.train_file", task.train_file), ("task.eval_file", task.eval_file)):
        if task.name is TaskName.preferences and not value:
            yield Problem(path, f"is needed for preferences: JSONL, Parquet or a datasets id; give {path}=…")
        elif task.name is not TaskName.preferences and value:
            yield Problem(
                path, f"{shown(value)} is read by task=preferences alone; choose it or leave this out"
            )


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


@rule("rollout.engine_args")
def _model_code(config: Config) -> Iterator[Problem]:
    path = "rollout.engine_args.trust_remote_code"
    if config.rollout.engine_args.get("trust_remote_code"):
        yield Problem(
            path, "code that comes with a model is never run; use a model that vLLM knows by itself"
        )


def _gpus(config: Config) -> dict[str, float]:
    return {
        "cluster.gpus_per_learner": config.cluster.gpus_per_learner,
        "cluster.gpus_per_rollout": config.cluster.gpus_per_rollout,
        "cluster.gpus_per_reference": config.cluster.gpus_per_reference,
        "cluster.gpus_per_reward": config.cluster.gpus_per_reward,
    }


def _near(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, at least one unit."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
