"""The configuration of the learner that these tests train."""

from __future__ import annotations

import pytest
from learner_rows import learner_config

from r2m_ray.config.schema import Config


@pytest.fixture
def config() -> Config:
    return learner_config()
