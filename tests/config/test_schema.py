"""The schema: every field has a sentence, a type and a range, and reading it loads no engine."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest

import r2m_ray
from r2m_ray.config.read import range_of, schema
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config

PACKAGE = Path(r2m_ray.__file__).parent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_no_number_may_be_negative_or_not_finite(value: float) -> None:
    for path in (path for path, kind in schema().items() if range_of(kind)):
        config = Config()
        section, name = path.split(".")
        setattr(getattr(config, section), name, value)
        assert path in {problem.path for problem in validate(config) if not problem.warning}


def test_every_number_has_a_range_that_holds_its_default() -> None:
    defaults = flat(Config())
    for path, kind in schema().items():
        bounds = range_of(kind)
        is_number = isinstance(defaults[path], int | float) and not isinstance(defaults[path], bool)
        assert (bounds is not None) == is_number, path
        assert bounds is None or defaults[path] in bounds, path
        assert bounds is None or get_args(kind)[0] is type(defaults[path]), path


def test_the_defaults_alone_are_valid() -> None:
    assert validate(Config()) == []


def test_every_field_has_a_sentence() -> None:
    seen = 0
    for file in ("config/schema.py", "config/schema_run.py"):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if not isinstance(node, ast.ClassDef) or node.name == "Config":
                continue
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                    assert ast.literal_eval(following.value).endswith(".")
                    seen += 1
    assert seen == len(schema())


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
    kinds = {kind for kind in schema().values() if isinstance(kind, type) and issubclass(kind, Enum)}
    assert len(kinds) > 15
    # OmegaConf reads a choice by its name, users by its value.
    assert all(member.name == member.value for kind in kinds for member in kind)


def flat(config: Config) -> dict[str, Any]:
    values = asdict(config)
    return {f"{section}.{name}": value for section in values for name, value in values[section].items()}
