"""R2M, Algorithm 1 of arXiv 2601.22664, as a driver.

It passes references between the four roles and reads numbers per row alone, which become advantages and
metrics. It knows the roles as Protocols: Ray actors on a cluster, plain objects in one process.
"""

from __future__ import annotations

from asyncio import gather

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Roles
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.metrics import step_metrics
from r2m_ray.driver.monitor import Watch
from r2m_ray.driver.rollouts import read_examples, rollout_records
from r2m_ray.driver.rows import Rows
from r2m_ray.driver.step import advantages, initial_reward, omega_at, sample_plans
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
    """Run R2M (Algorithm 1) from the newest commit on. One loop body is one training step t.

    Raises Preempted or Alarmed once the step is saved, RunError where a guard stops the run, and ActorLost.
    """
    algo, rollout, policy, reward = config.algo, roles.rollout, roles.policy, roles.reward

    start = await restore(roles, human, checkpoints, evaluator, log)
    watch = Watch(config, log.rows("step"))
    r0 = initial_reward(config, log.rows("eval"))  # for reward.shape alone

    for t in range(start + 1, algo.steps + 1):
        stop.check()
        watch.check()
        w = omega_at(config, t)  # Eq. 4

        with log.phase("sample"):  # Trajectory Sampling
            plans = sample_plans(config, prompts.of_step(t), step=t)
            sampled, trajectories, hidden = await rollout.sample(plans)
            watch.versions(t, [shard.version for shard in sampled])

        with log.phase("annotate"):  # Reward Annotation, Eqs. 3–4
            (scores, annotation), (kl, reference) = await gather(
                reward.annotate(trajectories, hidden, omega=w, step=t), roles.reference.logprobs(trajectories)
            )
            rows = Rows.of(sampled, scores, kl, group_size=algo.responses_per_prompt)
            advantage = advantages(config, rows, r0)  # Eq. 1
            examples = await read_examples(config, roles, trajectories, hidden, annotation)

        with log.phase("policy"):  # Policy Optimization, Eq. 2: k epochs; the last one refreshes h
            policy_stats, hidden = await policy.update(trajectories, advantage, reference, hidden)

        with log.phase("reward"):  # Reward Model Optimization, Eqs. 5–7, while π_old ← π_θ
            pairs = await human.annotated(t, omega=w)  # none without reward.anchor_fraction
            reward_stats, sync_stats = await gather(
                reward.update(hidden, annotation, pairs, omega=w, step=t), roles.sync(version=t)
            )

        metrics = step_metrics(config, w, rows, advantage, examples, policy_stats, reward_stats, sync_stats)
        metrics |= watch.observe(t, metrics)
        log.step(t, metrics, rollout_records(t, w, rows, advantage, examples), watch.news())
        watch.guard(t, metrics, rows.broken(plans))

        if t == algo.steps or due(t, config.evaluate.every):
            await evaluate(evaluator, log, t)
        if t == algo.steps or due(t, config.checkpoint.every) or stop.requested or watch.ends_run:
            with log.phase("checkpoint"):
                await checkpoints.save(t, roles)


async def restore(
    roles: Roles, human: HumanPairs, checkpoints: Checkpoints, evaluator: Evaluator, log: RunLog
) -> int:
    """Bring every role and the log to the newest commit, and return its step.

    Before step 1 the head is fitted to human pairs, where the run does that, and everything is measured.
    """
    start = await checkpoints.restore(roles)
    log.rewind(start)
    await roles.sync(version=start)
    if start == 0:
        await human.warm_up()
        await evaluate(evaluator, log, 0)
    return start


async def evaluate(evaluator: Evaluator, log: RunLog, step: int) -> None:
    """Measure policy and reward model as they are, and log it."""
    with log.phase("evaluate"):
        found = await evaluator.measure()
    log.evaluation(step, found)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, never where that is 0, happens at this one."""
    return every > 0 and step % every == 0
