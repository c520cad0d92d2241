"""The rules of tmem's semantics one by one, named as in the specification: P put, D duplicate put, G get,
F flush, C coherency, K destruction. `test_conformance` has the set of conformance tests, `test_processes` C4.

Left out is what belongs to live migration (F4), to shared pools (K2) and to front ends (K4, K5). Of D5, how a
duplicate is done inside, only the outcome can be seen.
"""

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .model import indexes
from .operations import Where
from .pages import oid, page, pages

OBJECT = oid(1)


@pytest.fixture
def client(small: _native.Segment) -> _native.Client:
    return small.client("guest")


@pytest.fixture
def persistent(client: _native.Client) -> _native.Pool:
    return client.new_pool(persistent=True)


@pytest.fixture
def ephemeral(client: _native.Client) -> _native.Pool:
    return client.new_pool(persistent=False)


@pytest.fixture
def kept(client: _native.Client) -> _native.Pool:
    """An ephemeral pool whose gets leave the page."""
    return client.new_pool(persistent=False, exclusive=False)


def get(pool: _native.Pool, index: int, o: bytes = OBJECT) -> bytes | None:
    buffer = bytearray(PAGE_SIZE)
    return bytes(buffer) if pool.get(o, index, buffer) else None


def fill(pool: _native.Pool, kind: str = "random", o: bytes = oid(900)) -> int:
    """Put pages until one is refused; the number stored."""
    return pool.put(o, 0, b"".join(pages(kind, 10_000, 6000)), keep_old=True)


# put


def test_p1_put_and_get_copy(persistent: _native.Pool) -> None:
    data = bytearray(page("text", 1))
    assert persistent.put(OBJECT, 0, data) == 1
    data[:] = page("text", 2)
    buffer = bytearray(PAGE_SIZE)
    assert persistent.get(OBJECT, 0, buffer) == 1
    buffer[:] = page("text", 3)
    assert get(persistent, 0) == page("text", 1)
    data.append(0)  # a buffer that were still exported would refuse to grow
    buffer.append(0)


def test_p2_a_put_may_be_refused(client: _native.Client, persistent: _native.Pool) -> None:
    client.cap_bytes = 1
    assert persistent.put(OBJECT, 0, page("random", 1)) == 0
    assert persistent.put(OBJECT, 0, b"".join(pages("random", 1, 20))) == 0


def test_p3_a_put_is_decided_when_it_returns(small: _native.Segment, persistent: _native.Pool) -> None:
    other = _native.attach(small.path)
    for index in range(50):
        assert persistent.put(OBJECT, index, page("text", index)) == 1
        assert op.get(other, Where("guest", persistent.id), OBJECT, index) == [page("text", index)]
    other.close()


def test_p4_persistent_pages_stay(
    small: _native.Segment, persistent: _native.Pool, ephemeral: _native.Pool
) -> None:
    data = pages("mixed", 0, 200)
    assert persistent.put(OBJECT, 0, b"".join(data)) == 200
    for _ in range(3):
        fill(ephemeral)
        fill(ephemeral, "text", oid(5))
        small.evict(1 << 40)
        small.trim(0)
        small.reap()
        assert [get(persistent, index) for index in range(200)] == data


def test_p5_ephemeral_pages_may_go(small: _native.Segment, ephemeral: _native.Pool) -> None:
    assert ephemeral.put(OBJECT, 0, page("random", 1)) == 1
    assert small.evict(1 << 40) > 0
    assert get(ephemeral, 0) is None


def test_p6_a_refused_put_leaves_no_trace(small: _native.Segment, persistent: _native.Pool) -> None:
    """Refused for want of a block, of a leaf, of an object: at all depths of the index."""
    fill(persistent)
    pages_before = persistent.statistics()["pages"]
    for number, index in enumerate((0, 20, 100, 600, 5000, 2**31, 2**32 - 1)):
        assert persistent.put(oid(30 + number), index, page("random", number)) == 0
        assert get(persistent, index, oid(30 + number)) is None
        assert persistent.present(oid(30 + number), 0, 2**32) == []
        assert persistent.flush_object(oid(30 + number)) == 0
    assert persistent.statistics()["pages"] == pages_before
    assert small.check() == []


# duplicate put


@pytest.mark.parametrize(
    "kinds", [("text", "random"), ("random", "text"), ("zero", "random"), ("text", "word32")]
)
def test_d1_accepted_duplicate_shows_the_new_page(
    persistent: _native.Pool, ephemeral: _native.Pool, kinds: tuple[str, str]
) -> None:
    for pool in (persistent, ephemeral):
        assert pool.put(OBJECT, 7, page(kinds[0], 1)) == 1
        assert pool.put(OBJECT, 7, page(kinds[1], 2)) == 1
        assert get(pool, 7) == page(kinds[1], 2)
        assert pool.statistics()["puts_replaced"] == 1


def test_d1_refused_duplicate_leaves_a_miss(persistent: _native.Pool) -> None:
    """What compressed well is overwritten by what does not, with no space left."""
    stored = fill(persistent, "text")
    refused = 0
    for index in range(0, stored, 7):
        taken = persistent.put(oid(900), index, page("random", index))
        refused += not taken
        assert get(persistent, index, oid(900)) == (page("random", index) if taken else None)
        if index > 7:
            assert get(persistent, index - 1, oid(900)) == page("text", 10_000 + index - 1)
    assert refused > 0
    assert persistent.statistics()["puts_flushed"] == refused


def test_d2_old_data_is_never_current_again(client: _native.Client, persistent: _native.Pool) -> None:
    assert persistent.put(OBJECT, 0, page("text", 1)) == 1
    client.cap_bytes = 1
    assert persistent.put(OBJECT, 0, page("random", 2)) == 0
    client.cap_bytes = 0
    assert get(persistent, 0) is None
    assert persistent.put(OBJECT, 1, page("text", 3)) == 1
    assert get(persistent, 0) is None


def test_d3_refused_duplicates_are_counted(client: _native.Client, persistent: _native.Pool) -> None:
    assert persistent.put(OBJECT, 0, page("text", 1)) == 1
    client.cap_bytes = 1
    assert persistent.put(OBJECT, 0, page("random", 1)) == 0
    assert persistent.put(OBJECT, 0, page("random", 1)) == 0
    counters = persistent.statistics()
    assert (counters["puts_flushed"], counters["puts_refused"], counters["pages"]) == (1, 1, 0)


@pytest.mark.parametrize("npages", [1, 5, 20])
def test_d4_on_demand_a_refused_put_keeps_the_old_page(
    client: _native.Client, persistent: _native.Pool, npages: int
) -> None:
    """Not tmem's rule, but a block device's: a sector is old or new. The call stops at the refused page."""
    old, new = pages("text", 0, 20), pages("random", 0, 20)
    assert persistent.put(OBJECT, 0, b"".join(old)) == 20
    client.cap_bytes = client.statistics()["used_bytes"] + 3 * (4160 - 1408)
    stored = persistent.put(OBJECT, 0, b"".join(new[:npages]), keep_old=True)
    assert stored == min(npages, 3)
    assert [get(persistent, index) for index in range(20)] == new[:stored] + old[stored:]
    counters = persistent.statistics()
    assert (counters["puts_flushed"], counters["puts_refused"]) == (0, int(npages > 3))


def test_d6_every_put_is_a_flush_while_puts_are_refused(
    client: _native.Client, persistent: _native.Pool, ephemeral: _native.Pool
) -> None:
    data = pages("text", 0, 100)
    for pool in (persistent, ephemeral):
        assert pool.put(OBJECT, 0, b"".join(data)) == 100
    client.cap_bytes = 1
    for pool in (persistent, ephemeral):
        assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 50))) == 0
    client.cap_bytes = 0
    for pool in (persistent, ephemeral):
        assert [get(pool, index) for index in range(50)] == [None] * 50
    assert [get(persistent, index) for index in range(50, 100)] == data[50:]


# get


def test_g1_g3_persistent_get_leaves_the_page(persistent: _native.Pool) -> None:
    assert not persistent.exclusive
    persistent.put(OBJECT, 0, page("text", 1))
    assert [get(persistent, 0) for _ in range(3)] == [page("text", 1)] * 3


def test_g2_ephemeral_get_removes_the_page(client: _native.Client, ephemeral: _native.Pool) -> None:
    """Its memory is free at once, and the client may put it again."""
    assert ephemeral.exclusive
    for _ in range(3):
        assert ephemeral.put(OBJECT, 0, page("text", 1)) == 1
        assert client.statistics()["used_bytes"] > 0
        assert get(ephemeral, 0) == page("text", 1)
        assert client.statistics()["used_bytes"] == 0
        assert get(ephemeral, 0) is None
    assert ephemeral.statistics()["gets_taken"] == 3


def test_g4_exclusive_get_by_choice_of_the_pool(client: _native.Client, kept: _native.Pool) -> None:
    taking = client.new_pool(persistent=True, exclusive=True)
    assert (taking.persistent, taking.exclusive, kept.exclusive) == (True, True, False)
    for pool in (taking, kept):
        pool.put(OBJECT, 0, page("text", 1))
        assert get(pool, 0) == page("text", 1)
    assert get(taking, 0) is None
    assert get(kept, 0) == page("text", 1)


def test_g5_a_bad_destination_changes_nothing(small: _native.Segment, ephemeral: _native.Pool) -> None:
    ephemeral.put(OBJECT, 0, page("text", 1))
    with pytest.raises((BufferError, TypeError)):
        ephemeral.get(OBJECT, 0, bytes(PAGE_SIZE))
    with pytest.raises((BufferError, TypeError)):
        ephemeral.get(OBJECT, 0, memoryview(bytearray(2 * PAGE_SIZE))[::2])
    for size in (1, PAGE_SIZE - 1, PAGE_SIZE + 1):
        with pytest.raises(ValueError, match="whole pages"):
            ephemeral.get(OBJECT, 0, bytearray(size))
    assert ephemeral.get(OBJECT, 0, bytearray()) == 0
    small.evict(0)
    assert get(ephemeral, 0) == page("text", 1)


def test_g6_a_get_is_never_skipped(kept: _native.Pool) -> None:
    data = pages("mixed", 0, 300)
    assert kept.put(OBJECT, 0, b"".join(data)) == 300
    for _ in range(5):
        assert [get(kept, index) for index in range(300)] == data


# flush


def test_f1_after_a_flush_gets_miss(
    persistent: _native.Pool, ephemeral: _native.Pool, kept: _native.Pool
) -> None:
    for pool in (persistent, ephemeral, kept):
        pool.put(OBJECT, 0, b"".join(pages("mixed", 0, 40)))
        assert pool.flush(OBJECT, 3) == 1
        assert pool.flush(OBJECT, 10, 5) == 5
        gone = {3, *range(10, 15)}
        assert indexes(pool.present(OBJECT, 0, 40)) == set(range(40)) - gone
        assert pool.flush_object(OBJECT) == 34
        assert [get(pool, index) for index in range(40)] == [None] * 40
        assert pool.put(OBJECT, 3, page("text", 9)) == 1
        assert get(pool, 3) == page("text", 9)


def test_f2_absence_is_success(persistent: _native.Pool, ephemeral: _native.Pool) -> None:
    for pool in (persistent, ephemeral):
        pool.put(OBJECT, 0, page("text", 1))
        assert [pool.flush(OBJECT, 0) for _ in range(3)] == [1, 0, 0]
        assert [pool.flush_object(OBJECT) for _ in range(2)] == [0, 0]
        assert pool.flush_object(oid(77)) == 0
        assert pool.flush(oid(77), 2**32 - 5, 5) == 0


def test_f3_a_flush_needs_no_memory(client: _native.Client, persistent: _native.Pool) -> None:
    stored = fill(persistent)
    client.cap_bytes = 1
    assert persistent.flush(oid(900), 0, 10) == 10
    assert persistent.flush_object(oid(900)) == stored - 10
    assert client.statistics()["used_bytes"] == 0


def test_f5_flush_object_leaves_siblings(persistent: _native.Pool, client: _native.Client) -> None:
    """All indexes of the object, however far apart; no other object, no other pool."""
    far = (0, 15, 16, 63, 64, 511, 512, 4095, 4096, 2**19, 2**20, 2**29, 2**31, 2**32 - 1)
    other = client.new_pool(persistent=True)
    for pool in (persistent, other):
        for number in range(4):
            for index in far:
                assert pool.put(oid(number), index, page("text", index % 97)) == 1
    assert persistent.flush_object(oid(2)) == len(far)
    for pool in (persistent, other):
        for number in range(4):
            expected = [] if pool is persistent and number == 2 else sorted(far)
            assert sorted(indexes(pool.present(oid(number), 0, 2**32))) == expected
    assert get(other, 2**32 - 1, oid(2)) == page("text", (2**32 - 1) % 97)


# coherency


def test_c1_put_put_get(persistent: _native.Pool, kept: _native.Pool) -> None:
    for pool in (persistent, kept):
        for seed in range(200):
            assert pool.put(OBJECT, 5, pages("mixed", seed, 1)[0]) == 1
            assert get(pool, 5) == pages("mixed", seed, 1)[0]


def test_c2_get_get(small: _native.Segment, kept: _native.Pool) -> None:
    """What was missed once stays missed, whatever eviction does meanwhile."""
    missed: set[int] = set()
    for seed in range(4):
        data = pages("random", 10_000 * seed, 900)
        kept.put(oid(seed), 0, b"".join(data))
        for index in range(900):
            if get(kept, index, oid(0)) is None:
                missed.add(index)
            else:
                assert index not in missed
        small.evict(10 * 65536)
    assert missed
    assert kept.put(oid(0), min(missed), page("text", 1)) == 1
    assert get(kept, min(missed), oid(0)) == page("text", 1)


def test_c3_put_flush_get(persistent: _native.Pool, ephemeral: _native.Pool) -> None:
    for pool in (persistent, ephemeral):
        for kind in ("zero", "text", "random"):
            pool.put(OBJECT, 1, page(kind, 1))
            pool.flush(OBJECT, 1)
            assert get(pool, 1) is None


def test_c4_different_handles_are_independent(client: _native.Client, small: _native.Segment) -> None:
    """The same object and index in other pools, the same index in other objects, are other pages."""
    pools = [client.new_pool(persistent=bool(i % 2), exclusive=False) for i in range(4)]
    pools += [small.client("other").new_pool(persistent=True)]
    for number, pool in enumerate(pools):
        for o in range(3):
            assert pool.put(oid(o), 9, page("text", 10 * number + o)) == 1
    pools[1].flush(oid(1), 9)
    for number, pool in enumerate(pools):
        for o in range(3):
            expected = None if (number, o) == (1, 1) else page("text", 10 * number + o)
            assert get(pool, 9, oid(o)) == expected


# destruction


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
    for call in (lambda: victim.put(OBJECT, 0, page("text", 1)), lambda: get(victim, 0), victim.destroy):
        with pytest.raises(PoolError):
            call()
    assert again.present(OBJECT, 0, 2**20) == []
    assert again.statistics()["puts"] == 0
    assert get(persistent, 0) == page("text", 1)
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
    assert get(kept, 0) == page("text", 0)
