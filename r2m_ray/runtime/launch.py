"""From a configuration to a finished run: cluster, actors, driver, report."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Roles
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.loop import omega_at, train
from r2m_ray.driver.recorder import Log, Recorder, Unlogged
from r2m_ray.errors import ActorLost, InputError, printable, redacted
from r2m_ray.report.run_page import write_report
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.files import replace_file, run_lock
from r2m_ray.run.log import RunLog
from r2m_ray.run.resume import run_identity
from r2m_ray.run.stop import StopRequest
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import rolled_back
from r2m_ray.runtime.start import Crew
from r2m_ray.tasks.data import PromptStream
from r2m_ray.tasks.models import Models
from r2m_ray.tasks.task import Task, load_task


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a run is made of before any actor exists."""

    config: Config
    models: Models
    tokenizer: PreTrainedTokenizerBase
    task: Task

    @classmethod
    def of(cls, config: Config) -> _Run:
        models = Models.of(config)
        tokenizer = AutoTokenizer.from_pretrained(models.policy, trust_remote_code=False)
        return cls(config=config, models=models, tokenizer=tokenizer, task=load_task(config, tokenizer))

    def prompts(self) -> PromptStream:
        return PromptStream(self.task.train_prompts, seed=self.config.run.seed)

    def observers(self, roles: Roles, log: Log) -> tuple[Recorder, Evaluator]:
        config = self.config
        record = Recorder(config, log, reward=roles.reward, tokenizer=self.tokenizer, gold=self.task.gold)
        evaluator = Evaluator(
            config,
            roles,
            prompts=self.task.eval_prompts,
            pairs=self.task.eval_pairs,
            counterfactual_pairs=self.task.counterfactual_pairs,
            final_omega=omega_at(config, config.algo.steps),
            tokenizer=self.tokenizer,
            record=record,
        )
        return record, evaluator


def run_training(config: Config) -> Path:
    """Train by ``config`` and write the report; returns the run's directory.

    Raises Preempted, with the last commit kept, where a signal told it to stop.
    """
    directory = (Path(config.run.root) / config.run.name).resolve()
    with StopRequest(config.cluster.stop_grace_s) as stop, run_lock(directory):
        run = _Run.of(config)
        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        checkpoints = Checkpoints(
            directory / CHECKPOINTS, keep=config.checkpoint.keep, identity=run_identity(config)
        )
        with RunLog(directory, config=config, resolved_yaml=resolved) as log, cluster(config.cluster, stop):
            stop.run(_train(run, log, checkpoints, stop))
        write_report(directory)
    return directory


def run_evaluation(config: Config, directory: Path) -> Path:
    """Measure the newest checkpoint of the run in ``directory``; returns the JSON file with the numbers."""
    run = _Run.of(config)
    with cluster(config.cluster):
        step, metrics = asyncio.run(_evaluate(run, directory))
    path = directory / f"evaluation-step-{step:06d}.json"
    replace_file(path, json.dumps({"step": step, **metrics}, indent=2) + "\n")
    return path


async def _evaluate(run: _Run, directory: Path) -> tuple[int, dict[str, float]]:
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=run.config.checkpoint.keep)
    if checkpoints.newest() is None:
        raise InputError(f"{checkpoints.directory}: no checkpoint to evaluate; train the run first")
    placement = Placement(run.config)
    try:
        roles = await Crew(run.config, run.models, placement, _warn).start()
        step = await checkpoints.restore(roles, run.prompts())
        await roles.sync(version=step)
        _, evaluator = run.observers(roles, Unlogged())
        return step, await evaluator.evaluate(step)
    finally:
        placement.release()


def _warn(text: str) -> None:
    print(printable(redacted(text), lines=True), file=sys.stderr)


async def _train(run: _Run, log: RunLog, checkpoints: Checkpoints, stop: StopRequest) -> None:
    config = run.config
    placement = Placement(config)
    try:
        for name, counts in run.task.counts.items():
            log.message(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
        replace_file(log.directory / "data.json", json.dumps(run.task.counts, indent=2) + "\n")
        crew = Crew(config, run.models, placement, log.message)
        with log.phase("start"):
            roles = await crew.start()
        record, evaluator = run.observers(roles, log)
        human = HumanPairs(config, roles, pairs=run.task.train_pairs, tokenizer=run.tokenizer, record=record)

        async def attempt() -> None:
            try:
                with stop.deferred():
                    await train(config, roles, run.prompts(), human, checkpoints, evaluator, record, stop)
            except ActorLost:
                # Who was told to stop has nothing to rebuild for.
                stop.check()
                raise

        await rolled_back(
            attempt,
            crew.rebuild,
            finished=lambda: log.finished,
            limit=config.cluster.max_recoveries,
            notify=log.message,
        )
    finally:
        placement.release()
