"""Prepared models of a small note2answer world, and runs on them over Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import SMALL

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import ClusterConfig
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.launch import run_training
from r2m_ray.tasks.prepare import measurement
from r2m_ray.tasks.prepare.store import prepare

SETTINGS = (
    *SMALL, "algo.steps=3", "task.max_new_tokens=24", "evaluate.every=2", "evaluate.prompts=8",
    "evaluate.pairs=8", "checkpoint.every=1", "checkpoint.keep=3",
)  # fmt: skip

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a small run whose models are prepared."""
    found = [*SETTINGS, f"prepare.root={tmp_path_factory.mktemp('prepared')}"]
    with pytest.MonkeyPatch.context() as patch:
        # Whether these models are good is not asked, and asking takes most of so small a preparation.
        patch.setattr(measurement, "GOLD_PROMPTS", 64)
        prepare(load_config(found))
    return found


@pytest.fixture(scope="module")
def train(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Trains by the small settings and some overrides; all runs of a file of tests share one cluster."""
    common = [*settings, f"run.root={tmp_path_factory.mktemp('runs')}"]

    def run(name: str, *overrides: str) -> Path:
        return run_training(load_config([*common, f"run.name={name}", *overrides]))

    with cluster(ClusterConfig(cpus=4, object_store_gb=0.3)):
        yield run


@pytest.fixture(scope="module")
def r2m(train: Train) -> Path:
    return train("r2m")


@pytest.fixture(scope="module")
def vanilla(train: Train) -> Path:
    return train("vanilla", "reward=vanilla")
