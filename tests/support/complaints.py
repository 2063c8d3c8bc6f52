"""What is reported about a configuration."""

from __future__ import annotations

import pytest

from r2m_ray.config.compose import load_config
from r2m_ray.errors import InputError, Problem


def complaint(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(overrides)
    return str(caught.value)


def lines_about(text: str, path: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(f"{path}:")]


def only(problems: list[Problem]) -> str:
    assert len(problems) == 1, problems
    return str(problems[0])
