"""A small run of the driver with made-up engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_roles import World, small_config
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Config


@pytest.fixture
def config() -> Config:
    return small_config()


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(directory=tmp_path / "run", tokenizer=tiny_tokenizer)
