"""The object store: full, it spills and the run is the same; over many steps its use stays flat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import ClusterConfig
from r2m_ray.run.files import read_steps
from r2m_ray.runtime import launch
from r2m_ray.runtime.cluster import cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

STORE_GB = 0.1


@pytest.fixture
def small_store() -> Iterator[None]:
    with cluster(ClusterConfig(cpus=4, object_store_gb=STORE_GB)):
        yield


def stored(kind: str) -> float:
    """MiB in the store, or spilled, as Ray counts them."""
    text = memory_summary(stats_only=True)
    found = re.search(rf"{kind}[^\d]*(\d+) MiB", text)
    if found is None:
        assert kind == "Spilled", text
        return 0.0
    return float(found.group(1))


def train_here(lab: Any, name: str, *overrides: str) -> Path:
    """A run that this process drives."""
    settings = [*lab.common, f"run.root={lab.root / 'runs'}", f"run.name={name}", *overrides]
    return launch.run_training(load_config(settings))


def test_a_full_store_spills_and_the_run_is_the_same(lab: Any, undisturbed: Any, small_store: None) -> None:
    hog = [ray.put(np.full(8 * 2**20, n, dtype=np.uint8)) for n in range(16)]
    assert stored("Spilled") > 0
    directory = train_here(lab, "spill")
    assert [int(ray.get(held)[0]) for held in hog] == list(range(16))
    lab.read(directory).assert_same(undisturbed)


def test_the_stores_use_is_flat(lab: Any, small_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    log_step = launch.RunLog.step

    def measured(self: Any, *args: Any, **kwargs: Any) -> None:
        log_step(self, *args, **kwargs)
        used.append(stored("Plasma memory usage"))

    monkeypatch.setattr(launch.RunLog, "step", measured)
    directory = train_here(lab, "flat", "algo.steps=20", "algo.responses_per_prompt=32")
    assert len(read_steps(directory / "metrics.jsonl")) >= 20
    assert max(used) > 0
    # Two steps' records may overlap; what a twentieth step adds to a fifth would be a leak.
    assert max(used[15:]) <= 1.5 * max(used[2:7]) + 1
