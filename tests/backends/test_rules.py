"""The rules of tmem's semantics one by one, named as in docs/semantics.md: P put, D duplicate put, G get,
F flush, C coherency. `test_rules_destruction` has K, `test_conformance` the set of conformance tests.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.types import PAGE_SIZE

from . import activities
from . import operations as op
from .model import Handle, indexes
from .operations import Where, fill, page_at
from .pages import oid, page, pages
from .places import Worker
from .records import apply

OBJECT = oid(1)


# put


def test_p1_put_and_get_copy(persistent: _native.Pool) -> None:
    data = bytearray(page("text", 1))
    assert persistent.put(OBJECT, 0, data) == 1
    data[:] = page("text", 2)
    buffer = bytearray(PAGE_SIZE)
    assert persistent.get(OBJECT, 0, buffer) == 1
    buffer[:] = page("text", 3)
    assert page_at(persistent, 0) == page("text", 1)
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
        assert [page_at(persistent, index) for index in range(200)] == data


def test_p5_ephemeral_pages_may_go(small: _native.Segment, ephemeral: _native.Pool) -> None:
    assert ephemeral.put(OBJECT, 0, page("random", 1)) == 1
    assert small.evict(1 << 40) > 0
    assert page_at(ephemeral, 0) is None


def test_p6_a_refused_put_leaves_no_trace(small: _native.Segment, persistent: _native.Pool) -> None:
    """Refused for want of a block, of a leaf, of an object: at all depths of the index."""
    fill(persistent)
    pages_before = persistent.statistics()["pages"]
    for number, index in enumerate((0, 20, 100, 600, 5000, 2**31, 2**32 - 1)):
        assert persistent.put(oid(30 + number), index, page("random", number)) == 0
        assert page_at(persistent, index, oid(30 + number)) is None
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
        assert page_at(pool, 7) == page(kinds[1], 2)
        assert pool.statistics()["puts_replaced"] == 1


def test_d1_refused_duplicate_leaves_a_miss(persistent: _native.Pool) -> None:
    """What compressed well is overwritten by what does not, with no space left."""
    stored = fill(persistent, "text")
    refused = 0
    for index in range(0, stored, 7):
        taken = persistent.put(oid(900), index, page("random", index))
        refused += not taken
        assert page_at(persistent, index, oid(900)) == (page("random", index) if taken else None)
        if index > 7:
            assert page_at(persistent, index - 1, oid(900)) == page("text", 10_000 + index - 1)
    assert refused > 0
    assert persistent.statistics()["puts_flushed"] == refused


def test_d2_old_data_is_never_current_again(client: _native.Client, persistent: _native.Pool) -> None:
    assert persistent.put(OBJECT, 0, page("text", 1)) == 1
    client.cap_bytes = 1
    assert persistent.put(OBJECT, 0, page("random", 2)) == 0
    client.cap_bytes = 0
    assert page_at(persistent, 0) is None
    assert persistent.put(OBJECT, 1, page("text", 3)) == 1
    assert page_at(persistent, 0) is None


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
    assert [page_at(persistent, index) for index in range(20)] == new[:stored] + old[stored:]
    counters = persistent.statistics()
    assert (counters["puts_flushed"], counters["puts_refused"]) == (0, int(npages > 3))


def test_d5_a_duplicate_put_takes_effect_at_once(
    directory: Path, small: _native.Segment, persistent: _native.Pool, workers: list[Worker]
) -> None:
    """Not flush, then create: another process sees the old page or the new one, never a miss."""
    versions = [page("random", 1), page("text", 2), page("word32", 3)]
    assert persistent.put(OBJECT, 0, versions[0]) == 1
    workers[0].attach(directory / "small")
    workers[0].start(activities.replace, Where("guest", persistent.id), OBJECT, 0, versions, 40_000)
    seen = {page_at(persistent, 0)}
    while persistent.statistics()["puts_replaced"] < 40_000:
        seen.add(page_at(persistent, 0))
    workers[0].finish(activities.replace)
    assert seen <= set(versions)
    assert len(seen) > 1


RESTRICTIONS: dict[str, Callable[[_native.Segment, _native.Client], None]] = {
    "over its cap": lambda _, client: setattr(client, "cap_bytes", 1),
    "frozen": lambda _, client: setattr(client, "mode", "frozen"),
    "off": lambda _, client: setattr(client, "mode", "off"),
    "all frozen": lambda segment, _: setattr(segment, "mode", "frozen"),
    "all off": lambda segment, _: setattr(segment, "mode", "off"),
}


def lift(segment: _native.Segment, client: _native.Client) -> None:
    client.cap_bytes = 0
    client.mode = segment.mode = "on"


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_d6_every_put_is_a_flush_while_puts_are_refused(
    small: _native.Segment,
    client: _native.Client,
    persistent: _native.Pool,
    ephemeral: _native.Pool,
    restriction: str,
) -> None:
    data = pages("text", 0, 100)
    for pool in (persistent, ephemeral):
        assert pool.put(OBJECT, 0, b"".join(data)) == 100
    RESTRICTIONS[restriction](small, client)
    for pool in (persistent, ephemeral):
        assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 50))) == 0
    lift(small, client)
    for pool in (persistent, ephemeral):
        assert [page_at(pool, index) for index in range(50)] == [None] * 50
    assert [page_at(persistent, index) for index in range(50, 100)] == data[50:]


# get


def test_g1_a_persistent_get_leaves_the_page(persistent: _native.Pool) -> None:
    assert not persistent.exclusive
    persistent.put(OBJECT, 0, page("text", 1))
    assert [page_at(persistent, 0) for _ in range(3)] == [page("text", 1)] * 3
    assert persistent.statistics()["gets_taken"] == 0


def test_g2_ephemeral_get_removes_the_page(client: _native.Client, ephemeral: _native.Pool) -> None:
    """Its memory is free at once, and the client may put it again."""
    assert ephemeral.exclusive
    for _ in range(3):
        assert ephemeral.put(OBJECT, 0, page("text", 1)) == 1
        assert client.statistics()["used_bytes"] > 0
        assert page_at(ephemeral, 0) == page("text", 1)
        assert client.statistics()["used_bytes"] == 0
        assert page_at(ephemeral, 0) is None
    assert ephemeral.statistics()["gets_taken"] == 3


def test_g3_a_persistent_pool_models_a_disk(persistent: _native.Pool) -> None:
    """Reads of all of it, in any order, destroy nothing: only a flush or another put does."""
    data = pages("mixed", 0, 100)
    assert persistent.put(OBJECT, 0, b"".join(data)) == 100
    buffer = bytearray(100 * PAGE_SIZE)
    for _ in range(2):
        assert persistent.get(OBJECT, 0, buffer) == 100
        assert buffer == b"".join(data)
        assert [page_at(persistent, index) for index in reversed(range(100))] == data[::-1]
    assert persistent.statistics()["pages"] == 100


def test_g4_exclusive_get_by_choice_of_the_pool(client: _native.Client, kept: _native.Pool) -> None:
    taking = client.new_pool(persistent=True, exclusive=True)
    assert (taking.persistent, taking.exclusive, kept.exclusive) == (True, True, False)
    for pool in (taking, kept):
        pool.put(OBJECT, 0, page("text", 1))
        assert page_at(pool, 0) == page("text", 1)
    assert page_at(taking, 0) is None
    assert page_at(kept, 0) == page("text", 1)


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
    assert page_at(ephemeral, 0) == page("text", 1)


def test_g6_a_get_is_never_skipped(kept: _native.Pool) -> None:
    data = pages("mixed", 0, 300)
    assert kept.put(OBJECT, 0, b"".join(data)) == 300
    for _ in range(5):
        assert [page_at(kept, index) for index in range(300)] == data


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
        assert [page_at(pool, index) for index in range(40)] == [None] * 40
        assert pool.put(OBJECT, 3, page("text", 9)) == 1
        assert page_at(pool, 3) == page("text", 9)


def test_f2_absence_is_success(persistent: _native.Pool, ephemeral: _native.Pool) -> None:
    for pool in (persistent, ephemeral):
        pool.put(OBJECT, 0, page("text", 1))
        assert [pool.flush(OBJECT, 0) for _ in range(3)] == [1, 0, 0]
        assert [pool.flush_object(OBJECT) for _ in range(2)] == [0, 0]
        assert pool.flush_object(oid(77)) == 0
        assert pool.flush(oid(77), 2**32 - 5, 5) == 0


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_f3_a_flush_needs_no_memory_and_is_never_refused(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool, restriction: str
) -> None:
    stored = fill(persistent)
    RESTRICTIONS[restriction](small, client)
    assert persistent.flush(oid(900), 0, 10) == 10
    assert page_at(persistent, 9, oid(900)) is None
    assert page_at(persistent, 10, oid(900)) == page("random", 10_010)
    assert persistent.flush_object(oid(900)) == stored - 10
    assert client.statistics()["used_bytes"] == 0
    lift(small, client)
    assert persistent.present(oid(900), 0, 2**32) == []


@pytest.mark.parametrize("phase", ["copying", "frozen"])
def test_f4_a_flush_during_a_handoff_is_passed_on(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool, phase: str
) -> None:
    """Of a page, of an object, of what an exclusive get took, and by a put that is refused."""
    taking = client.new_pool(persistent=True, exclusive=True)
    copies: list[dict[Handle, bytes]] = [{}, {}]

    def copy() -> set[int]:
        records = [op.export(small, Where("guest", pool.id), True, 8192) for pool in (persistent, taking)]
        named = [apply(pages_, some) for pages_, some in zip(copies, records, strict=True)]
        return {index for _, index in named[0] | named[1]}

    for pool in (persistent, taking):
        for number in range(3):
            assert pool.put(oid(number), 0, b"".join(pages("mixed", number, 20))) == 20
    client.handoff("copy")
    assert copy() == set(range(20))
    assert copy() == set()
    if phase == "frozen":
        client.handoff("freeze")
    assert persistent.flush(oid(0), 3, 2) == 2
    assert persistent.flush_object(oid(1)) == 20
    assert page_at(taking, 7, oid(2)) is not None
    client.cap_bytes = 1
    assert persistent.put(oid(2), 11, page("random", 5)) == 0
    if phase == "copying":
        client.handoff("freeze")
    copy()
    assert copies[0] == {(o, i): page_at(persistent, i, o) for o, i in copies[0]}
    assert len(copies[0]) == persistent.statistics()["pages"] == 60 - 2 - 20 - 1
    assert len(copies[1]) == taking.statistics()["pages"] == 59
    assert (oid(2), 7) not in copies[1]
    client.handoff("end")


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
    assert page_at(other, 2**32 - 1, oid(2)) == page("text", (2**32 - 1) % 97)


# coherency


def test_c1_put_put_get(persistent: _native.Pool, kept: _native.Pool) -> None:
    for pool in (persistent, kept):
        for seed in range(200):
            assert pool.put(OBJECT, 5, pages("mixed", seed, 1)[0]) == 1
            assert page_at(pool, 5) == pages("mixed", seed, 1)[0]


def test_c2_get_get(small: _native.Segment, kept: _native.Pool) -> None:
    """What was missed once stays missed, whatever eviction does meanwhile."""
    missed: set[int] = set()
    for seed in range(4):
        data = pages("random", 10_000 * seed, 900)
        kept.put(oid(seed), 0, b"".join(data))
        for index in range(900):
            if page_at(kept, index, oid(0)) is None:
                missed.add(index)
            else:
                assert index not in missed
        small.evict(10 * 65536)
    assert missed
    assert kept.put(oid(0), min(missed), page("text", 1)) == 1
    assert page_at(kept, min(missed), oid(0)) == page("text", 1)


def test_c3_put_flush_get(persistent: _native.Pool, ephemeral: _native.Pool) -> None:
    for pool in (persistent, ephemeral):
        for kind in ("zero", "text", "random"):
            pool.put(OBJECT, 1, page(kind, 1))
            pool.flush(OBJECT, 1)
            assert page_at(pool, 1) is None


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
            assert page_at(pool, 9, oid(o)) == expected
