"""Users with no more rights than docs/redis.md lists, and with fewer; passwords that change."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError, TierError

from ...waiting import wait_until
from .contract import IDENTITY, check, record, records
from .servers import Cluster, Move

DOCUMENT = Path(__file__).parents[3] / "docs/redis.md"
USER = "tmem"


def rules_of(user: str) -> list[str]:
    """Return the rules that the documentation gives a user."""
    found = re.search(rf"ACL SETUSER {user} reset on >PASSWORD (.*)", DOCUMENT.read_text())
    assert found, user
    return found[1].split()


def give(cluster: Cluster, *rules: str) -> None:
    for server in cluster.servers:
        server.ask("ACL", "SETUSER", USER, *rules)


@pytest.fixture
def cluster(redis_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that knows the user, with the rights of the documentation."""
    give(redis_cluster, "reset", "on", ">sesame", *rules_of(USER))
    yield redis_cluster
    redis_cluster.revive()
    for server in redis_cluster.servers:
        server.ask("ACL", "DELUSER", USER)


def opened(cluster: Cluster, password: str = "sesame", timeout_s: float = 2) -> RedisTier:
    scheme, _, place = cluster.url.partition("://")
    url = f"{scheme}://{USER}:{password}@{place}?timeout={timeout_s}"
    return RedisTier(RedisAddress.parse(url), IDENTITY, True)


@contextlib.contextmanager
def no_elections(cluster: Cluster) -> Iterator[None]:
    """Have replicas stay what they are: one that is elected, after a second or two, is asked as a primary."""

    def say(word: str) -> None:
        for server in cluster.servers:
            for option in ("cluster-replica-no-failover", "cluster-allow-reads-when-down"):
                server.ask("CONFIG", "SET", option, word)

    say("yes")
    try:
        yield
    finally:
        say("no")


def use(cluster: Cluster) -> None:
    """Do everything that a tier does."""
    tier = opened(cluster)
    tier.check()
    tier.retain([])
    batch = [record(n, 1850) for n in range(300)]
    locations = tier.write(batch)
    kept = dict(list(zip(locations, batch, strict=True))[::5])
    tier.retain(list(kept))
    assert tier.statistics().shortened
    again = opened(cluster)
    again.retain(list(kept))
    check(again, list(kept), list(kept.values()))
    # A replica is asked for what is there: of a primary that hangs, and in a slot that moves, whoever has it.
    with no_elections(cluster), cluster.primaries()[0].stopped():
        check(again, list(kept), list(kept.values()))
    wait_until(cluster.settled)
    slot = key_slot(values.key(values.prefix(IDENTITY), locations[0] >> values.PLACE_BITS))
    target = next(one for one in cluster.primaries() if one is not cluster.owner(slot))
    moving = Move(cluster, slot, target)
    moving.some(1)
    check(again, list(kept), list(kept.values()))
    again.destroy()
    moving.end()
    tier.close()


def test_the_rights_that_are_documented_are_enough(cluster: Cluster) -> None:
    use(cluster)


def test_passwords_and_rights_that_change_while_it_is_used(cluster: Cluster, tmp_path: Path) -> None:
    """Who is connected stays so; pages wait until new connections are let in, and nothing is lost."""
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    options = f"?timeout=1&user={USER}&password_file={secret}"
    tier = RedisTier(RedisAddress.parse(cluster.url + options), IDENTITY, True)
    tier.retain([])
    locations = tier.write(records(0, 400))

    def is_refused(reason: str) -> None:
        for call in (lambda: tier.write(records(1000, 400)), lambda: tier.read(locations)):
            with pytest.raises(TierDownError, match=reason):
                call()

    give(cluster, "-set", "-get")  # of connections as well
    with pytest.raises(TierDownError, match=r"refuses SET: .*docs/redis\.md"):
        tier.write(records(1000, 400))
    with pytest.raises(TierDownError, match=r"refuses GET: .*docs/redis\.md"):
        tier.read(locations)
    give(cluster, "+set", "+get")
    check(tier, locations, records(0, 400))
    give(cluster, "<sesame", ">other")
    locations += tier.write(records(400, 400))
    for server in cluster.servers:
        server.ask("CLIENT", "KILL", "USER", USER)
    is_refused("(?i)password")
    secret.write_text("other")
    check(tier, locations, records(0, 800))
    give(cluster, "off")
    for server in cluster.servers:
        server.ask("CLIENT", "KILL", "USER", USER)
    is_refused("(?i)password|disabled")
    give(cluster, "on")
    locations += tier.write(records(800, 400))
    check(tier, locations, records(0, 1200))
    tier.close()


def test_and_each_of_them_is_needed(cluster: Cluster) -> None:
    """Without it something fails, and the error names it."""
    rights = [rule.removeprefix("+") for rule in rules_of(USER) if rule.startswith("+")]
    assert len(rights) > 8
    said = {}
    for right in rights:
        give(cluster, f"-{right}")
        said[right] = ""
        try:
            use(cluster)
        except TierError as refusal:
            said[right] = str(refusal)
        give(cluster, f"+{right}")
        cluster.revive()
    spared = {"readwrite": "connections are closed instead", "command": "older versions of the package ask"}
    for right, words in said.items():
        if right in spared and not words:
            continue
        assert f"run the '{right}' command" in words, said
        assert "docs/redis.md" in words, words
