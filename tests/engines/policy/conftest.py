"""The step that the tests of a learner of one rank train it on."""

from __future__ import annotations

import pytest
from learner_rows import learner_config, policy_batch

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import PolicyBatch


@pytest.fixture(scope="module")
def batches() -> list[PolicyBatch]:
    return [policy_batch(seed) for seed in range(3)]


@pytest.fixture
def config() -> Config:
    return learner_config()
