"""Redis servers that the whole session shares."""

from collections.abc import Iterator

import pytest

from .servers import Cluster, Server, single


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server without replicas; a test that uses it empties it first."""
    with single(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


@pytest.fixture
def redis_cluster(shared_cluster: Cluster) -> Cluster:
    """Three primaries and three replicas, empty, whatever the test before did to them."""
    shared_cluster.mend()
    return shared_cluster
