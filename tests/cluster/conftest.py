"""A real Ray on this machine, shared by the tests of the cluster package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.connection import connect
from cluster.ray_executor import RayExecutor
from stages.executor import ClusterConfig

CLUSTER = ClusterConfig(num_cpus=2, num_gpus=0, object_store_gib=0.1, backoff_s=0.0)


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RayExecutor]:
    """Start Ray once; it ends with the session."""
    executor = connect(CLUSTER)
    yield executor
    executor.close()
