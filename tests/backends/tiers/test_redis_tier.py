"""What a Redis tier does beyond the contract: fitness, room, dead writers, sparse values, numbers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.contract import TierIdentity
from tmem.backends.tiers.redis_exchange import Command
from tmem.backends.tiers.redis_nodes import Nodes
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.backends.tiers.redis_wire import Taken
from tmem.errors import TierDownError, TierFullError

from ...waiting import wait_until
from .contract import IDENTITY, TierContract, check, record, records
from .servers import Cluster, Server, single


def url_of(server: Server, options: str = "?replicas=0") -> str:
    return f"redis://{server.address}/0{options}"


def opened(url: str, identity: TierIdentity = IDENTITY, clock: "Clock | None" = None) -> RedisTier:
    address = RedisAddress.parse(url)
    return RedisTier(address, identity, True, clock) if clock else RedisTier(address, identity, True)


def keys(server: Server) -> set[bytes]:
    found = server.ask("KEYS", "*")
    assert isinstance(found, list)
    return set(found)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server(redis_server: Server) -> Server:
    redis_server.ask("FLUSHALL")
    redis_server.ask("CONFIG", "SET", "maxmemory", 0, "maxmemory-policy", "noeviction")
    return redis_server


def test_what_is_on_a_full_server_is_removed(server: Server) -> None:
    """Full of what others store: it has no room for the word that the key which counts is soon not needed."""
    tier = opened(url_of(server))
    tier.retain([])
    tier.write(records(0, 5))
    server.ask("CONFIG", "SET", "maxmemory", 1)
    tier.destroy()
    assert keys(server) == {values.counter_key(values.prefix(IDENTITY))}
    server.ask("CONFIG", "SET", "maxmemory", 0)
    again = opened(url_of(server))
    again.retain([])
    again.write(records(0, 5))
    again.destroy()
    assert int(str(server.ask("TTL", values.counter_key(values.prefix(IDENTITY))))) > 0


def test_a_server_that_evicts_is_refused(server: Server) -> None:
    clock = Clock()
    tier = opened(url_of(server), clock=clock)
    tier.check()
    tier.retain([])
    locations = tier.write(records(0, 5))
    server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(TierDownError, match="config set maxmemory-policy noeviction"):
        tier.check()
    with pytest.raises(TierDownError, match="config set maxmemory-policy noeviction"):
        tier.write(records(5, 5))
    check(tier, locations, records(0, 5))
    server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    locations += tier.write(records(5, 5))
    server.ask("CONFIG", "SET", "maxmemory-policy", "volatile-ttl")
    clock.now += 29
    locations += tier.write(records(10, 5))
    clock.now += 2  # it is looked at again
    with pytest.raises(TierDownError, match="volatile-ttl"):
        tier.write(records(15, 5))
    check(tier, locations, records(0, 15))
    tier.close()


def test_one_without_replicas_must_be_asked_for(server: Server) -> None:
    tier = opened(url_of(server, ""))
    with pytest.raises(TierDownError, match=r"has 0 of the 1 replicas.*\?replicas=0"):
        tier.check()
    tier.close()


def test_a_replica_must_have_it(tmp_path: Path) -> None:
    with single(tmp_path / "primary") as primary:
        follow = ("--replicaof", f"127.0.0.1 {primary.port}")
        with single(tmp_path / "replica", *follow) as replica:
            wait_until(lambda: "'online'" in str(primary.info("replication").get("slave0")))
            tier = opened(url_of(primary, ""))  # by default one replica must
            tier.check()
            tier.retain([])
            locations = tier.write(records(0, 40))
            reader = RedisTier(RedisAddress.parse(url_of(replica)), IDENTITY, writer=False)
            check(reader, locations, records(0, 40))
            reader.close()
        hasty = opened(url_of(primary, "?timeout=0.4"))
        hasty.retain(locations)
        with pytest.raises(TierDownError, match="0 of the 1 replicas"):
            hasty.write(records(40, 5))
        check(tier, locations, records(0, 40))
        hasty.close()
        tier.close()


class RoomyWorld:
    """A server whose memory ends after about `capacity_records`."""

    capacity_records = 1024

    def __init__(self, server: Server) -> None:
        used = int(str(server.info("memory")["used_memory"]))
        server.ask("CONFIG", "SET", "maxmemory", used + self.capacity_records * 4112 * 3 // 2)
        self._address = RedisAddress.parse(url_of(server))

    def open(self, identity: TierIdentity, writer: bool) -> RedisTier:
        return RedisTier(self._address, identity, writer)


class TestFullServer(TierContract):
    @pytest.fixture
    def world(self, server: Server) -> RoomyWorld:
        return RoomyWorld(server)


def test_what_a_full_server_refused_is_gone(server: Server) -> None:
    world = RoomyWorld(server)
    tier = world.open(IDENTITY, True)
    tier.retain([])
    locations = tier.write(records(0, 100))
    before = keys(server)
    with pytest.raises(TierFullError, match="maxmemory"):
        tier.write([record(n, 4112) for n in range(3000)])
    assert keys(server) == before
    assert tier.statistics().capacity_bytes == server.info("memory")["maxmemory"]
    check(tier, locations, records(0, 100))
    tier.retain([])  # nothing waits to be removed where there is no room
    assert not stored_values(server)
    tier.close()


def test_the_first_retain_removes_what_the_dead_left(server: Server) -> None:
    writer = opened(url_of(server))
    writer.retain([])
    locations = writer.write(records(0, 200))
    lost = keys(server)
    writer.write(records(200, 200))  # nobody hears of these: the writer dies
    server.ask("SET", "somebody else's", "value")
    again = opened(url_of(server))
    again.retain(locations)
    assert keys(server) == lost | {b"somebody else's"}
    check(again, locations, records(0, 200))
    assert again.statistics().used_bytes == pytest.approx(writer.statistics().used_bytes / 2, rel=0.2)
    again.destroy()
    counter = values.counter_key(values.prefix(IDENTITY))
    assert keys(server) == {b"somebody else's", counter}
    assert 80_000 < int(str(server.ask("TTL", counter))) <= 86_400
    writer.close()


@pytest.mark.parametrize("removed", [False, True])
def test_what_a_dead_writer_still_sends_harms_nothing(server: Server, removed: bool) -> None:
    """Everything that it can have in flight: storing, shortening, removing. Also if the client was given the
    tier anew meanwhile."""
    dead = opened(url_of(server))
    dead.retain([])
    batch = records(0, 400)
    locations = dead.write(batch)
    kept = dict(list(zip(locations, batch, strict=True))[::7])
    late: list[Command] = []

    class Late(Nodes):
        def run(
            self,
            commands: Sequence[Command],
            *,
            replicated: bool = False,
            anywhere: bool = False,
            taken: Taken | None = None,
        ) -> list[object]:
            late.extend(commands)
            return super().run(commands, replicated=replicated, anywhere=anywhere, taken=taken)

    dead._nodes = Late(RedisAddress.parse(url_of(server)))
    dead.retain(list(kept))
    dead.write(records(400, 50))
    verbs = [command.words[0] for command in late]
    assert {"SET", "GET"} <= set(verbs)
    if removed:
        opened(url_of(server)).destroy()
        kept = {}
    again = opened(url_of(server))
    again.retain(list(kept))
    few = dict(list(kept.items())[::2])
    again.retain(list(few))
    later = again.write(records(900, 300))
    Nodes(RedisAddress.parse(url_of(server))).run(late)
    check(again, list(few), list(few.values()))
    check(again, later, records(900, 300))
    again.close()


def test_sparse_values_are_shortened(server: Server) -> None:
    tier = opened(url_of(server))
    tier.retain([])
    batch = [record(n, 1850) for n in range(3000)]
    locations = tier.write(batch)
    full = int(str(server.info("memory")["used_memory"]))
    kept = dict(list(zip(locations, batch, strict=True))[::5])
    tier.retain(list(kept))
    statistics = tier.statistics()
    assert statistics.shortened == statistics.values
    assert statistics.records == 600
    assert int(str(server.info("memory")["used_memory"])) < full - 3000 * 1850 * 0.7
    assert statistics.used_bytes < 600 * 1850 * 1.2
    check(tier, list(kept), list(kept.values()))
    fewer = dict(list(kept.items())[::9])
    tier.retain(list(fewer))
    check(tier, list(fewer), list(fewer.values()))
    again = opened(url_of(server))
    again.retain(list(fewer))
    assert again.statistics().records == len(fewer)
    check(again, list(fewer), list(fewer.values()))
    tier.retain([])
    tier.check()
    assert not stored_values(server)
    tier.close()
    again.close()


SMALL = [record(n, 17) for n in range(4096)]
"""As many as a batch may have; 64 values."""


def stored_values(server: Server) -> set[int]:
    numbers = (values.number_of(values.prefix(IDENTITY), key) for key in keys(server))
    return {number for number in numbers if number}


def test_dead_values_go_as_others_come(server: Server) -> None:
    """At a time or one by one; what stays dead for long, or with no room for others, goes by itself."""
    tier = opened(url_of(server))
    tier.retain([])
    tier.check()
    old = [record(n, 1850) for n in range(1700)]
    tier.write(old)
    dead = stored_values(server)
    assert len(dead) == 100
    tier.retain([])
    assert stored_values(server) == dead
    assert tier.statistics().records == 0
    assert tier.statistics().used_bytes > sum(map(len, old))
    some = tier.write(old[:340])
    left = stored_values(server) & dead
    assert len(left) == 80
    assert len(stored_values(server)) == 100
    tier.check()  # others were stored since the last look
    assert stored_values(server) >= left
    tier.check()
    assert not stored_values(server) & dead
    check(tier, some, old[:340])
    tier.retain(some)
    more = tier.write(old)
    tier.retain([])
    fewer = tier.write(old[:34])
    assert len(stored_values(server)) == 120
    given_up = tier.begin(old[:34])
    given_up.drop()
    tier.retain(fewer)
    assert not set(more) & set(fewer)
    tier.check()
    tier.check()
    assert stored_values(server) == {location >> values.PLACE_BITS for location in fewer}
    check(tier, fewer, old[:34])
    tier.close()


def test_dead_values_go_if_there_is_no_room_for_a_number(server: Server) -> None:
    """Servers refuse to count, too, where they are full."""
    tier = opened(url_of(server))
    tier.retain([])
    for _ in range(1024 // 64):
        tier.write(SMALL)
    tier.retain([])
    assert len(stored_values(server)) == 1024
    server.ask("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(TierFullError):
        tier.write(SMALL)
    assert len(stored_values(server)) == 1024
    tier.retain([])
    assert not stored_values(server)
    tier.close()


def test_dead_values_of_which_some_were_removed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers may be given again, so they are removed no more."""
    tier = opened(url_of(server))
    tier.retain([])
    for _ in range(3072 // 64):
        tier.write(SMALL)
    tier.retain([])
    run, calls = tier._nodes.run, 0

    def one_fails(commands: Sequence[Command], **keywords: Any) -> list[Any]:
        nonlocal calls
        calls += any(command.words[0] == "UNLINK" for command in commands)
        if calls > 1:
            raise TierDownError("gone this moment")
        return run(commands, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(tier._nodes, "run", one_fails)
        with pytest.raises(TierDownError):
            tier.check()
    left = stored_values(server)
    assert 0 < len(left) < 3072
    server.ask("SET", values.counter_key(values.prefix(IDENTITY)), min(left) - 65)  # all were given
    locations = tier.write(SMALL)
    assert {location >> values.PLACE_BITS for location in locations} == set(range(min(left) - 64, min(left)))
    for _ in range(3072 // 64):
        tier.write(SMALL)
    check(tier, locations, SMALL)
    tier.retain(locations)
    tier.check()
    tier.check()
    assert len(stored_values(server)) == 64
    tier.close()


def test_numbers_begin_anew(server: Server) -> None:
    tier = opened(url_of(server))
    tier.retain([])
    early = tier.write(records(0, 30))
    assert min(early) < 10 * values.MAX_RECORDS
    tier.close()
    nodes = Nodes(RedisAddress.parse(url_of(server)))
    counter = values.counter_key(values.prefix(IDENTITY))
    nodes.run([Command(counter, ("SET", counter, values.MAX_NUMBER - 2))])
    again = opened(url_of(server))
    again.retain(early)
    late = again.write([record(n, 4000) for n in range(100)])
    assert max(late) >> values.PLACE_BITS == values.MAX_NUMBER
    assert min(late) < min(early) + 30 * values.MAX_RECORDS
    assert not set(late) & set(early)
    check(again, early, records(0, 30))
    check(again, late, [record(n, 4000) for n in range(100)])
    again.close()
    nodes.close()


def test_a_server_that_came_back_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is lost is missing, never something else, and told once; and it goes on."""
    with single(tmp_path) as server:
        tier = opened(url_of(server))
        tier.retain([])
        locations = tier.write(records(0, 50))
        tier.check()
        assert not caplog.messages
        server.kill()
        server.start()
        wait_until(server.answers)
        for _ in range(2):
            tier.check()
            (told,) = caplog.messages
            assert f"{server.address} has lost pages" in told
        assert tier.read(locations) == [None] * 50
        assert tier.statistics().missing == 50
        again = opened(url_of(server))
        again.retain(locations)
        later = again.write(records(50, 50))
        assert not set(later) & set(locations)
        check(again, later, records(50, 50))
        tier.close()
        again.close()


def test_a_loss_is_told_although_dead_values_wait(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    tier = opened(url_of(server))
    tier.retain([])
    for _ in range(8):
        tier.write(SMALL)
    tier.retain(tier.write(records(0, 50)))
    assert len(stored_values(server)) > 512
    server.ask("FLUSHALL")
    tier.check()
    (told,) = caplog.messages
    assert f"{server.address} has lost pages" in told
    tier.close()


def test_what_waits_to_be_sent_is_not_what_comes_after(server: Server) -> None:
    """Batches lie where others did that are over, and are longer than what the kernel takes of them."""
    tier = opened(url_of(server))
    tier.retain([])
    batches = [
        [record(n, 4000 + n % 100) for n in range(first * 1400, first * 1400 + 1400)] for first in range(5)
    ]
    over, last = tier.begin(batches[0]), tier.begin(batches[1])
    check(tier, over.end(), batches[0])
    with server.stopped():
        given_up = tier.begin(batches[2])
        given_up.drop()
        waiting = tier.begin(batches[3])
    check(tier, last.end(), batches[1])
    with server.stopped():
        later = tier.begin(batches[4])
    check(tier, waiting.end(), batches[3])
    check(tier, later.end(), batches[4])
    tier.close()


def test_a_forked_child_has_connections_of_its_own(server: Server) -> None:
    tier = opened(url_of(server))
    tier.retain([])
    batch = records(0, 60)
    locations = tier.write(batch)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check(tier, locations, batch)
            tier.close()
            status = 0
        finally:
            os._exit(status)
    for _ in range(20):
        check(tier, locations, batch)
    assert os.waitpid(pid, 0)[1] == 0
    check(tier, locations, batch)
    tier.close()


def test_a_node_of_a_cluster_is_no_single_server(redis_cluster: Cluster) -> None:
    tier = opened(f"redis://{redis_cluster.servers[0].address}/0?replicas=1&timeout=2")
    tier.retain([])
    with pytest.raises(TierDownError, match=r"use redis\+cluster://"):
        tier.read([n << 16 for n in range(1, 40)])
    tier.close()


def test_nobody_is_there() -> None:
    for url in ("redis://127.0.0.1:1/0?timeout=0.2", "redis+cluster://127.0.0.1:1,127.0.0.1:2?timeout=0.2"):
        tier = opened(url)
        calls = (lambda tier=tier: tier.read([64]), lambda tier=tier: tier.retain([]), tier.check)
        for call in calls:
            with pytest.raises(TierDownError, match=r"127\.0\.0\.1.*(refused|answer)"):
                call()
        assert tier.statistics().failures == len(calls)
        tier.close()
