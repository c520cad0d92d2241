"""What changes around a tier without anything of it having failed: roles, slots, room, connections."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError, TierFullError

from ...waiting import wait_until
from .contract import IDENTITY, check, record, records
from .servers import Cluster, Move, Server, single


def opened(url: str) -> RedisTier:
    tier = RedisTier(RedisAddress.parse(url), IDENTITY, True)
    tier.retain([])
    return tier


def test_a_primary_that_has_become_a_replica(redis_cluster: Cluster) -> None:
    """As when servers are upgraded one by one. It answers, so nothing fails; it once was taken for a primary
    without replicas from then on, and no page went to the cluster any more."""
    tier = opened(redis_cluster.url)
    locations = tier.write(records(0, 400))
    (replica,) = redis_cluster.replicas(redis_cluster.primaries()[0])
    replica.ask("CLUSTER", "FAILOVER")
    wait_until(lambda: replica in redis_cluster.primaries(), what="it is promoted")
    wait_until(redis_cluster.settled)
    tier.check()
    locations += tier.write(records(400, 400))
    check(tier, locations, records(0, 800))
    tier.close()


def test_a_single_server_that_is_a_replica(tmp_path: Path) -> None:
    with single(tmp_path / "primary") as primary:
        follow = ("--replicaof", f"127.0.0.1 {primary.port}")
        with single(tmp_path / "replica", *follow) as replica:
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
            tier = opened(f"redis://{replica.address}/0?replicas=0&timeout=0.5")
            with pytest.raises(TierDownError, match=rf"is a replica of {primary.address}: name the primary"):
                tier.check()
            with pytest.raises(TierDownError, match="is a replica"):
                tier.write(records(0, 10))
            # Between two looks it is the server that says so.
            with pytest.raises(TierDownError, match="name the primary"):
                tier._take(1)
            replica.ask("REPLICAOF", "NO", "ONE")
            check(tier, tier.write(records(0, 10)), records(0, 10))
            tier.close()


def test_slots_that_move_to_a_new_primary(redis_cluster: Cluster, tmp_path: Path) -> None:
    """The cluster lists no node without slots; what is there already is found by ASK."""
    tier = opened(f"{redis_cluster.url}?timeout=5")
    batch = [record(n, 3000) for n in range(200)]
    locations = tier.write(batch)
    slot = key_slot(values.key(values.prefix(IDENTITY), locations[0] >> values.PLACE_BITS))
    with redis_cluster.joined(tmp_path) as new:
        moving = Move(redis_cluster, slot, new)
        moving.some(3)
        assert moving.keys(), "the slot is in two places"
        check(tier, locations, batch)
        reader = RedisTier(RedisAddress.parse(f"{redis_cluster.url}?timeout=5"), IDENTITY, writer=False)
        check(reader, locations, batch)
        reader.close()
        redis_cluster.moved(slot, new)
        check(tier, locations, batch)
        redis_cluster.moved(slot, moving.source)
    check(tier, locations, batch)
    tier.close()


def test_memory_that_others_have_filled(redis_server: Server) -> None:
    """Nothing is written, not even a value without its dead records, for which no room is needed; what is
    there is read, and what has died goes."""
    redis_server.ask("FLUSHALL")
    redis_server.ask("CONFIG", "SET", "maxmemory", 0)
    tier = opened(f"redis://{redis_server.address}/0?replicas=0")
    batch = [record(n, 1850) for n in range(600)]
    locations = tier.write(batch)
    kept = dict(list(zip(locations, batch, strict=True))[::5])
    redis_server.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    try:
        with pytest.raises(TierFullError, match="maxmemory"):
            tier.write(records(1000, 10))
        tier.retain(list(kept))
        assert tier.statistics().shortened == 0
        check(tier, list(kept), list(kept.values()))
        tier.check()  # full is not down
    finally:
        redis_server.ask("CONFIG", "SET", "maxmemory", 0)
    tier.retain(list(kept))
    assert tier.statistics().shortened > 0
    check(tier, list(kept), list(kept.values()))
    check(tier, tier.write(records(2000, 10)), records(2000, 10))
    tier.close()


class Proxy:
    """Hands on to a server, and closes what was idle, or forgets it: then the next packet is answered by a
    reset."""

    def __init__(self, server: Server) -> None:
        self._port = server.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._pairs.append((near, far))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                target.sendall(chunk)

    def close_idle(self) -> None:
        """End all connections, in order."""
        for near, far in self._pairs:
            for one in (near, far):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self._pairs = []

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.close_idle()


@pytest.fixture
def proxy(redis_server: Server) -> Iterator[Proxy]:
    redis_server.ask("FLUSHALL")
    made = Proxy(redis_server)
    yield made
    made.end()


def test_a_proxy_that_closes_idle_connections(proxy: Proxy) -> None:
    tier = opened(f"redis://127.0.0.1:{proxy.port}/0?replicas=0&timeout=5")
    locations = tier.write(records(0, 100))
    for _ in range(3):
        proxy.close_idle()
        check(tier, locations, records(0, 100))
        proxy.close_idle()
        tier.check()
        proxy.close_idle()
        locations = tier.write(records(0, 100))
        proxy.close_idle()
        tier.retain(locations)
    assert tier.statistics().failures == 0
    tier.close()
