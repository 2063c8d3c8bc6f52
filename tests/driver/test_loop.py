"""The driver against in-process fakes of the roles: order, versions, ω, and which h goes where."""

from __future__ import annotations

import math

import pytest
from driver_fakes import K, run, small_config

from r2m_ray.config.schema import Config, OmegaSchedule, RewardShape
from r2m_ray.core.batch import Prompt
from r2m_ray.driver.loop import omega_at, sample_plans
from r2m_ray.errors import Alarmed, Preempted


@pytest.fixture
def config() -> Config:
    return small_config()


def test_a_step_does_algorithm_1_in_order(config: Config) -> None:
    names = [call[0] for call in run(config).calls if call[0] != "evaluate"]
    step = ["sample", "annotate", "reference", "look", "policy", "reward", "sync"]
    assert names == ["sync", *step, *step, *step]


def test_each_batch_is_sampled_with_the_last_synced_weights(config: Config) -> None:
    world = run(config)
    assert [call[1] for call in world.calls if call[0] == "sync"] == [0, 1, 2, 3]
    assert [call[1] for call in world.calls if call[0] == "sample"] == [0, 1, 2]
    assert [call[2] for call in world.calls if call[0] == "sample"] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_annotation_reads_the_rollout_h_and_the_update_reads_the_refreshed_h(config: Config) -> None:
    world = run(config)
    assert all(call[2] == ["rollout h", "rollout h"] for call in world.calls if call[0] == "annotate")
    assert all(call[2] == ["fresh h", "fresh h"] for call in world.calls if call[0] == "reward")


def test_omega_follows_the_cosine_and_serves_annotation_and_update_alike(config: Config) -> None:
    world = run(config)
    expected = [max((math.cos(math.pi * t / 3) + 1) / 2, 0.6) for t in (1, 2, 3)]
    for role in ("annotate", "reward"):
        assert [call[3] for call in world.calls if call[0] == role] == pytest.approx(expected, abs=1e-12)


def test_constant_omega_is_the_floor(config: Config) -> None:
    config.reward.omega_schedule = OmegaSchedule.constant
    assert [omega_at(config, t) for t in (1, 3)] == [0.6, 0.6]


def test_advantages_are_leave_one_out_within_each_group(config: Config) -> None:
    world = run(config)
    policy = next(call for call in world.calls if call[0] == "policy")
    assert policy[1] == [[-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]]


def test_resume_goes_on_after_the_restored_step_without_evaluating_step_0(config: Config) -> None:
    world = run(config, start=2)
    assert [call[1] for call in world.calls if call[0] == "sync"] == [2, 3]
    assert world.rewound == 2
    assert world.evaluated == [3]
    assert [record[0] for record in world.records] == [3]


def test_evaluations_and_checkpoints_fall_on_their_steps_and_on_the_last(config: Config) -> None:
    world = run(config)
    assert world.evaluated == [0, 2, 3]
    assert world.saved == [2, 3]


def test_told_to_stop_a_run_saves_the_step_it_is_in_and_starts_no_other(config: Config) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    world = run(config, stop_after=2, ends=Preempted)
    assert [record[0] for record in world.records] == [1, 2]
    assert world.saved == [2]


def test_an_alarm_that_ends_the_run_does_so_once_its_step_is_saved(config: Config) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    world = run(config, alarm_after=3, ends=Alarmed)
    assert [record[0] for record in world.records] == [1, 2, 3]
    assert world.saved == [3]


def test_an_alarm_in_the_last_step_ends_nothing(config: Config) -> None:
    world = run(config, alarm_after=3)
    assert [record[0] for record in world.records] == [1, 2, 3]
    assert world.saved == [2, 3]


def test_the_initial_reward_that_shapes_is_the_recorders(config: Config) -> None:
    config.reward.shape = RewardShape.par
    shaped = next(call[1] for call in run(config).calls if call[0] == "policy")
    rewards = [1 / (1 + math.exp(1 - n)) for n in range(K)]
    others = [(sum(rewards) - reward) / (K - 1) for reward in rewards]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert shaped[0][:K] == pytest.approx(expected, rel=1e-5)


def test_shards_cut_the_step_into_whole_groups(config: Config) -> None:
    prompts = [Prompt(index=i, text="") for i in range(5)]
    plans = sample_plans(config, prompts, step=7)
    assert [[p.index for p in plan.prompts] for plan in plans] == [[0, 1], [2, 3], [4]]
    assert {plan.step for plan in plans} == {7}
