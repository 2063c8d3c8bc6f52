"""Rules between the fields that say what a run computes: its name, data, batches, losses and models."""

from __future__ import annotations

import re
from collections.abc import Iterator

from r2m_ray.config.choices import GOLD_TASKS
from r2m_ray.config.rule import Rule, near, registrar
from r2m_ray.config.schema import (
    Advantage,
    Config,
    FeedbackRefresh,
    KLEstimator,
    KLPlace,
    OmegaSchedule,
    OnAlarm,
    PairSource,
    RewardConfig,
    RewardScale,
    RewardShape,
    TaskName,
)
from r2m_ray.errors import Problem, shown

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
LEAST_TEMPERATURE = 0.01
"""vLLM silently samples at 0.01 where less is asked for, and the learner's log-probs would not."""

RULES: list[Rule] = []
rule = registrar(RULES)


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


@rule("algo.prompts_per_step", "algo.prompts_per_shard")
def _whole_shards(config: Config) -> Iterator[Problem]:
    step, shard = config.algo.prompts_per_step, config.algo.prompts_per_shard
    if step % shard:
        message = f"{step} is not a multiple of algo.prompts_per_shard={shard}; use {near(step, shard)}"
        yield Problem("algo.prompts_per_step", message)


@rule("algo.prompts_per_step", "algo.minibatch_prompts", "algo.prompts_per_shard", "policy.ranks")
def _whole_minibatches(config: Config) -> Iterator[Problem]:
    step, minibatch = config.algo.prompts_per_step, config.algo.minibatch_prompts
    shard, ranks = config.algo.prompts_per_shard, config.policy.ranks
    if minibatch % (shard * ranks):
        yield Problem(
            "algo.minibatch_prompts",
            f"{minibatch} is not a multiple of {shard * ranks} (algo.prompts_per_shard={shard} × "
            f"policy.ranks={ranks}); use {near(minibatch, shard * ranks)}",
        )
    elif minibatch > step:
        message = f"{minibatch} is more than algo.prompts_per_step={step}; use at most {step}"
        yield Problem("algo.minibatch_prompts", message)
    elif step % minibatch:
        message = f"{step} is not a multiple of algo.minibatch_prompts={minibatch}; "
        yield Problem("algo.prompts_per_step", f"{message}use {near(step, minibatch)}")


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
        yield Problem(
            "reward.pair_min_margin",
            f"{config.reward.pair_min_margin:g}, but pairs drawn at random have no margin; use 0, or another "
            "reward.pair_source",
        )


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
    for field, chosen, usual in (
        ("reward.pair_source", config.reward.pair_source.value, RewardConfig().pair_source.value),
        ("reward.pair_min_margin", config.reward.pair_min_margin, RewardConfig().pair_min_margin),
    ):
        if chosen != usual:
            yield Problem(
                field, f"{chosen}, but with reward.update_steps=0 no pair is learned from", warning=True
            )


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
            "k1 as a term of the loss has an expected gradient of zero on the policy's own samples, so it "
            "holds nothing back; use k3 or k2, or algo.kl_place=reward",
            warning=True,
        )
    elif algo.kl_place is KLPlace.reward and algo.kl_estimator is not KLEstimator.k1:
        yield Problem(
            "algo.kl_estimator",
            f"{algo.kl_estimator.value} as a part of the reward is not differentiated, and the gradient of "
            "the KL is then missing a part; use k1, or algo.kl_place=loss",
            warning=True,
        )


@rule("algo.temperature")
def _temperature(config: Config) -> Iterator[Problem]:
    temperature = config.algo.temperature
    if temperature < LEAST_TEMPERATURE:
        yield Problem(
            "algo.temperature",
            f"{temperature:g} is below {LEAST_TEMPERATURE}, at which vLLM would sample instead; use "
            f"{LEAST_TEMPERATURE} or more",
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
