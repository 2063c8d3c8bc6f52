"""The guards: what stops a run, after how many steps, and what the error says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from fake_roles import rows_of

from r2m_ray.config.schema import Config, GuardConfig
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.driver.monitor import NONFINITE, Watch
from r2m_ray.errors import RunError

CLEAN = dict.fromkeys(NONFINITE, 0.0) | {"policy/mismatch_mean": 0.01}


def watch(*, nonfinite_steps: int = 3, logprob_gap: float = 0.5) -> Watch:
    config = Config()
    config.guard = GuardConfig(nonfinite_steps=nonfinite_steps, logprob_gap=logprob_gap)
    return Watch(config)


def check(
    watched: Watch, step: int, key: str | None = None, value: float = 2.0, rows: Sequence[str] = ()
) -> None:
    watched.guard(step, CLEAN | ({key: value} if key else {}), rows)


@pytest.mark.parametrize("key", list(NONFINITE))
def test_each_count_stops_the_run_after_so_many_steps_in_a_row(key: str) -> None:
    watched = watch(nonfinite_steps=3)
    check(watched, 1, key)
    check(watched, 2, key)
    check(watched, 3)
    check(watched, 4, key)
    check(watched, 5, key)
    with pytest.raises(RunError, match=r"3 steps in a row .*\(guard\.nonfinite_steps=3\)") as caught:
        check(watched, 6, key)
    assert caught.value.exit_code == 3
    lines = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert lines[1:4] == ["step 4", "step 5", "step 6"]
    assert str(caught.value).count(f"2 {NONFINITE[key]}") == 3


def test_at_most_eight_rows_are_named_each_with_its_prompt() -> None:
    prompts = tuple(Prompt(index=n, text=f"{n}\x1b[31m {'x' * 99}") for n in range(9))
    plan = SamplePlan(prompts=prompts, group_size=1, step=1, seed=0, temperature=1.0, max_new_tokens=2)
    rows = rows_of([math.nan] * 8 + [0.0], group_size=1).broken([plan])
    assert rows == [rf"row {n}, prompt '{n}\x1b[31m {'x' * 53}'" for n in range(8)]
    for more, end in (([], ")"), (["row 8"], "; …)")):
        with pytest.raises(RunError) as caught:
            check(watch(nonfinite_steps=1), 7, "reward/nonfinite", 9.0, [*rows, *more])
        assert f"step 7: 9 rewards ({'; '.join(rows)}{end}" in str(caught.value)


def test_a_fault_without_a_row_is_a_models() -> None:
    with pytest.raises(RunError, match="no single row is at fault"):
        check(watch(nonfinite_steps=1), 1, "policy/skipped_steps")


def test_stale_weights_are_named_with_shard_and_both_versions() -> None:
    watched = watch()
    watched.versions(5, [4, 4])
    with pytest.raises(RunError, match=r"step 5: shard 1 .* version 3, and version 4 was due"):
        watched.versions(5, [4, 3])


def test_a_log_prob_gap_above_the_limit_stops_the_run() -> None:
    watched = watch(logprob_gap=0.5)
    check(watched, 5, "policy/mismatch_mean", 0.5)
    # Nothing to compare: every row was broken, which the other guard handles.
    check(watched, 5, "policy/mismatch_mean", math.nan)
    with pytest.raises(RunError, match=r"step 5: .* 0\.75 nats .* version 4; guard\.logprob_gap is 0\.5"):
        check(watched, 5, "policy/mismatch_mean", 0.75)
