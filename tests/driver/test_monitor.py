"""Alarms: their levels, when they are on, what they say, and that a resumed run has the same ones. Guards:
what stops a run, after how many steps, and what the error says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from fake_roles import rows_of

from r2m_ray.config.schema import Config, GuardConfig, MonitorConfig, OnAlarm
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.driver.monitor import ALARMS, NONFINITE, Monitor, Reading, Watch
from r2m_ray.errors import Alarmed, RunError

BOUNDS = {"scale_ratio": 2.0, "frozen_gap": 3.0, "flip_rate": 0.35, "kl": 50.0}
KEYS = {
    "scale_ratio": "reward/scale_ratio",
    "flip_rate": "reward/pair_flip_rate",
    "kl": "policy/kl_sequence",
}


def config(steps: int = 3, on_alarm: OnAlarm = OnAlarm.warn) -> MonitorConfig:
    return MonitorConfig(steps=steps, on_alarm=on_alarm, **BOUNDS)


def watch(rows: Sequence[dict[str, Any]] = (), on_alarm: OnAlarm = OnAlarm.warn) -> Watch:
    settings = Config()
    settings.monitor = config(on_alarm=on_alarm)
    return Watch(settings, rows)


def row(step: int, **values: float | None) -> dict[str, Any]:
    """A step of a healthy run, whose own reward has a within-group spread of ½ in the frozen model's eyes."""
    found = {"scale_ratio": 0.9, "frozen_gap": 0.2, "flip_rate": 0.05, "kl": 4.0} | values
    frozen = {"reward/frozen_mean": 2.0, "reward/frozen_group_std": 0.5, "omega": 0.5}
    gap = found.pop("frozen_gap")
    metrics = {KEYS[name]: value for name, value in found.items()}
    mean = None if gap is None else gap + 0.5 * 2.0
    return {"step": step, "kind": "step", "reward/mean": mean, **frozen, **metrics}


def rows(**values: Sequence[float | None]) -> list[dict[str, Any]]:
    (length,) = {len(series) for series in values.values()}
    return [row(t + 1, **{name: series[t] for name, series in values.items()}) for t in range(length)]


def replay(config: MonitorConfig, steps: Sequence[dict[str, Any]]) -> list[Reading]:
    monitor = Monitor(config)
    return [monitor.observe(step["step"], step) for step in steps]


def test_every_bound_has_an_alarm_and_every_alarm_a_bound() -> None:
    bounds = {field.name for field in fields(MonitorConfig)} - {"on_alarm", "steps"}
    assert bounds == set(ALARMS) == set(BOUNDS)


@pytest.mark.parametrize(("name", "over"), [("scale_ratio", 2.1), ("flip_rate", 0.4), ("kl", 51.0)])
def test_an_alarm_is_on_while_the_median_of_the_last_steps_is_over_its_bound(name: str, over: float) -> None:
    bound = BOUNDS[name]
    # Over, over, at the bound, over, then back.
    readings = replay(config(), rows(**{name: [over, over, bound, over, 0.1, 0.1, 0.1]}))
    assert [name in reading.alarms for reading in readings] == [False, False, True, True, False, False, False]
    assert [reading.new for reading in readings] == [(), (), (name,), (), (), (), ()]
    assert readings[2].levels[name] == over


def test_single_noisy_steps_raise_no_alarm() -> None:
    noisy = [1e9 if t % 5 in (0, 2) else 0.1 for t in range(60)]
    found = replay(config(steps=5), rows(scale_ratio=noisy, flip_rate=[min(v, 1.0) for v in noisy], kl=noisy))
    assert [reading.alarms for reading in found] == [()] * 60


def test_no_alarm_before_there_are_enough_steps() -> None:
    found = replay(config(steps=4), rows(kl=[99.0] * 4))
    assert [reading.alarms for reading in found] == [(), (), (), ("kl",)]
    assert found[2].levels["kl"] is None


def test_the_gap_is_its_rise_in_units_of_the_first_frozen_spread() -> None:
    gaps = [1.0, 1.2, 1.1, 2.0, 2.8, 2.9]
    series = rows(frozen_gap=gaps)
    for later in series[3:]:
        later["reward/frozen_group_std"] = 1e-4  # As where every response is the same one.
    levels = [reading.levels["frozen_gap"] for reading in replay(config(), series)]
    # Medians of three: 1.1, then 1.2, 2.0 and 2.8, less 1.1, over ½.
    assert levels[2:] == pytest.approx([0.0, 0.2, 1.8, 3.4], abs=1e-12)
    assert [reading.alarms for reading in replay(config(), series)][-2:] == [(), ("frozen_gap",)]


@pytest.mark.parametrize("frozen", [-9.0, 9.0])
def test_the_gap_is_neither_opened_nor_hidden_by_omega(frozen: float) -> None:
    """The frozen model times ω(t) from 1 to .6, and the same with a rise of its own at the end."""
    shrinking = rows(frozen_gap=[0.0] * 9)
    for t, step in enumerate(shrinking):
        w = 1 - 0.05 * t
        step |= {"omega": w, "reward/frozen_mean": frozen, "reward/mean": w * frozen}
    assert replay(config(), shrinking)[-1].levels["frozen_gap"] == pytest.approx(0.0, abs=1e-12)
    for step in shrinking[-3:]:
        step["reward/mean"] += 1.6
    assert replay(config(), shrinking)[-1].alarms == ("frozen_gap",)


def test_a_frozen_reward_without_spread_has_no_gap() -> None:
    series = rows(frozen_gap=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    flat = [step | {"reward/frozen_group_std": 0.0} for step in series]
    assert replay(config(), flat)[-1].levels["frozen_gap"] is None


def test_what_is_unknown_is_no_step() -> None:
    values = [3.0, None, math.nan, 3.0, math.inf, 3.0, -math.inf]
    found = replay(config(), rows(scale_ratio=values))
    assert [reading.alarms for reading in found] == [()] * 5 + [("scale_ratio",)] * 2
    bare = [{"step": t, "kind": "step"} for t in range(1, 6)]
    assert replay(config(), bare)[-1].alarms == ()


def test_a_resumed_run_has_the_alarms_of_an_uninterrupted_one() -> None:
    series = rows(
        scale_ratio=[1.0, 1.5, math.nan, 2.5, 2.5, 3.0, 1.0],
        frozen_gap=[0.0, 0.1, 0.3, math.inf, 2.0, 2.5, 3.1],
        flip_rate=[0.1, 0.4, 0.5, 0.6, 0.1, 0.1, 0.1],
        kl=[1 / 3, 20.0, 60.0, 70.0, 80.0, 40.0, 30.0],
    )

    def follow(watch: Watch, steps: Sequence[dict[str, Any]]) -> list[tuple[dict[str, float], list[str]]]:
        return [(watch.observe(step["step"], step), watch.news()) for step in steps]

    found = follow(watch(), series)
    # As the rows come back from the disk: what is not finite is null there.
    kept = [{k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in r.items()} for r in series]
    for cut in range(len(series)):
        on_disk = json.loads(json.dumps(kept[:cut]))
        assert follow(watch(on_disk), series[cut:]) == found[cut:], cut


def test_each_alarm_is_news_once_with_level_bound_and_remedy() -> None:
    watched, news = watch(), []
    for step in rows(scale_ratio=[2.5] * 3 + [0.5] * 3 + [2.5] * 3, kl=[1.0] * 6 + [64.0] * 3):
        watched.observe(step["step"], step)
        news += watched.news()
    first, second = news
    assert first.startswith("alarm scale_ratio at step 3: the own reward spreads 2.5 times as far")
    assert "(median of 3 steps; monitor.scale_ratio=2). Lower reward.learning_rate" in first
    assert second.startswith("alarm kl at step 8: the policy is 64 nats per response away")
    assert "algo.kl_weight" in second


def test_an_alarm_ends_the_run_only_where_it_should() -> None:
    series = rows(flip_rate=[0.5] * 3, kl=[60.0] * 3)
    assert not watch(series).ends_run
    assert not watch(series[:2], OnAlarm.stop).ends_run
    watched = watch(series, OnAlarm.stop)
    assert watched.ends_run
    with pytest.raises(Alarmed) as caught:
        watched.check()
    error = caught.value
    assert error.exit_code == 4
    lines = str(error).splitlines()
    assert [line.split(" at step 3")[0] for line in lines[:2]] == ["alarm flip_rate", "alarm kl"]
    assert "50% of the pairs" in lines[0]
    assert "monitor.on_alarm=warn" in lines[2]


CLEAN = dict.fromkeys(NONFINITE, 0.0) | {"policy/mismatch_mean": 0.01}


def guarded(*, nonfinite_steps: int = 3, logprob_gap: float = 0.5) -> Watch:
    config = Config()
    config.guard = GuardConfig(nonfinite_steps=nonfinite_steps, logprob_gap=logprob_gap)
    return Watch(config)


def check(
    watched: Watch, step: int, key: str | None = None, value: float = 2.0, rows: Sequence[str] = ()
) -> None:
    watched.guard(step, CLEAN | ({key: value} if key else {}), rows)


@pytest.mark.parametrize("key", list(NONFINITE))
def test_each_count_stops_the_run_after_so_many_steps_in_a_row(key: str) -> None:
    watched = guarded(nonfinite_steps=3)
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
            check(guarded(nonfinite_steps=1), 7, "reward/nonfinite", 9.0, [*rows, *more])
        assert f"step 7: 9 rewards ({'; '.join(rows)}{end}" in str(caught.value)


def test_a_fault_without_a_row_is_a_models() -> None:
    with pytest.raises(RunError, match="no single row is at fault"):
        check(guarded(nonfinite_steps=1), 1, "policy/skipped_steps")


def test_stale_weights_are_named_with_shard_and_both_versions() -> None:
    watched = guarded()
    watched.versions(5, [4, 4])
    with pytest.raises(RunError, match=r"step 5: shard 1 .* version 3, and version 4 was due"):
        watched.versions(5, [4, 3])


def test_a_log_prob_gap_above_the_limit_stops_the_run() -> None:
    watched = guarded(logprob_gap=0.5)
    check(watched, 5, "policy/mismatch_mean", 0.5)
    # Nothing to compare: every row was broken, which the other guard handles.
    check(watched, 5, "policy/mismatch_mean", math.nan)
    with pytest.raises(RunError, match=r"step 5: .* 0\.75 nats .* version 4; guard\.logprob_gap is 0\.5"):
        check(watched, 5, "policy/mismatch_mean", 0.75)
