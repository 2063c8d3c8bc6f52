"""R2M, Algorithm 1 of arXiv 2601.22664, as a driver.

It passes references between the four roles and never touches their tensors; only the rewards,
one number per row, are read here, to become advantages. It knows the roles as Protocols: Ray
actors on a cluster, plain objects in a test.
"""

from __future__ import annotations

import math
from asyncio import gather
from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_ray.config.schema import Advantage, Config, KLPlace, OmegaSchedule
from r2m_ray.core.advantages import ADVANTAGES
from r2m_ray.core.batch import Annotation, Prompt, ReferenceLogprobs, SamplePlan, Trajectories
from r2m_ray.core.head import omega
from r2m_ray.core.policy_loss import row_kl
from r2m_ray.core.roles import Roles, Shards
from r2m_ray.core.shaping import SCALES, SHAPES, gold_mixture
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.recorder import Recorder
from r2m_ray.run.checkpoint import Checkpoints
from r2m_ray.run.stop import StopRequest
from r2m_ray.tasks.data import PromptStream


async def train(
    config: Config,
    roles: Roles,
    prompts: PromptStream,
    human: HumanPairs,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    record: Recorder,
    stop: StopRequest,
) -> None:
    """Run R2M (Algorithm 1). One loop body is one training step t."""
    algo, rollout, policy, reward = config.algo, roles.rollout, roles.policy, roles.reward

    start = await checkpoints.restore(roles, prompts)
    record.rewind(start)
    await roles.sync(version=start)
    if start == 0:
        await human.warm_up()
        await evaluator.evaluate(0)
    r0 = record.initial_reward  # for reward.shape alone

    for t in range(start + 1, algo.steps + 1):
        stop.check()
        record.check_alarms()
        w = omega_at(config, t)  # Eq. 4

        with record.phase("sample"):  # Trajectory Sampling
            plans = sample_plans(config, prompts.take(algo.prompts_per_step), step=t)
            trajectories, hidden = await rollout.sample(plans)

        with record.phase("annotate"):  # Reward Annotation, Eqs. 3–4
            annotation, reference = await gather(
                reward.annotate(trajectories, hidden, omega=w, step=t),
                roles.reference.logprobs(trajectories),
            )
            advantage = await advantages(config, trajectories, annotation, reference, r0)  # Eq. 1
            await record.look(t, trajectories, hidden, annotation)  # refuses rows of stale weights

        with record.phase("policy"):  # Policy Optimization, Eq. 2: k epochs; the last one refreshes h
            policy_stats, hidden = await policy.update(trajectories, advantage, reference, hidden)

        with record.phase("reward"):  # Reward Model Optimization, Eqs. 5–7, while π_old ← π_θ
            pairs = await human.annotated(t, omega=w)  # none without reward.anchor_fraction
            reward_stats, sync_stats = await gather(
                reward.update(hidden, annotation, pairs, omega=w, step=t), roles.sync(version=t)
            )

        await record.step(t, w, trajectories, annotation, advantage, policy_stats, reward_stats, sync_stats)
        if t == algo.steps or (config.evaluate.every and t % config.evaluate.every == 0):
            await evaluator.evaluate(t)
        due = config.checkpoint.every and t % config.checkpoint.every == 0
        if t == algo.steps or due or stop.requested or record.alarmed:
            with record.phase("checkpoint"):
                await checkpoints.save(t, roles, prompts)


def omega_at(config: Config, step: int) -> float:
    """ω(t) of Eq. 4, or its floor throughout with ``reward.omega_schedule=constant``."""
    if config.reward.omega_schedule is OmegaSchedule.constant:
        return config.reward.omega_floor
    return omega(step, config.algo.steps, config.reward.omega_floor)


async def advantages(
    config: Config,
    trajectories: Shards[Trajectories],
    annotation: Shards[Annotation],
    reference: Shards[ReferenceLogprobs],
    initial_reward: float = math.nan,
) -> list[Tensor]:
    """Advantages of the whole batch (Eq. 1 and its siblings), float32 [N] per shard.

    Rewards are scaled as ``reward.scale`` says, shaped around ``initial_reward`` as ``reward.shape`` says,
    and then mixed with gold by ``reward.gold_weight``. With ``algo.kl_place=reward`` each row's then loses β
    times its KL to the reference, estimated on the log-probs it was sampled with.
    """
    algo, notes = config.algo, [await shard for shard in annotation]
    own_N = torch.cat([note.reward_N for note in notes])
    frozen_N = torch.cat([note.frozen_reward_N for note in notes])
    scale = SCALES[config.reward.scale.value](own_N, frozen_N, algo.responses_per_prompt)
    shape, gold_weight = SHAPES[config.reward.shape.value], config.reward.gold_weight
    reward_N = [
        gold_mixture(shape(scale * note.reward_N, scale * initial_reward), note.gold_N, gold_weight)
        for note in notes
    ]
    if algo.kl_place is KLPlace.reward:
        for i, (shard, shard_reference) in enumerate(zip(trajectories, reference, strict=True)):
            rows, base = await shard, await shard_reference
            kl_N = row_kl(
                rows.rollout_logp_T,
                base.tempered_T,
                rows.action_T,
                rows.layout.offsets,
                algo.kl_estimator.value,
            )
            if algo.advantage is Advantage.remax:
                # Greedy rows report log-probs at temperature 1, and were drawn from no distribution.
                kl_N.view(-1, algo.responses_per_prompt)[:, 0] = 0
            reward_N[i] = reward_N[i] - algo.kl_weight * kl_N
    advantage_N = ADVANTAGES[algo.advantage.value](torch.cat(reward_N), algo.responses_per_prompt)
    return list(advantage_N.float().split([len(r) for r in reward_N]))


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
