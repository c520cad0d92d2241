"""URLs of Redis tiers: what they mean, and what is said about wrong ones."""

from pathlib import Path

import pytest

from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierError


def test_one_server() -> None:
    address = RedisAddress.parse("redis://cache:7000/2?replicas=1&timeout=2.5")
    assert not address.cluster
    assert not address.tls
    assert address.servers == (("cache", 7000),)
    assert (address.database, address.replicas, address.timeout_seconds) == (2, 1, 2.5)
    assert str(address) == "redis://cache:7000/2"


def test_what_is_left_out() -> None:
    address = RedisAddress.parse("redis://cache")
    assert address.servers == (("cache", 6379),)
    assert (address.database, address.replicas, address.user, address.password) == (0, None, None, None)


def test_a_cluster() -> None:
    address = RedisAddress.parse("redis+cluster://a:7001,b,[fd00::1]:7002,[::1]")
    assert address.cluster
    assert address.servers == (("a", 7001), ("b", 6379), ("fd00::1", 7002), ("::1", 6379))
    assert str(address) == "redis+cluster://a:7001,b:6379,[fd00::1]:7002,[::1]:6379"


def test_tls_and_passwords() -> None:
    address = RedisAddress.parse("rediss+cluster://me:p%40ss%2Fword@a:1?tls_ca=/etc/ca.pem&tls_hostname=no")
    assert (address.user, address.password) == ("me", "p@ss/word")
    assert (address.tls, address.tls_ca, address.tls_hostname) == (True, Path("/etc/ca.pem"), False)
    assert RedisAddress.parse("redis://:word@a").password == "word"
    by_file = RedisAddress.parse("rediss://a?user=me&password_file=/etc/secret")
    assert (by_file.user, by_file.password_file) == ("me", Path("/etc/secret"))


def test_passwords_are_not_shown() -> None:
    address = RedisAddress.parse("redis://me:sesame@a:1/0")
    assert "sesame" not in str(address) + repr(address)


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("", "use redis://"),
        ("http://a", "use redis://"),
        ("redis:a", "use redis://"),
        ("redis://", "HOST:PORT"),
        ("redis://a:99999", "HOST:PORT"),
        ("redis://a:1:2", "HOST:PORT"),
        ("redis://fd00::1", r"\[ADDRESS\]:PORT"),
        ("redis://a,b", r"redis\+cluster://a,b"),
        ("redis+cluster://a,,b", "HOST:PORT"),
        ("redis+cluster://a/3", "leave out"),
        ("redis://a/x", "use a number"),
        ("redis://me@a", "password_file"),
        ("redis://me:@a", "password_file"),
        ("redis://a?user=me", "password_file"),
        ("redis://:x@a?password_file=/y", "use one of them"),
        ("redis://a?password_file=y", "/ABSOLUTE/PATH"),
        ("redis://a?replicas=-1", "replicas=NUMBER"),
        ("redis://a?replicas=many", "replicas=NUMBER"),
        ("redis://a?timeout=0", "SECONDS"),
        ("redis://a?timeout=nan", "SECONDS"),
        ("redis://a?colour=red", "use replicas="),
        ("redis://a?replicas", "use replicas="),
        ("redis://a?tls_ca=/x", "rediss"),
        ("rediss://a?tls_cert=/x", "tls_key="),
        ("rediss://a?tls_hostname=maybe", "yes or no"),
    ],
)
def test_wrong_ones_are_refused(url: str, advice: str) -> None:
    with pytest.raises(TierError, match=advice) as refusal:
        RedisAddress.parse(url)
    assert "\n" not in str(refusal.value)


def test_no_refusal_shows_a_password() -> None:
    for url in (
        "redis://me:sesame@a:x",
        "redis://sesame@a",
        "redis://:sesame@a?colour=red",
        "redis://:sesame@a,b",
        "redis://:open/sesame@a:1/0",
        "redis://:open?sesame@a:1",
        "redis+cluster://me:open?x=y&sesame@a:1",
    ):
        with pytest.raises(TierError) as refusal:
            RedisAddress.parse(url)
        assert "sesame" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:sesame@a:1/0",
        "redis://:ses@sesame@a:1",
        "redis+cluster://me:open/sesame@a:1,b:2?replicas=1",
        "rediss://:open?sesame@a",
        "tier=redis://me:sesame@a",
    ],
)
def test_what_is_shown_of_a_url_has_no_password(url: str) -> None:
    shown = RedisAddress.shown(url)
    assert "ses" not in shown
    assert "@a" in shown
    for plain in (
        "redis://a:1/0?password_file=/etc/secret",
        "/var/spill?size=1G",
        "file:/x@y",
        "redis://[::1]:1",
    ):
        assert RedisAddress.shown(plain) == plain
