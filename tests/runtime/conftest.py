"""One small local Ray cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from r2m_ray.config.schema import ClusterConfig
from r2m_ray.runtime.cluster import cluster


@pytest.fixture(scope="package")
def local_cluster() -> Iterator[None]:
    assert not ray.is_initialized()
    with cluster(ClusterConfig(cpus=2, object_store_gb=0.2)):
        yield
    assert not ray.is_initialized()
