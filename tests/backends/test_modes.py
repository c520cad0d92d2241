"""Frozen and off: what a client, or all of them, may do; at once, and for every process.

`test_rules` has D6 and F3, what becomes of puts and flushes; here is the rest.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .activities import churn
from .model import check_identities
from .operations import Where, page_at
from .pages import oid, page, pages
from .places import Worker
from .sums import check_sums

OBJECT = oid(1)
UUID = b"a shared pool is"
DATA = pages("mixed", 0, 60)


def own(client: _native.Client, mode: str) -> None:
    client.mode = mode


@pytest.fixture(params=["the client's", "the segment's"])
def restrict(request: pytest.FixtureRequest, small: _native.Segment) -> Callable[[_native.Client, str], None]:
    """Set the mode of a client, or of all: a function of client and mode."""

    def everybody(_: _native.Client, mode: str) -> None:
        small.mode = mode

    return own if request.param == "the client's" else everybody


Restrict = Callable[[_native.Client, str], None]


def test_everybody_begins_on(small: _native.Segment, client: _native.Client) -> None:
    assert (small.mode, client.mode, client.usable, client.phase) == ("on", "on", True, "none")


def test_frozen_reads_go_on(client: _native.Client, restrict: Restrict) -> None:
    """Nothing grows; exclusive gets still remove."""
    pools = [client.new_pool(*kind) for kind in ((True, None), (False, None), (False, False))]
    for pool in pools:
        assert pool.put(OBJECT, 0, b"".join(DATA)) == 60
    restrict(client, "frozen")
    assert client.usable
    for pool in pools:
        before = pool.statistics()["pages"]
        assert pool.put(oid(2), 0, b"".join(DATA)) == 0
        assert pool.statistics()["pages"] == before
        assert page_at(pool, 5) == DATA[5]
        assert page_at(pool, 5) == (None if pool.exclusive else DATA[5])
    restrict(client, "on")
    for pool in pools:
        assert pool.present(oid(2), 0, 60) == []
        assert pool.put(oid(2), 0, b"".join(DATA)) == 60


def test_off_ephemeral_pages_are_gone_and_persistent_ones_stay(
    small: _native.Segment, client: _native.Client, restrict: Restrict
) -> None:
    persistent, ephemeral, kept = (
        client.new_pool(*kind) for kind in ((True, None), (False, None), (False, False))
    )
    for pool in (persistent, ephemeral, kept):
        assert pool.put(OBJECT, 0, b"".join(DATA)) == 60
    restrict(client, "off")
    assert not client.usable
    assert client.statistics()["ephemeral_pages"] == 0
    assert client.statistics()["ephemeral_bytes"] == 0
    for pool in (ephemeral, kept):
        assert pool.statistics()["pages"] == 0
        assert pool.statistics()["pages_dropped"] == 60
        assert page_at(pool, 3) is None
    assert [page_at(persistent, index) for index in range(60)] == DATA
    assert persistent.put(OBJECT, 100, DATA[0]) == 0
    assert persistent.flush(OBJECT, 7) == 1
    restrict(client, "on")
    assert client.usable
    for pool in (ephemeral, kept):
        assert [page_at(pool, index) for index in range(60)] == [None] * 60
        assert pool.put(OBJECT, 3, DATA[3]) == 1
        assert page_at(pool, 3) == DATA[3]
        check_identities(pool.statistics())
    assert page_at(persistent, 7) is None
    check_sums(small)


def test_a_put_that_keeps_the_old_page_does_so(client: _native.Client, restrict: Restrict) -> None:
    """What NBD asks for: a sector is old or new. The call stops at the first page."""
    pool = client.new_pool(persistent=True)
    assert pool.put(OBJECT, 0, b"".join(DATA)) == 60
    for mode in ("frozen", "off"):
        restrict(client, mode)
        assert pool.put(OBJECT, 0, b"".join(DATA[::-1]), keep_old=True) == 0
    restrict(client, "on")
    assert [page_at(pool, index) for index in range(60)] == DATA
    counters = pool.statistics()
    assert (counters["puts"], counters["puts_refused"], counters["puts_flushed"]) == (62, 2, 0)


@pytest.mark.parametrize("of_all", ["on", "frozen", "off"])
@pytest.mark.parametrize("of_one", ["on", "frozen", "off"])
def test_the_stricter_mode_counts(
    small: _native.Segment, client: _native.Client, of_all: str, of_one: str
) -> None:
    pool = client.new_pool(persistent=False, exclusive=False)
    other = small.client("other").new_pool(persistent=True)
    assert pool.put(OBJECT, 0, DATA[1]) == 1
    small.mode, client.mode = of_all, of_one
    assert (small.mode, client.mode) == (of_all, of_one)
    assert pool.put(OBJECT, 1, DATA[1]) == (of_all == of_one == "on")
    assert (page_at(pool, 0) is None) == ("off" in (of_all, of_one))
    assert client.usable == ("off" not in (of_all, of_one))
    assert other.put(OBJECT, 1, DATA[1]) == (of_all == "on")
    small.mode = client.mode = "on"
    assert pool.put(OBJECT, 1, DATA[1]) == 1


def test_others_go_on(small: _native.Segment, client: _native.Client) -> None:
    other = small.client("other")
    mine, theirs = client.new_pool(persistent=False), other.new_pool(persistent=False)
    for mode in ("frozen", "off"):
        client.mode = mode
        assert theirs.put(OBJECT, 0, DATA[1]) == 1
        assert page_at(theirs, 0) == DATA[1]
        assert other.usable
        assert mine.put(OBJECT, 0, DATA[1]) == 0


@pytest.mark.parametrize("of", ["client", "segment"])
def test_a_word_that_is_no_mode(small: _native.Segment, client: _native.Client, of: str) -> None:
    target = client if of == "client" else small
    for word in ("", "On", "thaw", "frozen ", 1, None, True):
        with pytest.raises(ValueError, match="mode"):
            target.mode = word  # type: ignore[assignment]
    with pytest.raises((ValueError, AttributeError)):
        del target.mode
    assert target.mode == "on"
    for word in ("", "zstd", None):
        with pytest.raises(ValueError, match="compress"):
            client.compress = word  # type: ignore[assignment]


def test_not_usable_is_whatever_is_gone(directory: Path) -> None:
    """Never an error: it is asked for every request."""
    segment = _native.create(str(directory / "one"), 8 << 20)
    clients = [segment.client(name) for name in ("a", "b")]
    clients[0].destroy()
    assert [client.usable for client in clients] == [False, True]
    _native.destroy(str(directory / "one"))
    assert not clients[1].usable
    segment.close()
    assert not clients[1].usable


def test_when_the_setter_returns_nothing_grows_any_more(
    directory: Path, small: _native.Segment, client: _native.Client, workers: list[Worker], restrict: Restrict
) -> None:
    """Three processes put as fast as they can: not one page after the client was frozen or turned off."""
    wheres = [op.new_pool(small, "guest", persistent) for persistent in (True, False)]
    handles = [op.find(small, where) for where in wheres]
    for number, worker in enumerate(workers):
        worker.attach(directory / "small")
        worker.start(churn, wheres, number, 100_000)
    for mode in ["frozen", "off"] * 20:
        restrict(client, mode)
        stored = [pool.statistics()["puts_stored"] for pool in handles]
        if mode == "off":
            assert handles[1].statistics()["pages"] == 0
        for _ in range(200):
            assert [pool.statistics()["puts_stored"] for pool in handles] == stored
        if mode == "off":
            assert handles[1].statistics()["pages"] == 0
        restrict(client, "on")
    assert sum(worker.finish(churn) for worker in workers) > 0
    assert sum(pool.statistics()["puts_refused"] for pool in handles) > 0
    for where in wheres:
        check_identities(op.statistics(small, where))
    check_sums(small)


def test_pools_come_and_go_whatever_the_mode(client: _native.Client, restrict: Restrict) -> None:
    for mode in ("frozen", "off"):
        restrict(client, mode)
        pool = client.new_pool(persistent=True)
        assert pool.put(OBJECT, 0, DATA[1]) == 0
        pool.destroy()
        assert not pool.alive
    client.destroy()
    with pytest.raises(PoolError):
        _ = client.mode


def test_a_restricted_sharer_restricts_nobody_else(small: _native.Segment, client: _native.Client) -> None:
    """Its puts are flushes, its gets miss while it is off; the pages of the pool are the others' too."""
    other = small.client("other")
    pools = []
    for one in (client, other):
        one.authorise(UUID)
        pools.append(one.new_pool(persistent=False, uuid=UUID))
    mine, theirs = pools
    assert theirs.put(OBJECT, 0, b"".join(DATA)) == 60
    client.mode = "frozen"
    assert page_at(mine, 1) == DATA[1]
    assert mine.put(OBJECT, 2, DATA[3]) == 0
    assert page_at(theirs, 2) is None
    assert theirs.put(OBJECT, 2, DATA[4]) == 1
    client.mode = "off"
    assert page_at(mine, 2) is None
    assert mine.flush(OBJECT, 3) == 1
    assert page_at(theirs, 3) is None
    assert page_at(theirs, 2) == DATA[4]
    client.mode = "on"
    small.mode = "off"
    assert theirs.statistics()["pages"] == 0


def test_uncompressed_pages(client: _native.Client) -> None:
    """From now on, whatever they are; those of one repeated word need no memory either way."""
    pool = client.new_pool(persistent=True)
    assert client.compress == "auto"
    assert pool.put(OBJECT, 0, b"".join(pages("text", 0, 20))) == 20
    client.compress = "none"
    assert client.compress == "none"
    assert pool.put(OBJECT, 20, b"".join(pages("text", 20, 20))) == 20
    assert pool.put(OBJECT, 40, page("word32", 3) + page("zero", 0)) == 2
    counters = pool.statistics()
    assert [counters[f"{kind}_pages"] for kind in ("compressed", "raw", "fill")] == [20, 20, 2]
    client.compress = "lz4"
    assert pool.put(OBJECT, 20, b"".join(pages("text", 20, 20))) == 20
    assert pool.statistics()["raw_pages"] == 0
    buffer = bytearray(42 * PAGE_SIZE)
    assert pool.get(OBJECT, 0, buffer) == 42
    assert buffer == b"".join((*pages("text", 0, 40), page("word32", 3), page("zero", 0)))


def test_what_a_client_is_set_to_stays_with_it(small: _native.Segment, client: _native.Client) -> None:
    """Everybody sees the same, and a new client of the same name begins anew."""
    client.mode, client.weight, client.compress, client.cap_bytes = "frozen", 7, "none", 1 << 20
    client.authorise(UUID)
    seen = op.settings(_native.attach(small.path), "guest")
    assert seen == (1 << 20, 0, 7, "none", "frozen", "none", [UUID])
    client.destroy()
    small.client("guest")
    assert op.settings(small, "guest") == (0, 0, 100, "auto", "on", "none", [])
    assert Where("guest", 0) not in [Where(c.name, p.id) for c in small.clients() for p in c.pools()]
