"""Kill −9 in every role: the run ends as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.e2e


def test_every_role_dies_once_and_the_run_is_the_same(lab: Any, undisturbed: Any, same: Any) -> None:
    faults = [
        "rollout-0@2:mid_generate:kill",
        "reference-0@3:logprobs:kill",
        "reward-0@4:annotate:kill",
        "policy-0@5:optimizer:kill",
        "rollout-0@4:load_bucket:kill",
    ]
    run = lab.run("everyone", faults=faults)
    assert len(run.evidence) == len(faults)
    same(run, undisturbed)
    for name in ("rollout-0 died during", "reference-0 died during", "reward-0 died", "policy-0 died"):
        assert name in run.text
    # The learner and the reward model go back to a commit; the others are replaced where they are.
    assert run.text.count("back to the last commit") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "rollout-0@1:mid_generate:kill",
        "reference-0@1:logprobs:kill",
        "reward-0@1:annotate:kill",
        "reward-0@3:update:kill",
        "policy-0@1:forward:kill",
        "policy-0@2:optimizer:kill",
        "policy-0@any:save:kill",
        "reward-0@any:save:kill",
    ],
)
def test_a_busy_actor_dies(lab: Any, undisturbed: Any, same: Any, fault: str) -> None:
    run = lab.run(f"busy-{fault.split(':')[1]}-{fault[:6]}", faults=[fault])
    assert len(run.evidence) == 1
    same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["RolloutActor", "ReferenceActor", "RewardActor", "PolicyActor"])
def test_an_idle_actor_dies(lab: Any, undisturbed: Any, same: Any, title: str) -> None:
    running = lab.start(f"idle-{title}")
    running.until(lambda: running.finished_steps() >= 1)
    victim = running.actor(title)
    victim.kill()
    run = running.wait()
    lab.clean(running)
    assert "died during" in run.text
    same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("point", ["forward", "all_reduce", "optimizer"])
def test_one_of_two_learner_ranks_dies(lab: Any, same: Any, stage: int, point: str) -> None:
    wide = ["policy.ranks=2", f"+policy.deepspeed.zero_optimization.stage={stage}", "algo.steps=3"]
    name = f"ranks-{stage}"
    whole = lab.once(name, *wide)
    run = lab.run(f"{name}-{point}", *wide, faults=[f"policy-1@2:{point}:kill"])
    assert len(run.evidence) == 1
    assert "policy-1 died during policy update" in run.text
    same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "rollout-0@2:sample:stop",
        "reference-0@2:logprobs:stop",
        "reward-0@2:annotate:stop",
        "policy-0@2:forward:stop",
    ],
)
def test_an_actor_that_hangs_is_replaced_at_the_deadline(
    lab: Any, undisturbed: Any, same: Any, fault: str
) -> None:
    limits = ["cluster.phase_timeout_s=20", "cluster.stop_grace_s=15"]
    run = lab.run(f"hang-{fault[:5]}", *limits, faults=[fault])
    assert len(run.evidence) == 1
    assert "within 20 s" in run.text
    same(run, undisturbed)


@pytest.mark.slow
def test_one_of_two_ranks_hangs(lab: Any, same: Any) -> None:
    wide = ["policy.ranks=2", "+policy.deepspeed.zero_optimization.stage=2", "algo.steps=3"]
    whole = lab.once("ranks-2", *wide)
    limits = ["cluster.phase_timeout_s=20", "cluster.stop_grace_s=15"]
    run = lab.run("rank-hangs", *wide, *limits, faults=["policy-1@2:forward:stop"])
    assert "policy-1" in run.text
    same(run, whole)


@pytest.mark.slow
def test_a_poisoned_chunk_is_named(lab: Any) -> None:
    deadly = "rollout-0@2:sample:kill"
    run = lab.run("poison", "cluster.max_recoveries=1", faults=[deadly, deadly])
    assert run.code == 3
    assert len(run.evidence) == 2
    assert "sample: prompts " in run.text
    assert "of step 2 ended 2 actors in a row" in run.text


@pytest.mark.slow
def test_a_learner_that_never_survives_a_step_ends_the_run(lab: Any) -> None:
    deadly = "policy-0@3:forward:kill"
    run = lab.run("loop", "cluster.max_recoveries=1", faults=[deadly, deadly])
    assert run.code == 3
    assert "loss 2 in a row in step 3" in run.text
    assert run.commits == ["step-000002"]
