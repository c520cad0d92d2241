"""Servers that cannot be trusted with pages now: these stay in memory, people are told, and it goes on."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends import _native, tiering
from tmem.backends.tierlooks import LOOK_S

from ..waiting import wait_until
from .demoting import MIB, Bench
from .tiers.servers import Cluster


@contextlib.contextmanager
def replicas_that_lag(cluster: Cluster) -> Iterator[str]:
    primaries = cluster.primaries()
    with contextlib.ExitStack() as stack:
        for server in cluster.servers:
            if server not in primaries:
                stack.enter_context(server.stopped())
        yield "replicas demanded have it"


@contextlib.contextmanager
def rights_that_are_missing(cluster: Cluster) -> Iterator[str]:
    for server in cluster.servers:
        server.ask("ACL", "SETUSER", "default", "-wait")
    try:
        yield "docs/redis.md"
    finally:
        for server in cluster.servers:
            server.ask("ACL", "SETUSER", "default", "+wait")


@contextlib.contextmanager
def servers_that_are_full(cluster: Cluster) -> Iterator[str]:
    for server in cluster.servers:
        server.ask("CONFIG", "SET", "maxmemory", MIB)
    try:
        yield "raise its maxmemory"
    finally:
        for server in cluster.servers:
            server.ask("CONFIG", "SET", "maxmemory", 0)


@pytest.mark.parametrize("broken", [replicas_that_lag, rights_that_are_missing, servers_that_are_full])
def test_pages_wait(
    small: _native.Segment,
    tmp_path: Path,
    redis_cluster: Cluster,
    broken: Callable[[Cluster], contextlib.AbstractContextManager[str]],
) -> None:
    bench = Bench(small, tmp_path, MIB)
    tiering.withdraw(bench.paths, small, bench.client)
    # Named by its primaries: the others may be the ones that do not answer.
    addresses = ",".join(server.address for server in redis_cluster.primaries())
    tiering.assign(bench.paths, small, bench.client, f"redis+cluster://{addresses}?timeout=0.5", 0)
    try:
        stored = bench.put(0, 10**6)
        with broken(redis_cluster) as words:

            def is_told() -> bool:
                bench.rounds(1)
                return words in bench.demotion.problems().get("guest", "")

            wait_until(is_told, what="it is told")
            bench.clock.now_s += LOOK_S
            bench.rounds(1)
            assert bench.client.statistics()["tier_pages"] == 0
            bench.check()

        def goes_on() -> bool:
            bench.rounds(1)
            return not bench.demotion.problems() and bench.client.statistics()["tier_pages"] > stored // 16

        wait_until(goes_on, what="pages go there")
        bench.check()
    finally:
        bench.demotion.close()
