"""A learner of one rank, and the step that its tests train it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import PolicyBatch
from r2m_ray.engines.policy.learner import PolicyLearner

IDS = (0, 1, 2)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def batches(make_policy_batch: Callable[[int], PolicyBatch]) -> list[PolicyBatch]:
    return [make_policy_batch(seed) for seed in IDS]


@pytest.fixture
def config(make_learner_config: Callable[..., Config]) -> Config:
    return make_learner_config()


def learner(config: Config, model_dir: Path) -> PolicyLearner:
    return PolicyLearner(
        config=config, model_dir=str(model_dir), rank=0, world_size=1, device=torch.device("cpu")
    )


def weights(policy: PolicyLearner) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for bucket in policy.weight_buckets(10_000) for name, tensor in bucket.tensors()
    }


def same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="session")
def make_learner() -> Callable[[Config, Path], PolicyLearner]:
    return learner


@pytest.fixture(scope="session")
def weights_of() -> Callable[[PolicyLearner], Weights]:
    return weights


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Weights, Weights], None]:
    return same_weights
