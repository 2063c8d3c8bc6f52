"""The driver's loop: the order of Algorithm 1, what goes where, and what ends a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from fake_roles import PROMPTS, FakeRoles, K, Run, Verdict, World

from r2m_ray.config.schema import Config, OmegaSchedule, OnAlarm, RewardShape
from r2m_ray.core.batch import Prompt
from r2m_ray.driver.monitor import ALARM_METRICS
from r2m_ray.driver.step import omega_at, sample_plans
from r2m_ray.errors import Alarmed, Preempted, RunError

STEP = ["sample", "annotate", "reference", "texts", "attention", "policy", "reward", "sync"]


def resumed(config: Config) -> Config:
    config.run.resume = True
    return config


def test_a_step_does_algorithm_1_in_order(config: Config, world: World) -> None:
    config.logging.rollouts_per_step = K
    assert world.train(config).fake.names == ["sync", *STEP, *STEP, *STEP]


def test_references_are_passed_on_and_never_read(config: Config, world: World) -> None:
    """The fakes' references can neither be awaited nor opened by the driver; they come back as they were."""
    given = world.train(config).fake.given
    for received, returned in {
        "policy rows": "sample",
        "policy reference": "reference",
        "policy h": "sampled h",
        "reward h": "fresh h",
        "reward annotation": "annotate",
    }.items():
        assert len(given[received]) == 2
        assert all(one is other for one, other in zip(given[received], given[returned], strict=True)), (
            received
        )


def test_each_batch_is_sampled_with_the_last_synced_weights(config: Config, world: World) -> None:
    fake = world.train(config).fake
    assert fake.of("sync") == [(0,), (1,), (2,), (3,)]
    assert [call[:2] for call in fake.of("sample")] == [(1, 0), (2, 1), (3, 2)]
    assert {prompt for call in fake.of("sample") for prompt in call[2]} == set(PROMPTS)


def test_annotation_reads_the_rollouts_h_and_the_update_the_refreshed_h(config: Config, world: World) -> None:
    fake = world.train(config).fake
    assert [call[2] for call in fake.of("annotate")] == [[f"h of step {t}"] * 2 for t in (1, 2, 3)]
    assert [call[2] for call in fake.of("reward")] == [[f"h after {t} updates"] * 2 for t in (1, 2, 3)]


def test_omega_follows_the_cosine_at_annotation_and_update_alike(config: Config, world: World) -> None:
    fake = world.train(config).fake
    expected = [max((math.cos(math.pi * t / 3) + 1) / 2, 0.6) for t in (1, 2, 3)]
    for role in ("annotate", "reward"):
        assert [call[1] for call in fake.of(role)] == pytest.approx(expected, abs=1e-12)
    config.reward.omega_schedule = OmegaSchedule.constant
    assert [omega_at(config, t) for t in (1, 3)] == [0.6, 0.6]


def test_the_policy_gets_the_advantages_of_its_shards(config: Config, world: World) -> None:
    fake = world.train(config).fake
    assert fake.of("policy")[0] == ([[-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]],)


def test_shards_cut_the_step_into_complete_groups(config: Config) -> None:
    plans = sample_plans(config, [Prompt(index=i, text="") for i in range(5)], step=7)
    assert [[p.index for p in plan.prompts] for plan in plans] == [[0, 1], [2, 3], [4]]
    assert {(plan.step, plan.group_size, plan.greedy_first) for plan in plans} == {(7, K, False)}


def test_evaluations_and_checkpoints_have_their_steps_and_the_last(config: Config, world: World) -> None:
    run = world.train(config)
    assert run.evaluated == [0, 2, 3]
    assert run.saved == [2, 3]
    config.evaluate.every = config.checkpoint.every = 0
    rare = replace(world, directory=world.directory / "rare").train(config)
    assert (rare.evaluated, rare.saved) == ([0, 3], [3])


def test_a_resumed_run_equals_an_uninterrupted_one(config: Config, world: World) -> None:
    config.algo.steps, config.checkpoint.every, config.reward.anchor_fraction = 5, 1, 0.5
    world = replace(world, eval_prompts=PROMPTS[:3])
    uninterrupted = world.train(config)
    other = replace(world, directory=world.directory / "other")
    assert other.train(config, ends=Preempted, match="run.resume=true", stop_in=2).steps == [1, 2]
    continued = other.train(resumed(config))
    assert continued.fake.of("sync") == [(2,), (3,), (4,), (5,)]
    for kind in ("step", "eval"):
        assert continued.rows(kind) == uninterrupted.rows(kind)
    assert continued.rollouts == uninterrupted.rollouts
    for name in ("sample", "states", "reward"):
        assert continued.fake.of(name)[-3:] == uninterrupted.fake.of(name)[-3:], name


def test_a_signal_lets_the_run_save_its_step_and_start_no_other(config: Config, world: World) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    run = world.train(config, ends=Preempted, match="stopped by SIGTERM", stop_in=2)
    assert (run.steps, run.saved) == ([1, 2], [2])


def spread_out(from_step: int) -> FakeRoles:
    """Own rewards spread ten times as far as the frozen ones, in the other order, from a step on."""

    def judge(word: str) -> Verdict:
        value, wide = int(word[1]), word.endswith("wide")
        return Verdict(own=10.0 * value if wide else -float(value), frozen=-float(value))

    return FakeRoles(respond=lambda step, _, j: f"w{j}{'wide' if step >= from_step else ''}", judge=judge)


def alarm_row(run: Run, name: str) -> list[float]:
    return [row[f"alarm/{name}"] for row in run.rows("step")]


def test_alarms_are_in_the_row_of_their_step_and_shown_once(config: Config, world: World) -> None:
    config.algo.steps, config.monitor.steps = 4, 1
    run = world.train(config, spread_out(from_step=2))
    assert alarm_row(run, "scale_ratio") == alarm_row(run, "flip_rate") == [0, 1, 1, 1]
    assert alarm_row(run, "kl") == [0, 0, 0, 0]
    assert {name for name in run.rows("step")[0] if name.startswith("alarm/")} == {*ALARM_METRICS.values()}
    shown = [line.split(":")[0] for line in run.messages if line.startswith("alarm ")]
    assert [line for line in shown if "frozen_gap" not in line] == [
        "alarm scale_ratio at step 2",
        "alarm flip_rate at step 2",
    ]


def test_an_alarm_ends_the_run_once_its_step_is_saved_and_again_on_resume(
    config: Config, world: World
) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    config.monitor.steps, config.monitor.on_alarm = 1, OnAlarm.stop
    run = world.train(config, spread_out(from_step=3), ends=Alarmed, match="alarm scale_ratio at step 3")
    assert (run.steps, run.saved) == ([1, 2, 3], [3])
    again = world.train(resumed(config), spread_out(from_step=3), ends=Alarmed, match="scale_ratio at step 3")
    assert again.fake.names == ["sync"]
    config.monitor.on_alarm = OnAlarm.warn
    assert world.train(config, spread_out(from_step=3)).steps == [1, 2, 3, 4, 5, 6]
    config.run.resume, config.monitor.on_alarm = False, OnAlarm.stop
    last = replace(world, directory=world.directory / "other").train(config, spread_out(from_step=6))
    assert (alarm_row(last, "scale_ratio")[-1], last.saved) == (1, [4, 6]), "nothing is left to be ended"


def test_stale_rows_end_the_run_before_anything_learns_from_them(config: Config, world: World) -> None:
    run = world.train(config, FakeRoles(lag=1), ends=RunError, match="version -1, and version 0 was due")
    assert run.fake.names == ["sync", "sample"]
    assert run.steps == []


def test_a_log_prob_gap_ends_the_run_after_its_step_is_logged(config: Config, world: World) -> None:
    fake = FakeRoles(reports=lambda step: {"mismatch_mean": 2.0 if step == 2 else 0.0})
    run = world.train(config, fake, ends=RunError, match=r"step 2: .*guard\.logprob_gap is 0\.5")
    assert [row["policy/mismatch_mean"] for row in run.rows("step")] == [0.0, 2.0]
    assert run.saved == []


def broken(*steps: int) -> FakeRoles:
    """Row 1 of each group of these steps has a reward that is not a number."""

    def judge(word: str) -> Verdict:
        return Verdict(own=math.nan if word == "nan" else float(word[1:]), frozen=1.0)

    return FakeRoles(respond=lambda step, _, j: "nan" if step in steps and j == 1 else f"w{j}", judge=judge)


def test_steps_with_nan_in_a_row_end_the_run_and_averages_are_over_the_rest(
    config: Config, world: World
) -> None:
    config.algo.steps, config.guard.nonfinite_steps = 6, 2
    run = world.train(config, broken(1, 3, 4), ends=RunError, match="2 steps in a row")
    rows = run.rows("step")
    assert (
        [row["reward/nonfinite"] for row in rows] == [row["hidden/nonfinite"] for row in rows] == [4, 0, 4, 4]
    )
    assert [row["reward/mean"] for row in rows] == [0.0, 0.5, 0.0, 0.0]


def test_rows_that_are_not_finite_are_named_with_their_prompts(config: Config, world: World) -> None:
    config.guard.nonfinite_steps = 1
    run = world.train(
        config, broken(1), ends=RunError, match=r"4 rewards, 4 rows of h \(row 1, prompt 'p\d+'; "
    )
    assert run.steps == [1]
    fake = FakeRoles(
        respond=lambda step, _, j: f"w9 ? w{j}" if j else "w0", reports=lambda _: {"nonfinite_rows": 4.0}
    )
    other = replace(world, directory=world.directory / "other")
    other.train(config, fake, ends=RunError, match=r"4 rows with a log-prob \(row 1, prompt")


def test_a_run_that_goes_on_from_a_commit_forgets_streaks_of_nan(config: Config, world: World) -> None:
    config.algo.steps, config.checkpoint.every, config.guard.nonfinite_steps = 4, 1, 2
    world.train(config, broken(2), ends=Preempted, stop_in=2)
    assert world.train(resumed(config), broken(3)).steps == [1, 2, 3, 4]


def test_the_initial_reward_that_shapes_is_the_first_evaluations_and_survives_a_resume(
    config: Config, world: World
) -> None:
    config.reward.shape, config.checkpoint.every = RewardShape.par, 1
    world = replace(world, eval_prompts=PROMPTS[:3])

    def shaped() -> FakeRoles:
        """Evaluations respond w1 before the first update, and w9 after it."""
        fake = FakeRoles()
        fake.respond = lambda step, _, j: f"w{j}" if step else "w9" if fake.updates else "w1"
        return fake

    first = world.train(config, shaped(), ends=Preempted, stop_in=2)
    assert first.evaluated == [0, 2]
    later = world.train(resumed(config), shaped())
    low, high = 1 / (1 + math.exp(1)), 0.5
    for (advantage,) in (*first.fake.of("policy"), *later.fake.of("policy")):
        assert advantage[0][:K] == pytest.approx([low - high, high - low], rel=1e-5)


def test_a_shape_without_an_initial_reward_is_refused(config: Config, world: World) -> None:
    config.reward.shape, config.checkpoint.every = RewardShape.par, 1
    run = world.train(config, ends=RunError, match="step 0's evaluation has no finite reward")
    assert run.steps == []
    world = replace(world, directory=world.directory / "other", eval_prompts=PROMPTS[:3])
    run = world.train(config, ends=Preempted, stop_in=2)
    metrics = run.directory / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["kind"] != "eval"]
    metrics.write_text("".join(f"{line}\n" for line in kept))
    world.train(resumed(config), ends=RunError, match=r"restore metrics\.jsonl")
