"""The schema: every field has a sentence, a type, a range and answers, and reading it loads no engine."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from r2m_ray.config.fields import deciding, fields, read, reference
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import RESHARD_OPTIONS, Compare, Config, Prepares, Resume

NUMBERS = [path for path, field in fields().items() if field.kind in (int, float)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, "1", True])
def test_no_number_may_be_negative_or_not_finite_or_of_another_type(value: object) -> None:
    for path in NUMBERS:
        config = Config()
        section, name = path.split(".")
        setattr(getattr(config, section), name, value)
        assert path in {problem.path for problem in validate(config) if not problem.warning}


def test_numbers_have_a_range_and_a_default_of_their_type() -> None:
    assert len(NUMBERS) > 70
    for path in NUMBERS:
        field = fields()[path]
        assert type(field.default) is field.kind, path
        assert any(sign in field.allowed for sign in ("≥", ">", "in [", "in (")), path


def test_a_whole_number_serves_as_a_number() -> None:
    config, problems = read({"policy": {"learning_rate": 1}}, {})
    assert problems == []
    assert type(config.policy.learning_rate) is float


def test_the_defaults_alone_are_valid() -> None:
    assert validate(Config()) == []


def test_every_field_has_a_sentence() -> None:
    assert len(fields()) == sum(len(section) for section in asdict(Config()).values())
    assert [path for path, field in fields().items() if not field.sentence.endswith(".")] == []


def test_an_answer_of_a_section_holds_for_its_fields_unless_they_give_their_own() -> None:
    known = fields()
    assert known["cluster.cpus"].resume is Resume.free
    assert known["cluster.threads_per_actor"].resume is Resume.reshard
    assert known["algo.steps"].compare is Compare.always
    assert known["algo.epochs"].compare is Compare.arm
    assert (known["prepare.root"].compare, known["prepare.root"].prepares) == (Compare.never, Prepares.never)
    assert known["prepare.reward_width"].prepares is Prepares.always
    assert (known["model.dtype"].resume, known["model.dtype"].compare) == (Resume.never, Compare.never)


def test_fields_that_a_resumed_run_may_change_are_few_and_none_of_the_method() -> None:
    # Rows that are skipped or not are the data's content, which is compared.
    sections = {path.partition(".")[0] for path in deciding(Resume.free) if path != "task.skip_bad_rows"}
    assert sections.isdisjoint({"algo", "model", "task", "reward", "feedback", "policy"})
    assert [path.rpartition(".")[0] in fields() for path in RESHARD_OPTIONS] == [True]


def test_the_reference_says_type_default_sentence_and_what_a_field_decides() -> None:
    text = reference("policy.ranks")
    assert text.splitlines()[:3] == [
        "`policy.ranks` = `1`: a whole number ≥ 1",
        "  Data-parallel learner ranks.",
        "  (may change on resume with run.reshard=true; prepared models do not depend on it; equal in "
        "compared runs of one arm)",
    ]
    assert all(f"`{path}` = " in reference() for path in fields())


def test_reading_a_configuration_imports_no_engine() -> None:
    code = (
        "import sys\n"
        "import r2m_ray.__main__, r2m_ray.cli.checks.preflight\n"
        "from r2m_ray.config.compose import load_config\n"
        "load_config(['experiment=demo'])\n"
        "engines = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'trl', 'wandb'}\n"
        "print(sorted(engines & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_choices_are_named_as_they_are_valued() -> None:
    kinds: list[Any] = [field.kind for field in fields().values() if field.choices]
    assert len(kinds) > 15
    # OmegaConf writes a choice by its name, users read its value.
    assert all(member.name == member.value for kind in kinds for member in kind)
