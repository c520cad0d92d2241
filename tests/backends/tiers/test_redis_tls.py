"""Clusters over TLS: redirections and failover, and what is said of each thing that may be wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.crc import key_slot

from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError

from ...waiting import wait_until
from .contract import IDENTITY, check, record, records
from .demoting import Demotion
from .servers import Cluster, Move, Server, Tls, single


def secure(cluster: Cluster, certificates: Path, options: str = "") -> str:
    own = f"tls_cert={certificates}/cert.pem&tls_key={certificates}/cert.key"
    return f"{cluster.url}?tls_ca={certificates}/ca.pem&{own}{options}"


def opened(url: str) -> RedisTier:
    tier = RedisTier(RedisAddress.parse(url), IDENTITY, True)
    tier.retain([])
    return tier


def test_slots_that_move(tls_cluster: Cluster, certificates: Path) -> None:
    """ASK while a slot is in two places, MOVED afterwards: to ports that speak TLS."""
    tier = opened(secure(tls_cluster, certificates))
    batch = [record(n, 3000) for n in range(200)]
    locations = tier.write(batch)
    slot = key_slot(values.key(values.prefix(IDENTITY), locations[0] >> values.PLACE_BITS))
    target = next(one for one in tls_cluster.primaries() if one is not tls_cluster.owner(slot))
    moving = Move(tls_cluster, slot, target)
    moving.some(4)
    assert moving.keys(), "the slot is in two places"
    check(tier, locations, batch)
    later = tier.write([record(n, 3000) for n in range(1000, 1200)])
    while moving.keys():
        moving.some(10)
    moving.end()
    check(tier, locations, batch)
    check(tier, later, [record(n, 3000) for n in range(1000, 1200)])
    tier.close()


def test_a_failover_during_demotion(tls_cluster: Cluster, certificates: Path) -> None:
    tier = opened(secure(tls_cluster, certificates))
    demotion = Demotion(tier)
    try:
        demotion.until(3)
        (replica,) = tls_cluster.replicas(tls_cluster.primaries()[0])
        replica.ask("CLUSTER", "FAILOVER")
        wait_until(lambda: replica in tls_cluster.primaries(), what="the replica is promoted")
        demotion.until(demotion.batches + 3)
    finally:
        demotion.end()
    check(tier, list(demotion.stored), list(demotion.stored.values()))
    tier.close()


@pytest.mark.skipif(os.environ.get("TMEM_LONG") != "1", reason="needs TMEM_LONG=1")
def test_a_primary_killed_during_demotion(tmp_path: Path, certificates: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1, tls=Tls(certificates))
    tier = opened(secure(cluster, certificates))
    demotion = Demotion(tier)
    try:
        demotion.until(5)
        cluster.primaries()[0].kill()
        some = dict(list(demotion.stored.copy().items())[::11])
        check(tier, list(some), list(some.values()))
        wait_until(lambda: len(cluster.primaries()) == 3, what="the replica is elected")
        cluster.revive()
        demotion.until(demotion.batches + 5)
        demotion.end()
        check(tier, list(demotion.stored), list(demotion.stored.values()))
    finally:
        demotion.end()
        cluster.end()
    tier.close()


def said(url: str) -> list[str]:
    """Return what a tier at `url` says to a check, before a write, and to a read."""
    tier = RedisTier(RedisAddress.parse(url), IDENTITY, True)
    calls: list[Callable[[], object]] = [tier.check, lambda: tier.retain([]), lambda: tier.read([64])]
    words: list[str] = []
    for call in calls:
        with pytest.raises(TierDownError) as refusal:
            call()
        words.append(str(refusal.value))
    tier.close()
    return words


WRONG = [
    ("tls_ca={}/other.pem&tls_cert={}/cert.pem&tls_key={}/cert.key", "tls_ca="),
    ("tls_cert={}/cert.pem&tls_key={}/cert.key", "tls_ca="),
    ("tls_ca={}/none.pem", "file that the URL names"),
    ("tls_ca={}/ca.pem", "tls_cert="),
    ("tls_ca={}/ca.pem&tls_cert={}/cert.pem&tls_key={}/stranger.key", "tls_key="),
]


def test_what_is_wrong_is_said(tls_cluster: Cluster, certificates: Path) -> None:
    tier = opened(secure(tls_cluster, certificates))
    locations = tier.write(records(0, 100))
    for options, advice in WRONG:
        words = said(f"{tls_cluster.url}?timeout=0.4&{options.replace('{}', str(certificates))}")
        assert all(advice in one or "reset by peer" in one for one in words), words
    check(tier, locations, records(0, 100))
    tier.close()


@pytest.mark.parametrize(("name", "advice"), [("stranger", "tls_hostname=no"), ("expired", "renew")])
def test_a_server_with_a_wrong_certificate(
    tmp_path: Path, certificates: Path, name: str, advice: str
) -> None:
    with single(tmp_path, "--tls-auth-clients", "no", tls=Tls(certificates, name)) as server:
        words = said(f"rediss://{server.address}/0?replicas=0&timeout=1&tls_ca={certificates}/ca.pem")
        assert all(advice in one for one in words), words


def test_plain_and_tls_confused(
    tls_cluster: Cluster, redis_cluster: Cluster, redis_server: Server, certificates: Path
) -> None:
    ca = f"tls_ca={certificates}/ca.pem"
    plain, secret = redis_cluster.servers[0].address, tls_cluster.servers[0].address
    for url, advice in (
        (f"rediss+cluster://{plain}?timeout=1&{ca}", "use redis, not rediss"),
        (f"rediss://{redis_server.address}/0?timeout=1&{ca}", "use redis, not rediss"),
        (f"redis+cluster://{secret}?timeout=1", "use rediss, not redis"),
        (f"redis://{secret}/0?timeout=1", "use rediss, not redis"),
    ):
        words = said(url)
        assert all(advice in one for one in words), words
