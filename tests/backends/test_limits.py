"""A bound that moves below the ceiling: ephemeral pages give way, persistent ones and promises stay, and the
memory is back with the system when the call returns."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from .machine import StoreMachine
from .pages import oid, page, pages

MEMORY_BYTES = 64 << 20
SMALL_BYTES = 16 << 20
CHUNK = 65536


@pytest.fixture
def segment(directory: Path) -> Iterator[_native.Segment]:
    made = _native.create(str(directory / "segment"), MEMORY_BYTES)
    yield made
    assert made.check() == []
    made.close()


def backed(segment: _native.Segment) -> int:
    """Memory that the segment's file takes from the system."""
    return Path(segment.path).stat().st_blocks * 512


def filled(
    segment: _native.Segment, client: str, persistent: bool, npages: int, kind: str = "random"
) -> _native.Pool:
    pool = segment.client(client).new_pool(persistent, exclusive=False)
    for first in range(0, npages, 500):
        pool.put(oid(1), first, b"".join(pages(kind, first, min(500, npages - first))))
    return pool


def test_a_new_segment_may_use_all(segment: _native.Segment) -> None:
    statistics = segment.statistics()
    limit, persistent = segment.limits
    assert limit == persistent == statistics["limit_bytes"] == statistics["persistent_limit_bytes"]
    assert limit == MEMORY_BYTES
    assert segment.size_range == (limit, limit)


@pytest.mark.parametrize("hard", [False, True])
def test_ephemeral_pages_give_way(segment: _native.Segment, hard: bool) -> None:
    pool = filled(segment, "cache", False, 20000)
    before = backed(segment)
    assert before > MEMORY_BYTES * 9 // 10
    limit = segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    assert limit == pytest.approx(SMALL_BYTES, abs=CHUNK)
    returned = segment.shrink(0, hard)
    assert backed(segment) <= limit
    assert returned == before - backed(segment)
    statistics = segment.statistics()
    assert statistics["used_bytes"] + statistics["reserve_bytes"] <= limit
    assert statistics["shrinks"] == 1
    assert pool.statistics()["pages"] > 1000  # no more was evicted than had to be
    pool.put(oid(2), 0, b"".join(pages("random", 30000, 5000)))
    assert backed(segment) <= limit


def test_pages_that_were_hit_are_spared_unless_it_is_hard(segment: _native.Segment) -> None:
    pool = filled(segment, "cache", False, 8000)
    hot = random.Random(1).sample(range(4000), 400)
    for _ in range(3):
        for index in hot:
            assert pool.get(oid(1), index, bytearray(PAGE_SIZE)) == 1
    segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    segment.shrink(0)
    assert sum(pool.get(oid(1), index, bytearray(PAGE_SIZE)) for index in hot) > 350


def test_pages_that_were_all_hit_do_not_keep_memory_from_coming_back(segment: _native.Segment) -> None:
    """Moving them all to the end of their queue first would take as long as the segment is large."""
    pool = filled(segment, "cache", False, 12000)
    for _ in range(3):
        for index in range(12000):
            pool.get(oid(1), index, bytearray(PAGE_SIZE))
    segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    before = segment.statistics()["eviction_attempts"]
    segment.trim(0)
    assert (4 << 20) <= segment.shrink(0, most_bytes=4 << 20) < (12 << 20)
    assert segment.statistics()["eviction_attempts"] - before < 200


def test_persistent_pages_stay(segment: _native.Segment) -> None:
    """The limit stays at what they need, and follows when they go."""
    pool = filled(segment, "swap", True, 6000)
    filled(segment, "cache", False, 10000)
    needed = 6000 * 4160
    limit = segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    assert needed < limit < needed + (5 << 20)
    segment.shrink(0)
    assert backed(segment) <= limit
    buffer = bytearray(6000 * PAGE_SIZE)
    assert pool.get(oid(1), 0, buffer) == 6000
    assert buffer == b"".join(pages("random", 0, 6000))
    pool.flush(oid(1), 3000, 3000)
    assert segment.set_limits(SMALL_BYTES, SMALL_BYTES) == pytest.approx(SMALL_BYTES, abs=CHUNK)
    segment.shrink(0)
    assert backed(segment) <= SMALL_BYTES


def test_persistent_pages_pass_the_limit_as_far_as_they_may(segment: _native.Segment) -> None:
    """After everything ephemeral has gone; ephemeral ones never do."""
    cache = filled(segment, "cache", False, 10000)
    segment.set_limits(SMALL_BYTES, 2 * SMALL_BYTES)
    segment.shrink(0)
    swap = segment.client("swap").new_pool(persistent=True)
    stored = 0
    while swap.put(oid(1), stored, page("random", stored)):
        stored += 1
    assert cache.statistics()["pages"] == 0
    assert 2 * SMALL_BYTES - (2 << 20) < segment.statistics()["used_bytes"] <= 2 * SMALL_BYTES
    assert cache.put(oid(1), 0, page("random", 1)) == 0
    segment.set_limits(SMALL_BYTES, 3 * SMALL_BYTES)
    assert swap.put(oid(1), stored, page("random", stored)) == 1
    assert cache.put(oid(1), 0, page("random", 1)) == 0
    assert segment.check() == []


def test_a_floor_holds_the_limit_and_raises_it(segment: _native.Segment) -> None:
    floor = 24 << 20
    segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    client = segment.client("promised")
    with pytest.raises(PoolError, match="promised"):
        client.floor_bytes = floor
    segment.set_limits(SMALL_BYTES, MEMORY_BYTES)  # there is memory, the manager says
    client.floor_bytes = floor
    limit = segment.set_limits(SMALL_BYTES, SMALL_BYTES)
    assert limit > floor
    filled(segment, "cache", False, 20000)
    segment.shrink(0)
    assert backed(segment) <= limit
    pool = client.new_pool(persistent=True)
    for index in range(floor // 4160):
        assert pool.put(oid(1), index, page("random", index)) == 1
    client.floor_bytes = 0


@pytest.mark.parametrize("persistent", [True, False])
def test_compaction_after_freeing_at_random(segment: _native.Segment, persistent: bool) -> None:
    """Nine tenths flushed: what is left takes little more than its tenth, and every page is there."""
    pool = filled(segment, "one", persistent, 12000, "text")
    full = segment.statistics()["used_bytes"]
    order = list(range(12000))
    random.Random(1).shuffle(order)
    for index in order[1200:]:
        pool.flush(oid(1), index)
    holes = segment.statistics()["hole_bytes"]
    freed = segment.compact(8, 10**9)
    segment.trim(0)
    assert freed > holes * 8 // 10
    now = segment.statistics()
    assert now["compacted_bytes"] == freed
    assert segment.occupied == (now["used_bytes"], now["reserve_bytes"], now["hole_bytes"])
    metadata = segment.statistics()["metadata_bytes"]
    assert backed(segment) - metadata < (full - metadata) // 5
    for index in order[:1200]:
        buffer = bytearray(PAGE_SIZE)
        assert pool.get(oid(1), index, buffer) == 1
        assert buffer == page("text", index)
    assert segment.compact(8, 10**9) == 0


def test_compaction_keeps_to_its_time(segment: _native.Segment) -> None:
    pool = filled(segment, "one", True, 12000)
    for index in range(12000):
        if index % 10:
            pool.flush(oid(1), index)
    assert segment.compact(8, 0) == 0
    slices = [segment.compact(8, 2_000_000) for _ in range(1000)]
    assert sum(map(bool, slices)) > 1  # each goes on where the last one ended
    assert sum(slices) > 20 << 20
    assert segment.compact(8, 10**9) == 0


def test_sizes_out_of_range_are_those_of_the_segment(segment: _native.Segment) -> None:
    most = segment.limits[0]
    assert segment.set_limits(1 << 60, 0) == most
    assert segment.limits == (most, most)
    least = segment.set_limits(0, 0)
    assert (4 << 20) < least < SMALL_BYTES // 2 + (4 << 20)
    segment.size_within(0, 1 << 60)
    assert segment.size_range == (least, most)
    segment.size_within(1 << 60, 0)
    assert segment.size_range == (least, least)
    for bad in ((-1, 5), (5, -1), (1 << 70, 5)):
        with pytest.raises(OverflowError):
            segment.set_limits(*bad)


def test_a_cap_holds_while_pages_are_moved_into_larger_holes(directory: Path) -> None:
    """Whose put is refused makes room by moving pages, its own among them. One was once moved to where it
    takes more, and its client was above its cap."""

    class Machine(StoreMachine):
        memory_bytes = SMALL_BYTES
        parent = directory

    machine = Machine()  # it was found by it, and looks for it after each put
    try:
        machine.begin(at=0, kind="mixed", kept=0, exclusive=0, persistent=1600)
        machine.set_cap(at=0, cap=3 << 20, who=0)
        machine.put(at=0, first=0, keep=True, kind="mixed", n=1, o=oid(0), pool=2, seed=23)
        machine.put_over(at=0, keep=False, kind="mixed", n=1, pool=1, seed=27, which=22334)
        machine.compact(at=0, holes=1)
        machine.set_limits(at=0, beyond=0, chunks=0)
        machine.flush(at=0, first=0, n=1, o=oid(0), pool=2)
        machine.put(at=0, first=0, keep=False, kind="mixed", n=1, o=oid(0), pool=1, seed=0)
        before = machine.segment.statistics()["relocated_pages"]
        machine.put_many(at=0, keep=False, kind="mixed", n=915, o=oid(0), pool=0, seed=0)
        assert machine.segment.statistics()["relocated_pages"] > before
    finally:
        machine.teardown()
