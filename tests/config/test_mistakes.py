"""Mistakes in one field of a configuration: names, types and ranges, all reported at once with a remedy."""

from __future__ import annotations

import pytest
from complaints import complaint

from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config


def test_all_mistakes_are_reported_at_once() -> None:
    text = complaint(
        "experiment=dem",
        "reward=vanila",
        "algo.stepz=3",
        "omega_floor=0.5",
        "algo.temperature=nan",
        "algo.responses_per_prompt=1",
        "policy.learning_rate=-1",
        "task.overlong=eror",
        "run.resume=maybe",
        "run.name=../up",
        "algo.epochs=1,2",
        "==",
        "algo.minibatch_prompts=6",
        "reward.max_grad_norm=inf",
    )
    assert text.startswith("14 problems")
    for words in (
        "experiment=dem: no such option; there are demo, ",
        "Did you mean demo?",
        "reward=vanila: no such option",
        "Did you mean vanilla?",
        "algo.stepz: no such field",
        "Did you mean algo.steps?",
        "Did you mean reward.omega_floor?",
        "algo.temperature: nan is not a number ≥ 0.01",
        "algo.responses_per_prompt: 1 is not a whole number ≥ 2",
        "policy.learning_rate: -1 is not a number ≥ 0",
        "task.overlong: eror is not one of error, drop. Did you mean error?",
        "run.resume: maybe is not true or false",
        "algo.epochs=1,2: is several values",
        "algo.minibatch_prompts: 6 is not a multiple of 4",
        "use 4 or 8",
        "reward.max_grad_norm: inf is not a number > 0",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algo.steps=2.5", "algo.steps: 2.5 is not a whole number ≥ 1"),
        ("algo.steps=many", "algo.steps: many is not a whole number ≥ 1"),
        ("algo.steps=null", "algo.steps: null is not a whole number ≥ 1"),
        ("algo.clip_low=1.0", "algo.clip_low: 1.0 is not a number in (0, 1)"),
        ("reward.omega_floor=1.01", "reward.omega_floor: 1.01 is not a number in [0, 1]"),
        ("reward.entropy_weight=-0.1", "reward.entropy_weight: -0.1 is not a number in [0, 1]"),
        ("algo.temperature=0", "algo.temperature: 0 is not a number ≥ 0.01"),
        ("algo.advantage=rlo", "Did you mean rloo?"),
        ("model.dtype=float16", "one of float32, bfloat16. Did you mean bfloat16?"),
        ("algo=7", "algo: is a section, not a value"),
        ("rewards.omega_floor=1", "Did you mean reward?"),
        ("learning_rate=1", "Did you mean policy.learning_rate or reward.learning_rate?"),
        ("algo.learning_rate=1", "Did you mean policy.learning_rate or reward.learning_rate?"),
        ("rollout.engine_args=fast", "rollout.engine_args: fast is not a mapping"),
        ("rollout.engine_args.x=nan", "rollout.engine_args.x: nan is not a finite number"),
        ("policy.deepspeed={a: [1.0, inf]}", "policy.deepspeed.a[1]: inf is not a finite number"),
        ("run.name=???", "run.name: needs a value; give run.name=…"),
        ("run.root=${task.nothing}", "task.nothing"),
        ("~algo.nothing", "there is nothing to delete"),
        ("run.name=a b", "run.name: 'a b' is not 1 to 100 of"),
    ],
)
def test_a_mistake_names_field_value_and_remedy(override: str, words: str) -> None:
    assert words in complaint(override)


@pytest.mark.parametrize(
    "name",
    [
        "../x", "x/../../y", "..", "/tmp/x", "a/b", "a\\b", ".hidden", "", "a\nb", "run\n", "a\0b", "\x1b[2J",
        "\u202e", "ü", "x" * 101, "x" * 300,
    ],
)  # fmt: skip
def test_run_names_that_could_leave_the_root_are_refused(name: str) -> None:
    config = Config()
    config.run.name = name
    assert [problem.path for problem in validate(config)] == ["run.name"]


@pytest.mark.parametrize("name", ["run", "a.b-c_D9", "x" * 100])
def test_run_names_of_the_allowed_characters_pass(name: str) -> None:
    config = Config()
    config.run.name = name
    assert validate(config) == []


def test_messages_spell_out_control_characters() -> None:
    text = complaint("model.dtype='\x1b[2J\u202e'")
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert "\\u202e" in text
