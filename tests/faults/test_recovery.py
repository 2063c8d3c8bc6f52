"""Kill −9 in every role: the run ends as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "faults",
    [
        # Nothing is committed yet: the roll back goes to the start.
        ["rollout-0@1:sample:kill", "reference-0@1:logprobs:kill", "policy-0@1:forward:kill"],
        ["reward-0@1:annotate:kill", "reward-0@3:update:kill", "rollout-0@2:load_bucket:kill"],
        # Two roles in one phase: the rollback interrupts the other's replacement.
        ["reward-0@2:annotate:kill", "reference-0@2:logprobs:kill", "reward-0@5:update:kill"],
        ["policy-0@2:save:kill", "reward-0@4:save:kill", "policy-0@6:all_reduce:kill"],
    ],
)
def test_busy_actors_die(lab: Any, undisturbed: Any, faults: list[str]) -> None:
    run = lab.run(f"busy-{faults[0].replace('@', '-').split(':')[0]}", faults=faults)
    assert len(run.evidence) == len(faults)
    run.assert_same(undisturbed)


def test_idle_actors_die(lab: Any) -> None:
    settings = ["algo.steps=40"]
    whole = lab.once("forty", *settings)
    running = lab.start("idle", *settings)
    for title in ("RolloutActor", "ReferenceActor", "RewardActor", "PolicyActor"):
        name = title.removesuffix("Actor").lower()
        before = running.finished_steps()
        running.until(lambda before=before: running.finished_steps() > before)
        running.actor(title).kill()
        running.until(lambda name=name: f"{name}-0 replaced after" in running.output.read_text())
    run = running.wait()
    lab.clean(running)
    run.assert_same(whole)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_of_two_learner_ranks_dies(lab: Any, stage: int) -> None:
    wide = ["policy.ranks=2", f"+policy.deepspeed.zero_optimization.stage={stage}", "algo.steps=4"]
    whole = lab.once(f"ranks-{stage}", *wide)
    faults = ["policy-1@1:forward:kill", "policy-1@2:all_reduce:kill", "policy-1@3:optimizer:kill"]
    run = lab.run(f"ranks-{stage}-killed", *wide, faults=faults)
    assert len(run.evidence) == len(faults)
    assert run.text.count("policy-1 died during policy update") == len(faults)
    run.assert_same(whole)


def test_actors_that_hang_are_replaced_at_the_deadline(lab: Any, undisturbed: Any) -> None:
    limits = ["cluster.phase_timeout_s=20", "cluster.stop_grace_s=15"]
    faults = [
        "rollout-0@1:sample:stop",
        "reference-0@2:logprobs:stop",
        "reward-0@3:annotate:stop",
        "policy-0@4:forward:stop",
    ]
    run = lab.run("hang", *limits, faults=faults)
    assert len(run.evidence) == len(faults)
    assert run.text.count("within 20 s") == len(faults)
    run.assert_same(undisturbed)


def test_one_of_two_ranks_hangs(lab: Any) -> None:
    wide = ["policy.ranks=2", "+policy.deepspeed.zero_optimization.stage=2", "algo.steps=4"]
    whole = lab.once("ranks-2", *wide)
    limits = ["cluster.phase_timeout_s=20", "cluster.stop_grace_s=15"]
    run = lab.run("rank-hangs", *wide, *limits, faults=["policy-1@2:forward:stop"])
    assert "policy-1" in run.text
    run.assert_same(whole)


def test_a_poisoned_chunk_is_named(lab: Any) -> None:
    deadly = "rollout-0@2:sample:kill"
    run = lab.run("poison", "cluster.max_recoveries=1", faults=[deadly, deadly])
    assert run.code == 3
    assert len(run.evidence) == 2
    assert "sample: prompts " in run.text
    assert "of step 2 ended 2 actors in a row" in run.text


def test_a_learner_that_never_survives_a_step_ends_the_run(lab: Any) -> None:
    deadly = "policy-0@3:forward:kill"
    run = lab.run("loop", "cluster.max_recoveries=1", faults=[deadly, deadly])
    assert run.code == 3
    assert "loss 2 in a row in step 3" in run.text
    assert run.commits == ["step-000002"]
