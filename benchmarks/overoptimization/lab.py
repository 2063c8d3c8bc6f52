"""Gates first, then the baseline, then every arm: what is left of a schedule follows from the disk alone.

Nothing that is finished is done again, and what was interrupted goes on where its last commit was. Runs of
other code or another configuration are never touched: their names are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from benchmarks.overoptimization import results
from benchmarks.overoptimization.additions import POLICY
from benchmarks.overoptimization.arms import BASELINE
from benchmarks.overoptimization.execute import Job, execute
from benchmarks.overoptimization.gates import (
    Verdict,
    baseline_gate,
    information_gate,
    policy_gate,
    reward_gate,
)
from benchmarks.overoptimization.information import Explained, Information
from benchmarks.overoptimization.presets import Preset, World
from benchmarks.overoptimization.results import GATES_FILE
from benchmarks.overoptimization.runs import (
    Models,
    Run,
    State,
    begin,
    code_digest,
    conflicts,
    end,
    standing,
    used,
    world_overrides,
)
from benchmarks.overoptimization.worlds import find, locate, recipe
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError, Preempted, RunError, refuse
from r2m_ray.run.environment import environment
from r2m_ray.run.files import replace_file
from r2m_ray.run.resume import run_identity
from r2m_ray.tasks.prepare.store import Prepared

TRAIN = (sys.executable, "-m", "r2m_ray", "train")
PREPARE = (sys.executable, "-m", "benchmarks.overoptimization.worlds")
Precheck = Callable[[Config, Prepared, int, int], Information]
"""(config, prepared models, prompts, responses per prompt) → what H_last, h and both explain of gold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A schedule and where it lies. jobs: runs at a time. extra: overrides for every run alike."""

    preset: Preset
    root: Path
    jobs: int
    precheck: Precheck
    extra: tuple[str, ...] = ()
    despite_gates: bool = False

    def goes_on(self, world: World) -> bool:
        """Whether arms are run in a world that fails a gate."""
        return self.despite_gates or world.despite_gates

    def runs(self, world: World) -> list[Run]:
        """Every run of a world, in order."""
        return [
            Run(world=world, arm=arm, seed=seed, root=self.root, extra=self.extra)
            for arm, seed in self.preset.runs(world)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conducted:
    """What came of a schedule: worlds that a gate ended, and runs that failed."""

    ended: tuple[str, ...]
    failed: tuple[str, ...]


def check(lab: Lab) -> None:
    """Compose the configuration of every run; InputError with every problem before anything starts."""
    problems: dict[str, None] = {}
    for world in lab.preset.worlds:
        for run in lab.runs(world):
            try:
                composed(run.overrides())
                recipe(run.reward_overrides)
            except InputError as error:
                problems |= dict.fromkeys(
                    f"{run.name}: {line.strip()}" for line in str(error).splitlines()[1:]
                )
    if problems:
        raise InputError("\n".join(["problems in the schedule:", *(f"  {problem}" for problem in problems)]))


def conduct(lab: Lab) -> Conducted:
    """Do whatever of the schedule is not done yet, world after world.

    Raises Preempted where a signal stopped it, InputError for names that hold other runs, and RunError where
    models could not be prepared.
    """
    ended, failed = [], []
    for world in lab.preset.worlds:
        runs, seeds = lab.runs(world), lab.preset.gate_seeds(world)
        words = {f"seed-{seed}": world_overrides(world, seed, lab.extra) for seed in seeds}
        prepared = dict(zip(seeds, prepare(lab, world, words).values(), strict=True))
        refuse_others(lab, runs, code_digest())
        verdicts = _early_gates(lab, world, prepared)
        if _closed(lab, world, verdicts):
            ended.append(world.name)
            continue
        failed += train(lab, [run for run in runs if run.arm.name == BASELINE])
        curves = results.find(lab.preset, world, lab.root).curves.get(BASELINE, ())
        verdicts.append(_printed(baseline_gate(curves, lab.preset.seeds(world))))
        if _closed(lab, world, verdicts):
            ended.append(world.name)
            continue
        failed += train(lab, [run for run in runs if run.arm.name != BASELINE])
    return Conducted(ended=tuple(ended), failed=tuple(failed))


def train(lab: Lab, runs: Sequence[Run]) -> list[str]:
    """Start or resume those that are not finished; the names of those that failed."""
    code, commit = code_digest(), environment()["commit"]
    refuse_others(lab, runs, code)

    def job(run: Run, resume: bool) -> Job:
        words = run.overrides(_models(lab, run))
        # Before the first run starts, so that a file that cannot be read leaves nothing running.
        identity = run_identity(composed(words))
        again = ("run.resume=true",) if resume else ()
        return Job(
            name=f"{run.world.name}/{run.name}",
            command=[*TRAIN, *words, *again],
            log=run.log,
            started=lambda: begin(run, identity, code, commit, words),
            ended=lambda exit_code, seconds: end(run, exit_code, seconds),
        )

    jobs, failed = [], []
    for run in runs:
        state = standing(run).state
        if state is State.finished:
            continue
        try:
            jobs.append(job(run, state is State.half))
        except RunError as error:
            print(f"{run.name}: {error}", file=sys.stderr)
            failed.append(f"{run.world.name}/{run.name}")
    outcome = execute(jobs, lab.jobs)
    _go_on(outcome.stopped)
    return [*failed, *outcome.failed]


def refuse_others(lab: Lab, runs: Sequence[Run], code: str) -> None:
    """Raise InputError where another run than the schedule's lies under one of these names."""
    problems = []
    for run in runs:
        if used(run):
            identity = run_identity(composed(run.overrides(_models(lab, run))))
            problems += list(conflicts(run, identity, code))
    for problem in problems:
        if problem.warning:
            print(f"warning: {problem}", file=sys.stderr)
    refuse(problems, f"what lies under {lab.root}")


@cache
def composed(overrides: tuple[str, ...]) -> Config:
    """The configuration of some overrides, composed once."""
    return load_config(overrides)


def prepare(lab: Lab, world: World, overrides: Mapping[str, Sequence[str]]) -> dict[str, Prepared]:
    """The prepared models for each of some overrides, by its name; those that are missing are made."""
    jobs = [
        Job(
            name=f"{world.name}/prepare-{name}",
            command=[*PREPARE, *words],
            log=lab.root / world.name / f"prepare-{name}.log",
        )
        for name, words in overrides.items()
        if not find(words)
    ]
    # One after another: each uses every core.
    outcome = execute(jobs, 1)
    _go_on(outcome.stopped)
    if outcome.failed:
        raise RunError(
            f"{', '.join(outcome.failed)}: models could not be prepared; see the end of the log above"
        )
    return {name: locate(words) for name, words in overrides.items()}


def _early_gates(lab: Lab, world: World, prepared: Mapping[int, Prepared]) -> list[Verdict]:
    """Gates 1 to 3, which need no run, asked of the prepared models of each seed."""
    facts = {seed: one.facts for seed, one in prepared.items()}
    verdicts = [_printed(policy_gate(facts)), _printed(reward_gate(facts))]
    if not (lab.goes_on(world) or all(verdict.passed for verdict in verdicts)):
        return verdicts
    found, failures = {}, []
    for seed, one in prepared.items():
        try:
            found[seed] = information(lab, world, seed, one)
        except ValueError as error:
            failures.append(f"seed {seed}: the pre-check cannot be made: {error}.")
    return [*verdicts, _printed(information_gate(found, world.regime, failures))]


def information(lab: Lab, world: World, seed: int, prepared: Prepared) -> Information:
    """One seed's pre-check, from its file if that is of the same models and numbers."""
    path = lab.root / world.name / f"precheck-seed-{seed}.json"
    asked = {
        "prepared": prepared.directory.name,
        "prompts": world.precheck_prompts,
        "responses": world.precheck_responses,
    }
    if path.is_file():
        known = json.loads(path.read_text())
        if known["asked"] == asked:
            return Information(**{name: Explained(**r2) for name, r2 in known["information"].items()})
    print(f"{world.name}, seed {seed}: the information pre-check", flush=True)
    config = recipe(world_overrides(world, seed, lab.extra)).config
    found = lab.precheck(config, prepared, world.precheck_prompts, world.precheck_responses)
    replace_file(path, json.dumps({"asked": asked, "information": asdict(found)}, indent=1) + "\n")
    return found


def _closed(lab: Lab, world: World, verdicts: Sequence[Verdict]) -> bool:
    """Keep the verdicts, and say whether the world ends here."""
    path = lab.root / world.name / GATES_FILE
    content = [verdict.record() for verdict in verdicts]
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if not failed or lab.goes_on(world):
        return False
    print(f"{world.name}: ended by gate {failed[0].gate}; --despite-gates goes on and labels every result")
    return True


def _printed(verdict: Verdict) -> Verdict:
    print(verdict, flush=True)
    return verdict


def _models(lab: Lab, run: Run) -> Models:
    """A run's models, made if they are missing; some arms have a reward model of their own."""
    (own,) = prepare(lab, run.world, {f"seed-{run.seed}": run.world_overrides}).values()
    if not run.arm.reward_world:
        return Models(policy=own.policy_dir, reward=own.reward_dir)
    words = (*run.reward_overrides, f"{POLICY}={own.policy_dir}")
    (made,) = prepare(lab, run.world, {f"{run.name}-reward": words}).values()
    return Models(policy=own.policy_dir, reward=made.reward_dir)


def _go_on(stopped: bool) -> None:
    if stopped:
        raise Preempted("stopped; the same command goes on with what is left")


def summary(done: Conducted) -> Iterable[str]:
    """What a reader of the terminal must know at the end."""
    if done.ended:
        yield f"ended by a gate: {', '.join(done.ended)}"
    if done.failed:
        yield f"failed: {', '.join(done.failed)}; the same command tries them again"
