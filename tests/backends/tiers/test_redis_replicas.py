"""Several replicas a primary: what is asked for, what is acknowledged, and what survives whose loss."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError

from ...waiting import wait_until
from .contract import IDENTITY, check, records
from .demoting import Demotion
from .servers import Cluster, Server

LONG = os.environ.get("TMEM_LONG") == "1"


def opened(cluster: Cluster, options: str = "") -> RedisTier:
    tier = RedisTier(RedisAddress.parse(cluster.url + options), IDENTITY, True)
    tier.retain([])
    return tier


def most_replicas(cluster: Cluster) -> Server:
    """Return the primary that has most: the cluster gives away replicas to those that have none."""
    return max(cluster.primaries(), key=lambda one: len(cluster.replicas(one)))


@contextlib.contextmanager
def stopped(servers: list[Server]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.stopped())
        yield


def acknowledged_by(cluster: Cluster, silent: int, options: str) -> bool:
    """Say whether a batch is acknowledged while so many replicas of each primary answer nothing."""
    tier = opened(cluster, f"?timeout=0.6{options}")
    tier.write(records(0, 5))  # connected, and numbers are reserved
    servers = [one for primary in cluster.primaries() for one in cluster.replicas(primary)[:silent]]
    try:
        with stopped(servers):
            return len(tier.write(records(100, 200))) == 200
    except TierDownError as error:
        asked = options.removeprefix("&replicas=") or "2"
        if f"of the {asked} replicas" not in str(error):
            raise
        return False
    finally:
        tier.close()


@pytest.mark.parametrize(
    ("silent", "options", "acknowledged"),
    [
        (0, "", True),
        (1, "", False),
        (1, "&replicas=2", False),
        (1, "&replicas=1", True),
        (2, "&replicas=1", False),
        (2, "&replicas=0", True),
    ],
)
def test_how_many_replicas_must_have_it(
    wide_cluster: Cluster, silent: int, options: str, acknowledged: bool
) -> None:
    """All that the cluster lists, or as many as the URL says."""
    assert acknowledged_by(wide_cluster, silent, options) is acknowledged


def test_more_than_there_are(wide_cluster: Cluster) -> None:
    tier = RedisTier(RedisAddress.parse(f"{wide_cluster.url}?replicas=3&timeout=0.5"), IDENTITY, True)
    with pytest.raises(TierDownError, match=r"2 of the 3 replicas .* or say \?replicas=2"):
        tier.check()
    tier.close()


def test_a_primary_and_a_replica_killed_at_once(wide_cluster: Cluster) -> None:
    """The other replica has everything, whichever is left; the shard takes pages again once the cluster has
    given it another's replica, which it does by itself."""
    tier = opened(wide_cluster)
    demotion = Demotion(tier)
    try:
        for turn in range(4 if LONG else 1):
            demotion.until(demotion.batches + 5)
            primary = most_replicas(wide_cluster)
            victims = [primary, wide_cluster.replicas(primary)[turn % 2]]
            before = dict(demotion.stored.copy())
            for victim in victims:
                victim.kill()
            some = dict(list(before.items())[::7])
            check(tier, list(some), list(some.values()))
            if turn % 2:  # another's replica comes, after some seconds
                demotion.until(demotion.batches + 5)
            wait_until(lambda: len(wide_cluster.primaries()) == 3, what="the other replica is elected")
            wide_cluster.revive()
            check(tier, list(before), list(before.values()))
    finally:
        demotion.end()
    check(tier, list(demotion.stored), list(demotion.stored.values()))
    tier.close()


@pytest.mark.parametrize("how", ["", "FORCE", "TAKEOVER"] if LONG else ["FORCE"])
def test_replicas_promoted_during_demotion(wide_cluster: Cluster, how: str) -> None:
    """Whether the primary agrees, is not asked, or nobody is."""
    tier = opened(wide_cluster)
    demotion = Demotion(tier)
    try:
        for turn in range(6 if LONG else 2):
            demotion.until(demotion.batches + 2)
            primary = most_replicas(wide_cluster)
            chosen = wide_cluster.replicas(primary)[turn % 2]
            chosen.ask("CLUSTER", "FAILOVER", *([how] if how else []))
            wait_until(lambda one=chosen: one in wide_cluster.primaries(), what="it is promoted")  # type: ignore[misc]
            wait_until(wide_cluster.settled)
    finally:
        demotion.end()
    assert len(demotion.stored) >= 400
    check(tier, list(demotion.stored), list(demotion.stored.values()))
    tier.close()


def test_a_replica_that_the_cluster_did_not_list_when_it_was_asked(wide_cluster: Cluster) -> None:
    """It may be elected like the others. Nothing failed since it came, so nobody has asked the cluster anew:
    once batches were acknowledged that it had not, and were lost when it was promoted."""
    late = wide_cluster.replicas(most_replicas(wide_cluster))[0]
    late.kill()
    primaries = wide_cluster.primaries()
    # Each primary decides for itself when it believes what it hears; any of them may be asked.
    wait_until(lambda: all(listed(one) == 5 for one in primaries), what="the cluster has given it up")
    tier = opened(wide_cluster, "?timeout=1")
    locations = tier.write(records(0, 400))
    late.start()
    wait_until(wide_cluster.settled)
    with late.stopped(), pytest.raises(TierDownError, match=r"only \d of the \d replicas"):
        tier.write(records(1000, 2000))
    check(tier, locations, records(0, 400))
    check(tier, tier.write(records(1000, 2000)), records(1000, 2000))
    tier.close()


def listed(server: Server) -> int:
    """Return how many replicas a server lists."""
    nodes = server.ask("CLUSTER", "SLOTS")
    assert isinstance(nodes, list)
    return sum(len(one) - 3 for one in nodes)


def test_a_replica_that_is_gone_is_missed_until_the_cluster_says_so(wide_cluster: Cluster) -> None:
    tier = opened(wide_cluster, "?timeout=0.5")
    locations = tier.write(records(0, 400))
    gone = wide_cluster.replicas(wide_cluster.primaries()[0])[0]
    gone.kill()
    with pytest.raises(TierDownError, match=r"only \d of the \d replicas"):
        tier.write(records(1000, 2000))
    check(tier, locations, records(0, 400))

    def is_taken() -> bool:
        with contextlib.suppress(TierDownError):
            return bool(tier.write(records(5000, 400)))
        return False

    wait_until(is_taken, what="the cluster has given it up")
    check(tier, locations, records(0, 400))
    tier.close()
