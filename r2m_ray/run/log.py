"""Everything a run writes about itself: files, the terminal and W&B.

``metrics.jsonl`` and ``rollouts.jsonl`` are the record that reports and comparisons use. Those of a resumed
run equal an uninterrupted run's, but for keys below ``time/`` and ``memory/``.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import psutil
from omegaconf import OmegaConf
from rich.console import Console

from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.engines.faults import reach
from r2m_ray.errors import InputError, RunError, redacted
from r2m_ray.run.environment import environment
from r2m_ray.run.files import (
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    ROLLOUTS_FILE,
    StepLines,
    read_metrics,
    replace_file,
)
from r2m_ray.run.progress import PhaseClock, RunProgress
from r2m_ray.run.trackers import WandbMirror

Kind = Literal["step", "eval"]
"""What a row of ``metrics.jsonl`` describes: a training step or an evaluation."""


class RunLog:
    """The log of one run; a context manager, because files, terminal and W&B must be closed.

    ``resolved_yaml`` is the configuration as text; secrets in it are hidden before it is kept. Raises
    InputError if the directory holds a run and ``run.resume`` is false.
    """

    def __init__(
        self, directory: Path, *, config: Config, resolved_yaml: str, console: Console | None = None
    ) -> None:
        self.directory = directory
        self._config = config
        self._yaml = redacted(resolved_yaml)
        self._console = console or Console(stderr=True)
        self._clock = PhaseClock()
        self._logged = 0
        self._written = False
        self.finished = 0
        """The furthest step that this start has restored or logged."""
        if (directory / METRICS_FILE).exists() and not config.run.resume:
            raise InputError(
                f"{directory}: a run was already written here. "
                "Continue it with run.resume=true, or choose another run.name."
            )

    def __enter__(self) -> Self:
        config = self._config
        run_id = self._write_headers()
        with ExitStack() as stack:
            self._metrics = stack.enter_context(closing(StepLines(self.directory / METRICS_FILE)))
            self._rollouts = stack.enter_context(closing(StepLines(self.directory / ROLLOUTS_FILE)))
            self._progress = RunProgress(
                self._console, name=config.run.name, steps=config.algo.steps, clock=self._clock
            )
            stack.callback(self._progress.close)
            self._wandb = None
            if config.logging.wandb is not WandbMode.disabled:
                self._wandb = WandbMirror(
                    self.directory,
                    logging=config.logging,
                    name=config.run.name,
                    run_id=run_id,
                    config=cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(self._yaml))),
                    warn=self._progress.message,
                )
                stack.callback(self._wandb.close)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if isinstance(error, InputError | RunError) and not self._config.run.resume and not self._written:
            self._discard()

    def _discard(self) -> None:
        """Remove what this start wrote: a run that never began leaves its name free."""
        for name in (CONFIG_FILE, ENVIRONMENT_FILE, DATA_FILE, METRICS_FILE, ROLLOUTS_FILE):
            (self.directory / name).unlink(missing_ok=True)
        if self._wandb is not None:
            shutil.rmtree(self.directory / "wandb", ignore_errors=True)

    def rewind(self, step: int) -> None:
        """Forget every row after ``step``, all of them when it is 0: those steps will be computed again."""
        self._logged = step
        self.finished = max(self.finished, step)
        self._metrics.rewind(step)
        self._rollouts.rewind(step)
        self._clock.reset()
        self._progress.rewind(step)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase of the step and show that it is running; phases may overlap."""
        reach(name, self._logged + 1)
        return self._clock.phase(name)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollouts: Iterable[Mapping[str, Any]] = (),
        alarms: Iterable[str] = (),
    ) -> None:
        """Write a training step with the times of its phases and the driver's resident memory (bytes).

        Call it before the step is committed, or a crash in between loses the row. alarms: texts to show.
        Raises RunError naming the file that cannot be written.
        """
        resident = float(psutil.Process().memory_info().rss)
        metrics = {**metrics, **self._clock.collect(), "memory/driver": resident}
        self._rollouts.append(rollouts)
        self._write(step, "step", metrics)
        self._logged = step
        self.finished = max(self.finished, step)
        self._progress.step(step, metrics)
        for text in alarms:
            self.message(text)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation of the state after ``step``; call it before that step is committed."""
        metrics = {**metrics, **self._clock.collect()}
        self._write(step, "eval", metrics)
        self._progress.evaluation(step, metrics)

    def rows(self, kind: Kind) -> list[dict[str, Any]]:
        """The rows of all steps or of all evaluations so far; a number that was not finite is None."""
        rows = read_metrics(self.directory / METRICS_FILE)
        return [row for row in rows if row.get("kind") == kind]

    def message(self, text: str) -> None:
        """Show lines to whoever watches the run, escaped and without secrets; they are not kept."""
        for line in redacted(text).splitlines():
            self._progress.message(line)

    def _write(self, step: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        self._written = True
        row = {"step": step, "kind": kind, **metrics}
        self._metrics.append([row])
        if self._wandb is not None:
            self._wandb.send(row)

    def _write_headers(self) -> str:
        """Write configuration and environment; return the id that every start of this run shares."""
        path = self.directory / ENVIRONMENT_FILE
        run_id, starts = uuid.uuid4().hex, []
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                known = json.loads(path.read_text())
                run_id, starts = str(known["run_id"]), list(known["starts"])
        except OSError as error:
            raise RunError(f"{path}: cannot use this run directory: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not an environment file ({error}). Delete it to continue.") from error
        replace_file(
            path, json.dumps({"run_id": run_id, "starts": [*starts, environment()]}, indent=2) + "\n"
        )
        replace_file(self.directory / CONFIG_FILE, self._yaml)
        return run_id
