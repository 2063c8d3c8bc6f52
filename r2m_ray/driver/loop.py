"""R2M, Algorithm 1 of arXiv 2601.22664, as a driver.

It passes references between the four roles and reads numbers per row alone, which become advantages and
metrics. It knows the roles as Protocols: Ray actors on a cluster, plain objects in one process.
"""

from __future__ import annotations

import math
from asyncio import gather
from collections.abc import Sequence

from torch import Tensor

from r2m_ray.config.schema import Advantage, Config, KLPlace, OmegaSchedule, RewardShape
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.core.head import omega
from r2m_ray.core.roles import Roles
from r2m_ray.core.shaping import step_advantages
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.metrics import step_metrics
from r2m_ray.driver.monitor import Watch
from r2m_ray.driver.rollouts import read_examples, rollout_records
from r2m_ray.driver.rows import Rows
from r2m_ray.errors import RunError
from r2m_ray.run.checkpoint import Checkpoints
from r2m_ray.run.log import RunLog
from r2m_ray.run.stop import StopRequest
from r2m_ray.tasks.data import PromptOrder


async def train(
    config: Config,
    roles: Roles,
    prompts: PromptOrder,
    human: HumanPairs,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    log: RunLog,
    stop: StopRequest,
) -> None:
    """Run R2M (Algorithm 1). One loop body is one training step t.

    Raises:
        Preempted, Alarmed: after the step's commit, where a signal or an alarm ends the run.
        RunError, ActorLost: where a guard stops the run, or actors are lost.
    """
    algo, rollout, policy, reward, reference = (
        config.algo, roles.rollout, roles.policy, roles.reward, roles.reference
    )  # fmt: skip

    start = await checkpoints.restore(roles)
    log.rewind(start)
    watch = Watch(config, log.steps())
    await roles.sync(version=start)
    if start == 0:
        await human.warm_up()
        await evaluate(evaluator, log, 0)
    r0 = initial_reward(config, log)  # for reward.shape alone

    for t in range(start + 1, algo.steps + 1):
        stop.check()
        if watch.ends_run:
            raise watch.error()
        w = omega_at(config, t)  # Eq. 4

        with log.phase("sample"):  # Trajectory Sampling
            plans = sample_plans(config, prompts.of_step(t), step=t)
            sampled, trajectories, hidden = await rollout.sample(plans)
            watch.versions(t, [shard.version for shard in sampled])

        with log.phase("annotate"):  # Reward Annotation, Eqs. 3–4
            (scores, annotation), (kl, logprobs) = await gather(
                reward.annotate(trajectories, hidden, omega=w, step=t), reference.logprobs(trajectories)
            )
            rows = Rows.of(sampled, scores, kl, group_size=algo.responses_per_prompt)
            advantage = advantages(config, rows, r0)  # Eq. 1
            examples = await read_examples(config, roles, trajectories, hidden, annotation)

        with log.phase("policy"):  # Policy Optimization, Eq. 2: k epochs; the last one refreshes h
            policy_stats, hidden = await policy.update(trajectories, advantage, logprobs, hidden)

        with log.phase("reward"):  # Reward Model Optimization, Eqs. 5–7, while π_old ← π_θ
            pairs = await human.annotated(t, omega=w)  # none without reward.anchor_fraction
            reward_stats, sync_stats = await gather(
                reward.update(hidden, annotation, pairs, omega=w, step=t), roles.sync(version=t)
            )

        metrics = step_metrics(config, w, rows, advantage, examples, policy_stats, reward_stats, sync_stats)
        metrics |= watch.observe(t, metrics)
        log.step(t, metrics, rollout_records(t, w, rows, advantage, examples))
        log.message("\n".join(watch.news()))
        watch.guard(t, metrics, rows.broken(plans))

        if t == algo.steps or due(t, config.evaluate.every):
            await evaluate(evaluator, log, t)
        if t == algo.steps or due(t, config.checkpoint.every) or stop.requested or watch.ends_run:
            with log.phase("checkpoint"):
                await checkpoints.save(t, roles)


def omega_at(config: Config, step: int) -> float:
    """ω(t) of Eq. 4, or its floor throughout with ``reward.omega_schedule=constant``."""
    if config.reward.omega_schedule is OmegaSchedule.constant:
        return config.reward.omega_floor
    return omega(step, config.algo.steps, config.reward.omega_floor)


def sample_plans(config: Config, prompts: Sequence[Prompt], step: int) -> list[SamplePlan]:
    """Cut a step's prompts into shards of ``algo.prompts_per_shard``, K responses each."""
    size = config.algo.prompts_per_shard
    return [
        SamplePlan(
            prompts=tuple(prompts[i : i + size]),
            group_size=config.algo.responses_per_prompt,
            step=step,
            seed=config.run.seed,
            temperature=config.algo.temperature,
            max_new_tokens=config.task.max_new_tokens,
            greedy_first=config.algo.advantage is Advantage.remax,
        )
        for i in range(0, len(prompts), size)
    ]


def advantages(config: Config, rows: Rows, initial_reward: float = math.nan) -> list[Tensor]:
    """Advantages of a batch (Eq. 1 and its siblings), float32 [N] per shard."""
    algo, reward = config.algo, config.reward
    penalty_N = algo.kl_weight * rows.kl_penalty_N if algo.kl_place is KLPlace.reward else None
    if penalty_N is not None and algo.advantage is Advantage.remax:
        # Greedy rows report log-probs at temperature 1, and were drawn from no distribution.
        penalty_N.view(-1, rows.group_size)[:, 0] = 0
    advantage_N = step_advantages(
        rows.reward_N,
        rows.frozen_reward_N,
        rows.gold_N.float(),
        penalty_N,
        group_size=rows.group_size,
        advantage=algo.advantage.value,
        scale=reward.scale.value,
        shape=reward.shape.value,
        initial_reward=initial_reward,
        gold_weight=reward.gold_weight,
    )
    return list(advantage_N.split(rows.shard_sizes))


def initial_reward(config: Config, log: RunLog) -> float:
    """Mean reward of the evaluation before step 1, as the run's log keeps it; NaN where none is needed.

    Raises RunError where ``reward.shape`` needs it and it is not a number.
    """
    if config.reward.shape is RewardShape.raw:
        return math.nan
    found = [row["reward/mean"] for row in log.evaluations() if row["step"] == 0]
    if not found or found[-1] is None or not math.isfinite(found[-1]):
        raise RunError(
            f"reward.shape={config.reward.shape.value}: step 0's evaluation has no finite reward. If the run "
            "goes on, restore metrics.jsonl; if it is new, examine model.reward"
        )
    return float(found[-1])


async def evaluate(evaluator: Evaluator, log: RunLog, step: int) -> None:
    """Measure policy and reward model as they are, and log it."""
    with log.phase("evaluate"):
        found = await evaluator.measure()
    log.evaluation(step, found)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, never where that is 0, happens at this one."""
    return every > 0 and step % every == 0
