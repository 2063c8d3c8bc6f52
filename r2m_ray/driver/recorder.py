"""What the driver hands over at the end of a step, turned into numbers and rows worth reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Advantage, Config, RewardShape
from r2m_ray.core.batch import Annotation, Hidden, Trajectories
from r2m_ray.core.roles import Reward, Shards, Stats
from r2m_ray.driver.guards import row_label
from r2m_ray.driver.metrics import merge_stats, rollout_records, step_metrics
from r2m_ray.driver.monitor import Watch
from r2m_ray.errors import RunError
from r2m_ray.run.log import Kind
from r2m_ray.run.vocabulary import current_row
from r2m_ray.tasks.task import GoldScorer


class Log(Protocol):
    """Where a recorder writes; a run's is ``r2m_ray.run.log.RunLog``."""

    def rewind(self, step: int) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]: ...

    def step(
        self, step: int, metrics: Mapping[str, float], rollouts: Iterable[Mapping[str, Any]] = ()
    ) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rows(self, kind: Kind) -> Sequence[Mapping[str, Any]]: ...

    def message(self, text: str) -> None: ...


class Unlogged:
    """A log that keeps nothing, for a measurement outside a run."""

    def rewind(self, step: int) -> None:
        return

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def step(
        self, step: int, metrics: Mapping[str, float], rollouts: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        return

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        return

    def rows(self, kind: Kind) -> Sequence[Mapping[str, Any]]:
        return ()

    def message(self, text: str) -> None:
        return


class Recorder:
    """Reads a step's records, scores them by gold where the task knows it, logs them, and watches the run.

    tokenizer: the policy's, for the words beside the head's attention weights.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        *,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        gold: GoldScorer | None,
    ) -> None:
        self._config = config
        self._log = log
        self._reward = reward
        self._tokenizer = tokenizer
        self._gold = gold
        self._watch = Watch(config)
        self._initial_reward = math.nan
        self._words: dict[int, list[tuple[str, float]]] = {}

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``, which the run is about to compute again."""
        self._log.rewind(step)
        self._watch.rewind(self._log.rows("step"))
        self._initial_reward = math.nan
        for row in self._log.rows("eval"):
            self._keep_initial(int(row["step"]), row)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase of the step, and show that it is running."""
        return self._log.phase(name)

    def message(self, text: str) -> None:
        """Show lines to whoever watches the run."""
        self._log.message(text)

    async def look(
        self,
        step: int,
        trajectories: Shards[Trajectories],
        hidden: Shards[Hidden],
        annotation: Shards[Annotation],
    ) -> None:
        """Look at what a step is about to learn from, before it does.

        Keeps the attention that the first rows' rewards came from: the head's before its update, on the h of
        the annotation. Raises RunError for rows that stale weights sampled.
        """
        rows = [await shard for shard in trajectories]
        self._watch.versions(step, [shard.version for shard in rows])
        self._words = await self._attended_words(rows, hidden, annotation)

    async def step(
        self,
        step: int,
        omega: float,
        trajectories: Shards[Trajectories],
        annotation: Shards[Annotation],
        advantage: Sequence[Tensor],
        policy: Stats,
        reward: Stats,
        sync: Stats,
    ) -> None:
        """Log one training step, its metrics and its first rows, and tell new alarms.

        Raises RunError where a guard stops the run.
        """
        rows = [await shard for shard in trajectories]
        notes = [await shard for shard in annotation]
        gold = self.gold(rows)
        metrics = step_metrics(
            rows,
            notes,
            advantage,
            omega,
            gold,
            greedy_first=self._config.algo.advantage is Advantage.remax,
            scale=self._config.reward.scale.value,
        )
        for prefix, stats in (("policy", policy), ("rm", reward), ("sync", sync)):
            metrics |= merge_stats(prefix, stats)
        metrics |= self._watch.observe(step, metrics)
        limit = self._config.logging.rollouts_per_step
        records = rollout_records(
            step, rows, notes, advantage, omega, gold, limit=limit, attention=self._words
        )
        self._log.step(step, metrics, records)
        for text in self._watch.news():
            self._log.message(text)
        self._watch.guard(step, metrics, list(_broken_rows(rows, notes)))

    @property
    def alarmed(self) -> bool:
        """Whether the last step raised or kept an alarm that ends the run (``monitor.on_alarm=stop``)."""
        return self._watch.ends_run

    def check_alarms(self) -> None:
        """Raise Alarmed where ``alarmed``; call it once that step is saved."""
        if self._watch.ends_run:
            raise self._watch.error()

    @property
    def initial_reward(self) -> float:
        """Mean reward of the evaluation before step 1, from the log of a run that goes on; NaN without one.

        Raises RunError where ``reward.shape`` needs it and it is not a number.
        """
        shape = self._config.reward.shape
        if shape is not RewardShape.raw and not math.isfinite(self._initial_reward):
            raise RunError(
                f"reward.shape={shape.value}: step 0's evaluation has no finite reward. If the run goes on, "
                "restore metrics.jsonl; if it is new, examine model.reward"
            )
        return self._initial_reward

    def evaluation(self, step: int, metrics: Stats) -> None:
        """Log what an evaluation found."""
        self._keep_initial(step, metrics)
        self._log.evaluation(step, metrics)

    def _keep_initial(self, step: int, metrics: Mapping[str, float | None]) -> None:
        level = current_row(metrics).get("reward/mean")
        if step == 0 and level is not None:
            self._initial_reward = level

    def gold(self, shards: Sequence[Trajectories]) -> list[dict[str, float]] | None:
        """The gold score of every row, where the task knows one."""
        if self._gold is None:
            return None
        return [
            dict(self._gold(prompt, response, bool(truncated)))
            for rows in shards
            for prompt, response, truncated in zip(
                rows.row_prompts, rows.responses, rows.truncated_N, strict=True
            )
        ]

    async def _attended_words(
        self,
        shards: Sequence[Trajectories],
        hidden: Shards[Hidden],
        annotation: Shards[Annotation],
    ) -> dict[int, list[tuple[str, float]]]:
        """Each input token of the step's first rows, with the weight that the head gives it."""
        limit = self._config.logging.rollouts_per_step
        words: dict[int, list[tuple[str, float]]] = {}
        if not self._config.uses_feedback:
            return words
        for rows, states, notes in zip(shards, hidden, annotation, strict=True):
            if len(words) >= limit:
                break
            weight_T = await self._reward.attention(states, notes)
            for n in range(min(limit - len(words), rows.layout.rows)):
                part = rows.layout.slice_of(n)
                texts = [self._tokenizer.decode([token]) for token in rows.input_T[part].tolist()]
                words[len(words)] = list(zip(texts, weight_T[part].tolist(), strict=True))
        return words


def _broken_rows(trajectories: Sequence[Trajectories], annotation: Sequence[Annotation]) -> Iterator[str]:
    """The step's rows whose reward or sampled log-prob is not finite."""
    first = 0
    for rows, notes in zip(trajectories, annotation, strict=True):
        broken_N = ~torch.isfinite(notes.reward_N + notes.frozen_reward_N)
        broken_T = rows.action_T & ~torch.isfinite(rows.rollout_logp_T)
        broken_N[rows.layout.row_T[broken_T]] = True
        for n in broken_N.nonzero()[:, 0].tolist():
            yield row_label(first + n, rows.row_prompts[n])
        first += rows.layout.rows
