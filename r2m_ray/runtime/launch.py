"""From a configuration to a finished run: cluster, actors, driver, report."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from r2m_ray.checkpoint import Checkpoints
from r2m_ray.config import PREPARED, ClusterConfig, Config, FeedbackSource
from r2m_ray.data import PromptStream
from r2m_ray.driver import omega_at, train
from r2m_ray.errors import InputError
from r2m_ray.evaluate import Evaluator
from r2m_ray.feedback import LearnerFeedback
from r2m_ray.recorder import Log, Recorder, Unlogged
from r2m_ray.report import write_report
from r2m_ray.roles import Roles, Rollout
from r2m_ray.run_files import replace_file
from r2m_ray.runlog import RunLog
from r2m_ray.runtime.actors import PolicyActor, ReferenceActor, RewardActor, RolloutActor
from r2m_ray.runtime.group import Actors
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.roles import PolicyRole, ReferenceRole, RewardRole, RolloutRole, share
from r2m_ray.runtime.weight_sync import weight_sync
from r2m_ray.tasks import Task, load_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Directories or hub ids of the three pretrained models of a run."""

    policy: str
    reward: str
    reference: str

    @classmethod
    def of(cls, config: Config) -> Models:
        """The models that a config names; ``prepared`` stands for what ``r2m-ray prepare`` made for it."""
        policy, reward = config.model.policy, config.model.reward
        if PREPARED in (policy, reward):
            from r2m_ray.stages.prepare import locate

            prepared = locate(config)
            policy = str(prepared.policy_dir) if policy == PREPARED else policy
            reward = str(prepared.reward_dir) if reward == PREPARED else reward
        names = (policy, reward, config.model.reference or policy)
        # Actors have working directories of their own.
        found = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in names]
        return cls(policy=found[0], reward=found[1], reference=found[2])


def run_training(config: Config) -> Path:
    """Train by ``config`` and write the report; returns the run's directory."""
    directory = (Path(config.run.root) / config.run.name).resolve()
    models = Models.of(config)
    tokenizer = AutoTokenizer.from_pretrained(models.policy, trust_remote_code=False)
    task = load_task(config, tokenizer)
    resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
    with RunLog(directory, config=config, resolved_yaml=resolved) as log, cluster(config.cluster):
        asyncio.run(_train(config, task, models, tokenizer, log))
    write_report(directory)
    return directory


def run_evaluation(config: Config, directory: Path) -> Path:
    """Measure the newest checkpoint of the run in ``directory``; returns the JSON file with the numbers."""
    models = Models.of(config)
    tokenizer = AutoTokenizer.from_pretrained(models.policy, trust_remote_code=False)
    task = load_task(config, tokenizer)
    with cluster(config.cluster):
        step, metrics = asyncio.run(_evaluate(config, task, models, tokenizer, directory))
    path = directory / f"evaluation-step-{step:06d}.json"
    replace_file(path, json.dumps({"step": step, **metrics}, indent=2) + "\n")
    return path


async def _evaluate(
    config: Config, task: Task, models: Models, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> tuple[int, dict[str, float]]:
    checkpoints = Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep)
    if checkpoints.newest() is None:
        raise InputError(f"{checkpoints.directory}: no checkpoint to evaluate; train the run first")
    placement = Placement(config)
    try:
        roles = await start_roles(config, models, placement)
        step = await checkpoints.restore(roles, PromptStream(task.train_prompts, seed=config.run.seed))
        await roles.sync(version=step)
        _, evaluator = _observers(config, task, tokenizer, roles, Unlogged())
        return step, await evaluator.evaluate(step)
    finally:
        placement.release()


async def _train(
    config: Config, task: Task, models: Models, tokenizer: PreTrainedTokenizerBase, log: RunLog
) -> None:
    placement = Placement(config)
    try:
        for name, counts in task.counts.items():
            log.message(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
        replace_file(log.directory / "data.json", json.dumps(task.counts, indent=2) + "\n")
        with log.phase("start"):
            roles = await start_roles(config, models, placement)
        record, evaluator = _observers(config, task, tokenizer, roles, log)
        await train(
            config,
            roles,
            PromptStream(task.train_prompts, seed=config.run.seed),
            Checkpoints(log.directory / "checkpoints", keep=config.checkpoint.keep),
            evaluator,
            record,
        )
    finally:
        placement.release()


def _observers(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, roles: Roles, log: Log
) -> tuple[Recorder, Evaluator]:
    record = Recorder(config, log, reward=roles.reward, tokenizer=tokenizer, gold=task.gold)
    evaluator = Evaluator(
        config,
        roles,
        prompts=task.eval_prompts,
        pairs=task.eval_pairs,
        final_omega=omega_at(config, config.algo.steps),
        tokenizer=tokenizer,
        record=record,
    )
    return record, evaluator


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Start a local Ray cluster, or join the one that ``cluster.address`` names; leave it at the end.

    A process that is already connected, a notebook or a sweep, keeps its connection.
    """
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
    # Records are immutable, so memory that cannot be written to is what we want.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    warnings.filterwarnings("ignore", "Zero-copy tensor serialization is enabled", UserWarning)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.address == "local":
        ray.init(
            address="local",
            num_cpus=config.cpus,
            object_store_memory=int(config.object_store_gb * 2**30),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    else:
        ray.init(address=config.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


async def start_roles(config: Config, models: Models, placement: Placement) -> Roles:
    """Start every actor in its place, the engines side by side, and wait until all are ready."""
    limit = config.cluster.phase_timeout_s
    policy = Actors(placement.spawn(PolicyActor, "policy"), timeout_s=limit)
    rollout = Actors(placement.spawn(RolloutActor, "rollout"), timeout_s=limit)
    reward = Actors(placement.spawn(RewardActor, "reward"), timeout_s=limit)
    reference = Actors(placement.spawn(ReferenceActor, "reference"), timeout_s=limit)

    width = (
        AutoConfig.from_pretrained(models.policy, trust_remote_code=False).get_text_config().hidden_size
        if config.uses_feedback
        else 0
    )
    exports = config.uses_feedback and config.feedback.source is FeedbackSource.rollout
    learners, scorers = await asyncio.gather(policy.all("start", "address"), reward.all("start", "address"))
    gpus = config.cluster
    starts = [
        *policy.each("start", lambda i: (config, models.policy, i, learners[0], gpus.gpus_per_learner)),
        *rollout.each("start", lambda _: (config, models.policy, exports)),
        *reward.each("start", lambda i: (config, models.reward, width, i, scorers[0], gpus.gpus_per_reward)),
        *reference.each("start", lambda _: (config, models.reference, gpus.gpus_per_reference)),
    ]
    await policy.settle("start", starts, timeout_s=config.cluster.start_timeout_s)

    policy_role = PolicyRole(policy, config)
    sampler: Rollout = RolloutRole(rollout)
    if config.feedback.source is FeedbackSource.learner:
        sampler = LearnerFeedback(sampler, policy_role)
    return Roles(
        rollout=sampler,
        policy=policy_role,
        reference=ReferenceRole(reference),
        reward=RewardRole(reward),
        sync=weight_sync(config, policy=policy, rollout=rollout),
        share=share,
    )
