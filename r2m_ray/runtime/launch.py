"""From a configuration to a finished run: workers, driver, report."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Roles
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.loop import train
from r2m_ray.driver.step import omega_at
from r2m_ray.errors import ActorLost, InputError, printable, redacted
from r2m_ray.report.run_page import write_report
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.files import DATA_FILE, encoded, replace_file, run_lock
from r2m_ray.run.log import RunLog
from r2m_ray.run.resume import run_identity
from r2m_ray.run.stop import StopRequest
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.local import local_roles
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.recovery import Notify, rolled_back
from r2m_ray.runtime.start import Crew
from r2m_ray.tasks.data import PromptOrder
from r2m_ray.tasks.models import Models
from r2m_ray.tasks.task import Task, load_task

ONE_PROCESS = "none"
"""``cluster.address`` of a run without Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a run is made of before any worker exists."""

    config: Config
    models: Models
    tokenizer: PreTrainedTokenizerBase
    task: Task

    @classmethod
    def of(cls, config: Config) -> _Run:
        models = Models.of(config)
        tokenizer = AutoTokenizer.from_pretrained(models.policy, trust_remote_code=False)
        return cls(config=config, models=models, tokenizer=tokenizer, task=load_task(config, tokenizer))

    def evaluator(self, roles: Roles) -> Evaluator:
        return Evaluator(
            self.config,
            roles,
            prompts=self.task.eval_prompts,
            pairs=self.task.eval_pairs,
            counterfactual_pairs=self.task.counterfactual_pairs,
            final_omega=omega_at(self.config, self.config.algo.steps),
            tokenizer=self.tokenizer,
        )


def run_training(config: Config) -> Path:
    """Train by ``config`` and write the report; returns the run's directory.

    Raises:
        Preempted: with the last commit kept, where a signal stopped it.
        Alarmed: where an alarm ended it; the step is saved.
        InputError, RunError: with the remedy; the last commit is kept.
    """
    directory = (Path(config.run.root) / config.run.name).resolve()
    with StopRequest(config.cluster.stop_grace_s) as stop, run_lock(directory):
        run = _Run.of(config)
        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        checkpoints = Checkpoints(
            directory / CHECKPOINTS, keep=config.checkpoint.keep, identity=run_identity(config)
        )
        # A run that finds no place leaves no directory, so its name stays free.
        with (
            _places(config, stop) as placement,
            RunLog(directory, config=config, resolved_yaml=resolved) as log,
        ):
            stop.run(_train(run, placement, log, checkpoints, stop))
        write_report(directory)
    return directory


def run_evaluation(config: Config, directory: Path) -> Path:
    """Measure the newest checkpoint of the run in ``directory``; returns the JSON file with the numbers."""
    run = _Run.of(config)
    with _places(config) as placement:
        step, metrics = asyncio.run(_evaluate(run, placement, directory))
    path = directory / f"evaluation-step-{step:06d}.json"
    replace_file(path, json.dumps(json.loads(encoded({"step": step, **metrics})), indent=2) + "\n")
    return path


@contextmanager
def _places(config: Config, stop: StopRequest | None = None) -> Iterator[Placement | None]:
    """The Ray cluster of a run, with a place for each actor; neither in one process."""
    if config.cluster.address == ONE_PROCESS:
        yield None
        return
    with cluster(config.cluster, stop):
        placement = Placement(config)
        try:
            yield placement
        finally:
            placement.release()


async def _engines(
    run: _Run, placement: Placement | None, notify: Notify
) -> tuple[Roles, Callable[[], Awaitable[None]] | None]:
    """The roles of a run, started, and what replaces lost workers; None where they have no successors."""
    if placement is None:
        return local_roles(run.config, run.models), None
    crew = Crew(run.config, run.models, placement, notify)
    return await crew.start(), crew.rebuild


async def _evaluate(run: _Run, placement: Placement | None, directory: Path) -> tuple[int, dict[str, float]]:
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=run.config.checkpoint.keep)
    if checkpoints.newest() is None:
        raise InputError(f"{checkpoints.directory}: no checkpoint to evaluate; train the run first")
    roles, _ = await _engines(run, placement, _warn)
    step = await checkpoints.restore(roles)
    await roles.sync(version=step)
    return step, await run.evaluator(roles).measure()


def _warn(text: str) -> None:
    print(printable(redacted(text), lines=True), file=sys.stderr)


async def _train(
    run: _Run, placement: Placement | None, log: RunLog, checkpoints: Checkpoints, stop: StopRequest
) -> None:
    config, task = run.config, run.task
    for name, counts in task.counts.items():
        log.message(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    replace_file(log.directory / DATA_FILE, json.dumps(task.counts, indent=2) + "\n")
    prompts = PromptOrder(task.train_prompts, seed=config.run.seed, per_step=config.algo.prompts_per_step)
    with log.phase("start"):
        roles, rebuild = await _engines(run, placement, log.message)
    evaluator = run.evaluator(roles)
    human = HumanPairs(config, roles, pairs=task.train_pairs, tokenizer=run.tokenizer, log=log)

    async def attempt() -> None:
        try:
            with stop.deferred():
                await train(config, roles, prompts, human, checkpoints, evaluator, log, stop)
        except ActorLost:
            # A run that is to stop has nothing to rebuild for.
            stop.check()
            raise

    if rebuild is None:
        await attempt()
    else:
        await rolled_back(
            attempt,
            rebuild,
            finished=lambda: log.finished,
            limit=config.cluster.max_recoveries,
            notify=log.message,
        )
