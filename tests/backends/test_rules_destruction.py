"""The rules K of tmem's semantics: the end of pools, of memberships in shared ones, and of clients.

`test_rules` has the others. What front ends do with their pools is shown with real mounts and devices in
``tests/fs/test_rules.py`` and ``tests/nbd/test_rules.py``.
"""

from collections.abc import Callable

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from .operations import page_at
from .pages import oid, page, pages

OBJECT = oid(1)
UUID = bytes(range(16))


@pytest.fixture
def sharers(small: _native.Segment) -> list[_native.Client]:
    """Three clients that may share a pool."""
    made = [small.client(name) for name in ("first", "second", "third")]
    for one in made:
        one.authorise(UUID)
    return made


def join(client: _native.Client) -> _native.Pool:
    return client.new_pool(persistent=False, uuid=UUID)


def there(pool: _native.Pool) -> set[int]:
    """Return which of the objects 0 to 4 have their page, without using them."""
    return {number for number in range(5) if pool.present(oid(number), 0, 1)}


def put_five(pool: _native.Pool) -> None:
    """Put a page of each object 0 to 4: they count as used by the owner, whoever puts."""
    for number in range(5):
        assert pool.put(oid(number), 0, page("random", number)) == 1


@pytest.mark.parametrize("kept_pages", [0, 1, 2000])
def test_k1_destroyed_pool(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool, kept_pages: int
) -> None:
    """All data is dropped; the id may be used again at once, and the old pool does not come back with it."""
    before = small.statistics()["chunks_used"]
    victim = client.new_pool(persistent=True)
    persistent.put(OBJECT, 0, page("text", 1))
    for i in range(0, kept_pages, 100):
        victim.put(oid(i), i << 10, b"".join(pages("text", i, 100)))
    number = victim.id
    victim.destroy()
    again = client.new_pool(persistent=True)
    assert again.id == number
    assert not victim.alive
    for call in (lambda: victim.put(OBJECT, 0, page("text", 1)), lambda: page_at(victim, 0), victim.destroy):
        with pytest.raises(PoolError):
            call()
    assert again.present(OBJECT, 0, 2**20) == []
    assert again.statistics()["puts"] == 0
    assert page_at(persistent, 0) == page("text", 1)
    persistent.flush_object(OBJECT)
    small.reap()
    assert small.statistics()["chunks_used"] <= before + 4


def test_k3_destroyed_client(small: _native.Segment) -> None:
    doomed, other = small.client("doomed"), small.client("other")
    pools = [doomed.new_pool(persistent=bool(i % 2)) for i in range(16)]
    kept = other.new_pool(persistent=True)
    for pool in (*pools, kept):
        pool.put(OBJECT, 0, b"".join(pages("text", 0, 30)))
    doomed.destroy()
    assert [c.name for c in small.clients()] == ["other"]
    for pool in pools:
        assert not pool.alive
        with pytest.raises(PoolError):
            pool.get(OBJECT, 0, bytearray(PAGE_SIZE))
    for attempt in (
        doomed.pools,
        doomed.statistics,
        doomed.destroy,
        lambda: doomed.new_pool(persistent=True),
    ):
        with pytest.raises(PoolError):
            attempt()
    with pytest.raises(PoolError, match="no client called doomed"):
        small.client("doomed", create=False)
    again = small.client("doomed")
    assert again.pools() == []
    assert again.cap_bytes == 0
    assert again != doomed
    assert kept.client == other
    assert pools[0].client != again, "the client that has its number now"
    with pytest.raises(PoolError):
        _ = pools[0].client.name
    assert page_at(kept, 0) == page("text", 0)


# shared pools


def test_k2_the_pages_that_the_leaver_used_last_go(sharers: list[_native.Client]) -> None:
    """By objects: a put counts for the owner, a hit for the getter."""
    first, second, third = map(join, sharers)
    put_five(second)
    assert page_at(second, 0, oid(1)) == page("random", 1)
    assert page_at(third, 0, oid(2)) == page("random", 2)
    assert page_at(third, 0, oid(3)) == page("random", 3)
    assert page_at(second, 0, oid(3)) == page("random", 3)
    assert page_at(second, 1, oid(4)) is None, "a miss is no use"
    second.destroy()
    assert there(first) == {0, 2, 4}
    third.destroy()
    assert there(first) == {0, 4}
    assert page_at(first, 0, oid(4)) == page("random", 4)


def test_k2_a_put_gives_the_object_back_to_the_owner(sharers: list[_native.Client]) -> None:
    first, second = map(join, sharers[:2])
    put_five(first)
    for number in (1, 2):
        assert page_at(second, 0, oid(number)) == page("random", number)
    assert second.put(oid(2), 7, page("random", 9)) == 1
    second.destroy()
    assert there(first) == {0, 2, 3, 4}
    assert page_at(first, 7, oid(2)) == page("random", 9)


def test_k2_ownership_moves_to_the_next_sharer(sharers: list[_native.Client]) -> None:
    """With the account: the leaver pays nothing any more, the next owner for all that is left."""
    pools = [join(one) for one in sharers]
    assert {pool.owner for pool in pools} == {sharers[0]}
    put_five(pools[0])
    for number in range(4):
        assert page_at(pools[1], 0, oid(number)) is not None
    for one in sharers[1:]:
        assert one.statistics()["used_bytes"] == 0
    pools[0].destroy()
    owner = pools[1].owner
    assert owner in sharers[1:]
    assert {pool.owner for pool in pools[1:]} == {owner}
    assert pools[1].sharers == pools[2].sharers
    assert set(pools[1].sharers) == set(sharers[1:])
    assert there(pools[2]) == {0, 1, 2, 3}
    usage = [one.statistics()["used_bytes"] for one in sharers]
    assert usage[0] == 0
    assert sum(usage) == owner.statistics()["used_bytes"] == pools[1].statistics()["bytes"] > 0
    assert owner.statistics()["ephemeral_pages"] == 4
    assert pools[1].put(oid(9), 0, page("random", 9)) == 1
    assert owner.statistics()["ephemeral_pages"] == 5


def test_k2_the_pool_ends_with_its_last_sharer(small: _native.Segment, sharers: list[_native.Client]) -> None:
    before = small.statistics()["chunks_used"]
    for _ in range(3):
        first, second = map(join, sharers[:2])
        assert first.put(OBJECT, 0, b"".join(pages("random", 0, 500))) == 500
        assert page_at(second, 499) is not None
        first.destroy()
        assert second.statistics()["pages"] == 500
        second.destroy()
        assert not first.alive
        assert not second.alive
        assert small.statistics()["ephemeral_pages"] == 0
    again = join(sharers[2])
    assert (again.owner, again.sharers) == (sharers[2], [sharers[2]])
    assert again.present(OBJECT, 0, 2**32) == []
    assert again.statistics()["puts"] == 0
    again.destroy()
    small.reap()
    assert small.statistics()["chunks_used"] <= before + 4


LEAVES: dict[str, Callable[[_native.Client, _native.Pool], object]] = {
    "leaving": lambda _, pool: pool.destroy(),
    "losing the right": lambda client, _: client.revoke(UUID),
    "its client's end": lambda client, _: client.destroy(),
}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("who", [0, 1])
def test_k2_however_a_sharer_leaves(sharers: list[_native.Client], how: str, who: int) -> None:
    pools = [join(one) for one in sharers]
    put_five(pools[0])
    for number in (1, 2):
        assert page_at(pools[1], 0, oid(number)) is not None
    LEAVES[how](sharers[who], pools[who])
    assert not pools[who].alive
    for call in (pools[who].destroy, lambda: page_at(pools[who], 0), lambda: pools[who].flush_object(OBJECT)):
        with pytest.raises(PoolError):
            call()
    assert there(pools[2]) == ({1, 2} if who == 0 else {0, 3, 4})
    assert pools[2].put(OBJECT, 0, page("text", 1)) == 1
    assert page_at(pools[1 - who], 0) == page("text", 1)


# front ends


def test_k4_flushing_a_devices_objects_keeps_the_pool(client: _native.Client) -> None:
    """What swapoff leaves to do; the device goes on with the same pool, and other devices notice nothing."""
    pool = client.new_pool(persistent=True)
    for number in range(16, 48):
        assert pool.put(oid(number), 0, b"".join(pages("text", number, 30))) == 30
    assert [pool.flush_object(oid(number)) for number in range(16, 32)] == [30] * 16
    assert pool.alive
    assert pool.statistics()["pages"] == 16 * 30
    assert page_at(pool, 29, oid(32)) == page("text", 32 + 29)
    assert page_at(pool, 29, oid(31)) is None
    assert pool.put(oid(16), 5, page("text", 1)) == 1


def test_k4_destroying_a_mounts_pool_leaves_the_others(client: _native.Client) -> None:
    """Unmounting with a real mount is ``tests/fs/test_rules.py``."""
    mounts = [client.new_pool(persistent=False, exclusive=False) for _ in range(3)]
    for number, pool in enumerate(mounts):
        assert pool.put(OBJECT, 0, page("text", number)) == 1
    mounts[1].destroy()
    assert [page_at(mounts[number], 0) for number in (0, 2)] == [page("text", 0), page("text", 2)]


def test_k5_pool_ids_are_small_and_0_is_one_of_them(small: _native.Segment) -> None:
    """Whoever holds a pool holds that pool, never whatever has its number now."""
    client, other = small.client("a"), small.client("b")
    zero = client.new_pool(persistent=True)
    theirs = other.new_pool(persistent=True)
    assert (zero.id, theirs.id) == (0, 0)
    for pool in (zero, theirs):
        assert pool.put(OBJECT, 0, page("text", 1)) == 1
    zero.destroy()
    reborn = client.new_pool(persistent=True)
    assert reborn.id == 0
    assert reborn.put(OBJECT, 0, page("text", 2)) == 1
    for call in (
        lambda: page_at(zero, 0),
        lambda: zero.put(OBJECT, 0, page("text", 3)),
        lambda: zero.flush_object(OBJECT),
        zero.destroy,
        zero.statistics,
    ):
        with pytest.raises(PoolError):
            call()
    assert page_at(reborn, 0) == page("text", 2)
    assert page_at(theirs, 0) == page("text", 1)


@pytest.mark.parametrize("persistent", [False, True])
def test_k5_a_pool_can_be_had_with_a_number(client: _native.Client, persistent: bool) -> None:
    """Restoring a client gives its pools the numbers they had."""
    pool = client.new_pool(persistent, id=7)
    assert pool.id == 7
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    assert page_at(client.pool(7), 0) == page("text", 1)
    with pytest.raises(PoolError, match="exists already"):
        client.new_pool(persistent, id=7)
    for number in (-1, 16, 2**31):
        with pytest.raises((ValueError, OverflowError)):
            client.new_pool(persistent, id=number)
    assert [client.new_pool(persistent).id for _ in range(8)] == [0, 1, 2, 3, 4, 5, 6, 8]
