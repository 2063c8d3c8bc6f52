"""Sweeps: the cross product of several values, a legal name for each job, and all mistakes at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_ray.config.compose import load_config
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config
from r2m_ray.config.sweep import NAME_LENGTH, job_name, sweep
from r2m_ray.errors import InputError


def test_a_sweep_is_the_cross_product_with_a_name_for_each() -> None:
    jobs = sweep(["experiment=demo", "reward=vanilla,r2m", "run.seed=0,1", "algo.steps=10"])
    assert [job.run.name for job in jobs] == [
        "demo-reward-vanilla-run.seed-0",
        "demo-reward-vanilla-run.seed-1",
        "demo-reward-r2m-run.seed-0",
        "demo-reward-r2m-run.seed-1",
    ]
    assert [(job.reward.update_steps, job.run.seed) for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    name = f"run.name={jobs[2].run.name}"
    assert load_config(["experiment=demo", "reward=r2m", "run.seed=0", "algo.steps=10", name]) == jobs[2]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("run.name=a,b", ["a", "b"]),
        ("reward=glob(r2m_no_*)", ["run-reward-r2m_no_bt", "run-reward-r2m_no_gre"]),
        ("run.seed=range(3,5)", ["run-run.seed-3", "run-run.seed-4"]),
        (
            "policy.learning_rate=1e-4,3e-4",
            ["run-policy.learning_rate-0.0001", "run-policy.learning_rate-0.0003"],
        ),
        ("run.seed=1", ["run"]),
    ],
)
def test_sweep_grammar_and_names(override: str, names: list[str]) -> None:
    assert [job.run.name for job in sweep([override])] == names


def test_a_sweep_tells_the_mistakes_of_all_jobs_once() -> None:
    with pytest.raises(InputError) as caught:
        sweep(["reward=vanila,r2n,r2m", "algo.stepz=3"])
    text = str(caught.value)
    assert text.count("algo.stepz") == 1
    assert "Did you mean vanilla?" in text
    assert "reward=r2n" in text
    with pytest.raises(InputError, match="use choice or range"):
        sweep(["algo.temperature=interval(0,1)"])
    with pytest.raises(InputError, match="not of the form"):
        sweep(["==", "run.seed=0,1"])


@settings(deadline=None)
@given(base=st.from_regex(r"[a-z]{1,60}", fullmatch=True), suffix=st.text(max_size=150))
def test_job_names_are_always_legal(base: str, suffix: str) -> None:
    config = Config()
    config.run.name = job_name(base, [suffix])
    assert len(config.run.name) <= NAME_LENGTH
    assert validate(config) == []


def test_names_that_lost_characters_stay_apart() -> None:
    names = {job.run.name for job in sweep(["model.attention='a b','a/b'"])}
    assert len(names) == 2
    assert all(name.startswith("run-model.attention-_a_b_-") for name in names)


def test_long_job_names_stay_apart() -> None:
    names = {job_name("run", [f"{'x' * 120}={i}"]) for i in range(50)}
    assert len(names) == 50
