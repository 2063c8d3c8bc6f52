"""The recorder: what a step's log holds, when it looks, and which guard ends the run after it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from r2m_ray.driver.recorder import Recorder
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Advantage, Config, OnAlarm, RewardShape
from r2m_ray.core.batch import Annotation, Hidden, Trajectories, pack_rows
from r2m_ray.errors import Alarmed, RunError

POLICY = {"mismatch_mean": 0.01, "skipped_steps": 0.0, "nonfinite_rows": 0.0}


class Ready:
    """A reference to a record that is already there."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self.value


class Kept:
    """A log in memory."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float], list[dict[str, Any]]]] = []
        self.evaluated: list[tuple[int, dict[str, float]]] = []
        self.told: list[str] = []

    def rewind(self, step: int) -> None:
        self.logged = [row for row in self.logged if row[0] <= step]
        self.evaluated = [row for row in self.evaluated if row[0] <= step]

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def step(
        self, step: int, metrics: Mapping[str, float], rollouts: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self.logged.append((step, dict(metrics), [dict(row) for row in rollouts]))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluated.append((step, dict(metrics)))

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = self.evaluated if kind == "eval" else self.logged
        return [{"step": row[0], **row[1]} for row in rows]

    def message(self, text: str) -> None:
        self.told.append(text)


class Head:
    """A reward role whose attention is wherever its head points by now, and that counts its readings."""

    def __init__(self) -> None:
        self.focus = 0
        self.read: list[str] = []

    async def attention(self, hidden: Any, annotation: Any) -> Tensor:
        record: Hidden = await hidden
        self.read.append("stale" if record.hidden_TP[0, 0] == 0 else "fresh")
        weight_T = torch.zeros(record.layout.tokens)
        weight_T[record.layout.offsets[:-1] + self.focus] = 1.0
        return weight_T


def rows_of(version: int) -> Trajectories:
    return pack_rows(
        ["w1 w2 w3"],
        [[5, 6, 7]],
        [[8, 2], [9, 2], [2], [10, 11]],
        ["w4", "w5", "", "w6 w7"],
        logprobs=[[-1.0, -1.0], [-1.0, -1.0], [-1.0], [-1.0, -1.0]],
        truncated=[False, False, False, True],
        version=version,
    )


@pytest.fixture
def config() -> Config:
    built = Config()
    built.logging.rollouts_per_step = 2
    built.guard.nonfinite_steps = 2
    return built


class Run:
    """A recorder with everything around it."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
        self.log, self.head = Kept(), Head()
        reward: Any = self.head
        self.recorder = Recorder(config, self.log, reward=reward, tokenizer=tokenizer, gold=None)

    def records(self, version: int, reward_N: Tensor, h: float) -> tuple[Any, Any, Any]:
        rows = rows_of(version)
        note = Annotation(
            layout=rows.layout,
            reward_N=reward_N,
            frozen_reward_N=torch.tensor([4.0, 3.0, 2.0, 1.0]),
            gold_N=torch.full((4,), math.nan),
            rte_ND=torch.zeros(4, 1),
            response_id_N=torch.arange(4),
        )
        states = Hidden(layout=rows.layout, hidden_TP=torch.full((rows.layout.tokens, 2), h))
        return [Ready(rows)], [Ready(states)], [Ready(note)]

    async def _step(self, step: int, version: int, reward_N: Tensor, policy: Mapping[str, float]) -> None:
        trajectories, hidden, annotation = self.records(version, reward_N, 0.0)
        await self.recorder.look(step, trajectories, hidden, annotation)
        self.head.focus = 1
        await self.recorder.step(
            step, 0.6, trajectories, annotation, [torch.zeros(4)], policy, {}, {"bytes": 1.0}
        )

    def step(
        self,
        step: int,
        *,
        version: int | None = None,
        rewards: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0),
        policy: Mapping[str, float] = POLICY,
    ) -> None:
        stamp = step - 1 if version is None else version
        asyncio.run(self._step(step, stamp, torch.tensor(rewards), policy))


@pytest.fixture
def run(config: Config, tiny_tokenizer: PreTrainedTokenizerFast) -> Run:
    return Run(config, tiny_tokenizer)


def test_a_step_is_logged_with_everyones_numbers(run: Run) -> None:
    run.step(3)
    ((step, metrics, rollouts),) = run.log.logged
    assert step == 3
    assert (metrics["reward/mean"], metrics["policy/mismatch_mean"], metrics["sync/bytes"]) == (2.5, 0.01, 1)
    assert metrics["response/empty_fraction"] == metrics["response/truncated_fraction"] == 0.25
    assert [row["response"] for row in rollouts] == ["w4", "w5"]


def test_the_words_are_those_the_rewards_came_from(run: Run) -> None:
    """The head is read before its update, on the h of the annotation."""
    run.step(1)
    assert run.head.read == ["stale"]
    ((_, _, rollouts),) = run.log.logged
    assert rollouts[0]["attention"][0] == ["w1", 1.0]
    assert [weight for _, weight in rollouts[1]["attention"]] == [1.0, 0.0, 0.0, 0.0]


def test_without_feedback_nothing_is_read(config: Config, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config.reward.omega_floor = 1.0
    run = Run(config, tiny_tokenizer)
    run.step(1)
    assert run.head.read == []
    assert [row["attention"] for row in run.log.logged[0][2]] == [None, None]


def test_stale_rows_end_the_run_before_anything_learns_from_them(run: Run) -> None:
    run.step(1)
    with pytest.raises(RunError, match="version 0, and version 1 was due"):
        run.step(2, version=0)
    assert run.head.focus == 1
    assert [row[0] for row in run.log.logged] == [1]


def test_a_gap_ends_the_run_after_its_step_is_logged(run: Run) -> None:
    with pytest.raises(RunError, match=r"guard\.logprob_gap is 0\.5"):
        run.step(1, policy=POLICY | {"mismatch_mean": 2.0})
    assert run.log.logged[0][1]["policy/mismatch_mean"] == 2.0


def test_steps_with_nan_in_a_row_end_the_run_and_averages_are_over_the_rest(run: Run) -> None:
    broken = (1.0, math.nan, 3.0, 4.0)
    run.step(1, rewards=broken)
    metrics = run.log.logged[0][1]
    assert (metrics["reward/nonfinite"], metrics["hidden/nonfinite"]) == (1, 1)
    assert metrics["reward/mean"] == pytest.approx(8 / 3)
    with pytest.raises(RunError, match=r"2 steps in a row(.|\n)*row 1, prompt 'w1 w2 w3'"):
        run.step(2, rewards=broken)


def test_going_back_to_a_commit_forgets_rows_and_streaks(run: Run) -> None:
    run.step(1, rewards=(1.0, math.nan, 3.0, 4.0))
    run.recorder.rewind(0)
    assert run.log.logged == []
    run.step(1, rewards=(1.0, math.nan, 3.0, 4.0))
    assert [row[0] for row in run.log.logged] == [1]


def wide(step: int) -> dict[str, Any]:
    """A step whose own rewards spread ten times as far as the frozen ones, which have the other order."""
    return {"step": step, "rewards": (10.0, 20.0, 30.0, 40.0)}


def test_alarms_are_in_the_log_of_their_step_and_told_once(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.monitor.steps = 2
    run = Run(config, tiny_tokenizer)
    for t in (1, 2, 3):
        run.step(**wide(t))
    assert [row[1]["alarm/scale_ratio"] for row in run.log.logged] == [0, 1, 1]
    assert [row[1]["alarm/flip_rate"] for row in run.log.logged] == [0, 1, 1]
    assert [row[1]["alarm/kl"] for row in run.log.logged] == [0, 0, 0]
    assert [text.split(":")[0] for text in run.log.told] == [
        "alarm scale_ratio at step 2",
        "alarm flip_rate at step 2",
    ]
    assert not run.recorder.alarmed
    run.recorder.check_alarms()


def test_an_alarm_ends_the_run_where_it_is_told_to(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.monitor.steps, config.monitor.on_alarm = 2, OnAlarm.stop
    run = Run(config, tiny_tokenizer)
    run.step(**wide(1))
    run.recorder.check_alarms()
    run.step(**wide(2))
    assert run.recorder.alarmed
    with pytest.raises(Alarmed, match=r"alarm scale_ratio at step 2: .* 10 times"):
        run.recorder.check_alarms()


def test_alarms_follow_the_run_back_to_a_commit(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.monitor.steps, config.monitor.on_alarm = 2, OnAlarm.stop
    run = Run(config, tiny_tokenizer)
    for t in (1, 2, 3):
        run.step(**wide(t))
    logged = run.log.logged[2][1]
    run.recorder.rewind(2)
    assert run.recorder.alarmed  # As it was after step 2.
    run.step(**wide(3))
    assert run.log.logged[2][1] == logged
    assert len(run.log.told) == 2
    run.recorder.rewind(1)
    assert not run.recorder.alarmed
    run.recorder.rewind(0)
    run.step(**wide(1))
    assert not run.recorder.alarmed


def test_remax_leaves_its_greedy_rows_out(config: Config, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config.algo.advantage = Advantage.remax
    run = Run(config, tiny_tokenizer)
    run.step(1)
    metrics = run.log.logged[0][1]
    assert (metrics["reward/mean"], metrics["reward/greedy_mean"]) == (3.0, 1.0)
    assert metrics["response/length_mean"] == pytest.approx(5 / 3)


def test_a_records_copy_with_another_version_is_stale_too(run: Run) -> None:
    trajectories, hidden, annotation = run.records(0, torch.zeros(4), 0.0)
    later = [Ready(replace(trajectories[0].value, version=1))]
    with pytest.raises(RunError, match="version 1, and version 0 was due"):
        asyncio.run(run.recorder.look(1, later, hidden, annotation))


def test_the_reward_that_a_shape_starts_from_is_the_first_evaluations_and_survives_a_rewind(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.reward.shape = RewardShape.par
    run = Run(config, tiny_tokenizer)
    record, log = run.recorder, run.log
    with pytest.raises(RunError, match="step 0's evaluation has no"):
        _ = record.initial_reward
    record.evaluation(0, {"reward": 0.75})
    record.evaluation(5, {"reward": 9.0})
    assert record.initial_reward == 0.75
    record.rewind(5)
    assert record.initial_reward == 0.75
    log.evaluated = []
    record.rewind(5)
    with pytest.raises(RunError, match="restore metrics"):
        _ = record.initial_reward


def test_a_reward_without_a_shape_needs_no_evaluation(run: Run) -> None:
    assert math.isnan(run.recorder.initial_reward)
