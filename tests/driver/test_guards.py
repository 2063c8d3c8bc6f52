"""The guards: what stops a run, after how many steps, and what the error tells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from r2m_ray.config.schema import GuardConfig
from r2m_ray.core.batch import Annotation, Trajectories, pack_rows
from r2m_ray.driver.guards import NONFINITE, Guards
from r2m_ray.errors import RunError

CLEAN = dict.fromkeys(NONFINITE, 0.0) | {"policy/mismatch_mean": 0.01}


def shard(first: int, version: int = 4) -> Trajectories:
    prompts = [f"prompt {first + g}\x1b[31m" for g in range(2)]
    return pack_rows(
        prompts,
        [[1, 2]] * 2,
        [[7, 8]] * 4,
        ["r"] * 4,
        logprobs=[[-1.0, -2.0]] * 4,
        version=version,
    )


def note(rows: Trajectories) -> Annotation:
    return Annotation(
        layout=rows.layout,
        reward_N=torch.zeros(4),
        frozen_reward_N=torch.zeros(4),
        gold_N=torch.full((4,), math.nan),
        rte_ND=torch.zeros(4, 1),
        response_id_N=torch.arange(4),
    )


def check(guards: Guards, step: int, **found: float) -> None:
    rows = [shard(0), shard(2)]
    metrics = CLEAN | {key.replace("__", "/"): value for key, value in found.items()}
    guards.numbers(step, metrics, rows, [note(r) for r in rows])


@pytest.mark.parametrize("key", list(NONFINITE))
def test_each_count_stops_the_run_after_so_many_steps_in_a_row(key: str) -> None:
    guards = Guards(GuardConfig(nonfinite_steps=3))
    found: dict[str, Any] = {key.replace("/", "__"): 2.0}
    check(guards, 1, **found)
    check(guards, 2, **found)
    check(guards, 3)
    check(guards, 4, **found)
    check(guards, 5, **found)
    with pytest.raises(RunError, match=r"3 steps in a row .*\(guard\.nonfinite_steps=3\)") as caught:
        check(guards, 6, **found)
    assert caught.value.exit_code == 3
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:4]] == [
        "step 4",
        "step 5",
        "step 6",
    ]
    assert str(caught.value).count(f"2 {NONFINITE[key]}") == 3


def test_a_run_that_went_back_to_a_commit_counts_anew() -> None:
    guards = Guards(GuardConfig(nonfinite_steps=2))
    check(guards, 1, policy__skipped_steps=1.0)
    guards.rewind()
    check(guards, 1, policy__skipped_steps=1.0)
    with pytest.raises(RunError, match="2 steps in a row"):
        check(guards, 2, policy__skipped_steps=1.0)


def test_the_rows_at_fault_are_named_by_number_and_prompt() -> None:
    first, second = shard(0), shard(2)
    reward_N = torch.tensor([0.0, 1.0, math.inf, 0.0])
    logp_T = second.rollout_logp_T.clone()
    logp_T[second.layout.slice_of(1).stop - 1] = math.nan
    rows = [first, replace(second, rollout_logp_T=logp_T)]
    notes = [replace(note(first), reward_N=reward_N), note(second)]
    with pytest.raises(RunError) as caught:
        Guards(GuardConfig(nonfinite_steps=1)).numbers(7, CLEAN | {"reward/nonfinite": 1.0}, rows, notes)
    told = r"(row 2, prompt 'prompt 1\x1b[31m'; row 5, prompt 'prompt 2\x1b[31m')"
    assert f"step 7: 1 rewards {told}" in str(caught.value)


def test_at_most_eight_rows_are_named() -> None:
    rows = [shard(2 * i) for i in range(3)]
    notes = [replace(note(r), reward_N=torch.full((4,), math.nan)) for r in rows]
    with pytest.raises(RunError) as caught:
        Guards(GuardConfig(nonfinite_steps=1)).numbers(1, CLEAN | {"reward/nonfinite": 12.0}, rows, notes)
    assert "row 7, prompt" in str(caught.value)
    assert "row 8" not in str(caught.value)
    assert "; …)" in str(caught.value)


def test_a_fault_without_a_row_is_a_models() -> None:
    with pytest.raises(RunError, match="no row by itself"):
        check(Guards(GuardConfig(nonfinite_steps=1)), 1, policy__skipped_steps=2.0)


def test_stale_weights_are_told_with_both_versions() -> None:
    guards = Guards(GuardConfig())
    guards.versions(5, [shard(0), shard(2)])
    with pytest.raises(RunError, match=r"step 5: shard 1 .* version 3, and version 4 was due"):
        guards.versions(5, [shard(0), shard(2, version=3)])
    with pytest.raises(RunError, match=r"step 6: shard 0 .* version 4, and version 5 was due"):
        guards.versions(6, [shard(0)])


def test_a_log_prob_gap_above_the_limit_stops_the_run() -> None:
    guards = Guards(GuardConfig(logprob_gap=0.5))
    check(guards, 5, policy__mismatch_mean=0.5)
    # Nothing to compare: every row was broken, which is another guard's matter.
    check(guards, 5, policy__mismatch_mean=math.nan)
    with pytest.raises(RunError, match=r"step 5: .* 0\.75 nats .* version 4; guard\.logprob_gap is 0\.5"):
        check(guards, 5, policy__mismatch_mean=0.75)
