"""A cluster that loses and moves things while it is used: nothing that was acknowledged is lost."""

import signal
import time

import pytest
import redis
from redis.crc import key_slot

from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError

from ...waiting import wait_until
from .contract import IDENTITY, check, record, records
from .demoting import Demotion
from .servers import Cluster, Server, text


def opened(cluster: Cluster, options: str = "") -> RedisTier:
    tier = RedisTier(RedisAddress.parse(cluster.url + options), IDENTITY, True)
    tier.retain([])
    return tier


@pytest.mark.parametrize("victims", [(0,), (1, 2)], ids=["one", "two"])
def test_primaries_killed_during_demotion(redis_cluster: Cluster, victims: tuple[int, ...]) -> None:
    tier = opened(redis_cluster)
    demotion = Demotion(tier)
    try:
        demotion.until(5)
        for victim in victims:
            redis_cluster.primaries()[victim % len(redis_cluster.primaries())].kill()
            # Reads go on: at first from the replica, before it is elected, and after that.
            some = dict(list(demotion.stored.copy().items())[::11])
            check(tier, list(some), list(some.values()))
            wait_until(lambda: len(redis_cluster.primaries()) == 3, what="the replica is elected")
            check(tier, list(some), list(some.values()))
            # A shard without replica takes nothing until it is told to: give it one back.
            for server in redis_cluster.servers:
                if server.process is None:
                    server.start()
            wait_until(redis_cluster.settled, what="the replica is there again")
            demotion.until(demotion.batches + 5)
    finally:
        demotion.end()
    assert len(demotion.stored) >= 1000
    check(tier, list(demotion.stored), list(demotion.stored.values()))
    reader = RedisTier(RedisAddress.parse(redis_cluster.url), IDENTITY, writer=False)
    check(reader, list(demotion.stored), list(demotion.stored.values()))
    reader.close()
    tier.close()


def test_a_replica_killed_during_demotion(redis_cluster: Cluster) -> None:
    """Until it is back nothing of its shard is acknowledged; what was before stays."""
    tier = opened(redis_cluster, "?timeout=1")
    batch = records(0, 400)
    locations = tier.write(batch)
    primaries = redis_cluster.primaries()
    replica = next(server for server in redis_cluster.servers if server not in primaries)
    replica.kill()

    def refused() -> bool:
        try:
            tier.write(records(1000, 2000))
        except TierDownError as error:
            return "replicas" in str(error)
        return False

    wait_until(refused, what="a batch is refused")
    check(tier, locations, batch)
    replica.start()
    wait_until(redis_cluster.settled)
    check(tier, tier.write(records(5000, 400)), records(5000, 400))
    check(tier, locations, batch)
    tier.close()


def test_a_primary_that_hangs(redis_cluster: Cluster) -> None:
    tier = opened(redis_cluster, "?timeout=12")
    batch = records(0, 500)
    locations = tier.write(batch)
    victim = redis_cluster.primaries()[1]
    victim.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        check(tier, locations, batch)
        assert time.monotonic() - start < 12
    finally:
        victim.signal(signal.SIGCONT)
    tier.close()


def test_a_cluster_that_hangs_is_given_up_in_time(redis_cluster: Cluster) -> None:
    tier = opened(redis_cluster, "?timeout=0.4")
    locations = tier.write(records(0, 40))
    for server in redis_cluster.servers:
        server.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(TierDownError):
            tier.read(locations)
        with pytest.raises(TierDownError):
            tier.write(records(40, 40))
        assert time.monotonic() - start < 8
    finally:
        for server in redis_cluster.servers:
            server.signal(signal.SIGCONT)
    wait_until(redis_cluster.settled)
    check(tier, locations, records(0, 40))
    tier.close()


def test_a_primary_that_takes_the_cluster_for_down(redis_cluster: Cluster) -> None:
    """Its replica has the pages as well. It once got so by a restart that left it waiting for a slot of a
    primary that died: no election mends that, and everybody who read got EIO in the end."""
    tier = opened(redis_cluster, "?timeout=2")
    reader = RedisTier(RedisAddress.parse(redis_cluster.url + "?timeout=2"), IDENTITY, writer=False)
    batch = records(0, 500)
    locations = tier.write(batch)
    key = values.key(values.prefix(IDENTITY), locations[0] >> values.PLACE_BITS)
    victim, other = source_and_target(redis_cluster, key_slot(key))
    ranges = other.ask("CLUSTER", "SLOTS")
    foreign = next(start for start, _end, (_, port, *_), *_ in ranges if port == other.port)  # type: ignore[attr-defined]
    name = text(other.ask("CLUSTER", "MYID"))
    with (
        redis.Redis(port=victim.port, protocol=2) as client,
        client.pipeline(transaction=False) as both,
    ):  # at once: it hears soon
        both.execute_command("CLUSTER", "DELSLOTS", foreign)
        both.execute_command("CLUSTER", "SETSLOT", foreign, "IMPORTING", name)
        both.execute()

    def refuses() -> bool:
        try:
            victim.ask("GET", key)
        except redis.exceptions.ClusterDownError:
            return True
        return False

    wait_until(refuses, what="it takes the cluster for down")
    check(tier, locations, batch)
    check(reader, locations, batch)
    redis_cluster.mend()
    assert tier.read(locations) == [None] * len(
        locations
    )  # and no connection is left that reads of a replica
    check(tier, tier.write(records(5000, 500)), records(5000, 500))
    reader.close()
    tier.close()


def test_slots_that_move(redis_cluster: Cluster) -> None:
    """MOVED and ASK, while it is read and written; a slot that is half moved has keys on both sides."""
    tier = opened(redis_cluster)
    batch = [record(n, 3000) for n in range(200)]
    locations = tier.write(batch)
    prefix = values.prefix(IDENTITY)
    number = locations[0] >> values.PLACE_BITS
    slot = key_slot(values.key(prefix, number))
    source, target = source_and_target(redis_cluster, slot)
    names = {server: text(server.ask("CLUSTER", "MYID")) for server in (source, target)}
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
    source.ask("MIGRATE", "127.0.0.1", target.port, values.key(prefix, number), 0, 2000)
    check(tier, locations, batch)
    tier.retain(sorted(locations[: len(locations) // 2]))
    moved = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100)
    assert isinstance(moved, list)
    assert moved, "the slot is still in two places"
    check(tier, locations[:100], batch[:100])
    # Numbers of the same slot are given out now: they are written where ASK says.
    later = tier.write([record(n, 3000) for n in range(1000, 1200)])
    for name in moved:
        source.ask("MIGRATE", "127.0.0.1", target.port, name, 0, 2000)
    for server in (target, source, *(s for s in redis_cluster.primaries() if s not in (source, target))):
        server.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target])
    check(tier, locations[:100], batch[:100])
    check(tier, later, [record(n, 3000) for n in range(1000, 1200)])
    check(tier, tier.write(records(0, 100)), records(0, 100))
    tier.close()


def source_and_target(cluster: Cluster, slot: int) -> tuple[Server, Server]:
    """Return the primary that has `slot`, and another."""
    source = cluster.owner(slot)
    return source, next(one for one in cluster.primaries() if one is not source)
