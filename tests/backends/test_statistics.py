"""What is counted: each statistic by an example of which the number is known.

That counters add up and agree with the model after whatever happened is `sums` and the state machine.
"""

import bisect
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.statistics import (
    BUCKETS_NS,
    ClientStatistics,
    PoolStatistics,
    SegmentStatistics,
    Timing,
)
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from .operations import fill, page_at
from .pages import oid, page, pages
from .sums import CHUNK, check_sums

OBJECT = oid(1)
UUID = b"statistics' pool"


def of_pool(pool: _native.Pool) -> PoolStatistics:
    return PoolStatistics.from_dict(pool.statistics())


def of_client(client: _native.Client) -> ClientStatistics:
    return ClientStatistics.from_dict(client.statistics())


def of(segment: _native.Segment) -> SegmentStatistics:
    return SegmentStatistics.from_dict(segment.statistics())


def test_puts_gets_and_flushes(persistent: _native.Pool) -> None:
    assert persistent.put(OBJECT, 0, b"".join(pages("text", 0, 10))) == 10
    assert persistent.put(OBJECT, 5, b"".join(pages("random", 0, 10))) == 10
    persistent.client.mode = "frozen"
    assert persistent.put(OBJECT, 13, b"".join(pages("text", 0, 4))) == 0
    assert persistent.put(OBJECT, 0, b"".join(pages("text", 0, 4)), keep_old=True) == 0
    assert persistent.get(OBJECT, 0, bytearray(20 * PAGE_SIZE)) == 13
    assert page_at(persistent, 100) is None
    assert persistent.flush(OBJECT, 10, 10) == 3
    assert persistent.flush_object(OBJECT) == 10
    assert persistent.flush_object(OBJECT) == 0
    s = of_pool(persistent)
    assert (s.puts, s.puts_stored, s.puts_replaced, s.puts_refused, s.puts_flushed) == (25, 20, 5, 3, 2)
    assert (s.gets, s.gets_hit, s.gets_taken) == (15, 13, 0)
    assert (s.flushes, s.flushes_found, s.object_flushes, s.object_flushes_found) == (10, 13, 2, 1)
    assert (s.pages, s.pages_max, s.evictions, s.corrupt_pages, s.pages_dropped) == (0, 15, 0, 0, 0)


def test_kinds_of_pages_and_their_memory(client: _native.Client, persistent: _native.Pool) -> None:
    data = [*pages("text", 0, 3), *pages("random", 0, 5), *pages("word32", 0, 7)]
    assert persistent.put(OBJECT, 0, b"".join(data)) == 15
    s, c = of_pool(persistent), of_client(client)
    assert (s.pages, s.compressed_pages, s.raw_pages, s.fill_pages) == (15, 3, 5, 7)
    assert (c.compressed_pages, c.raw_pages, c.persistent_pages) == (3, 5, 15)
    assert s.bytes == c.used_bytes == c.compressed_bytes + 5 * 4160
    assert 3 * 1365 < c.compressed_bytes < 3 * 1600
    assert (c.ephemeral_bytes, c.ephemeral_pages) == (0, 0)


def test_objects_leaves_and_nodes(small: _native.Segment, persistent: _native.Pool) -> None:
    """A leaf for indexes to 15, to 63, to 511, for each 512 to 4095; two nodes more for what lies beyond."""
    expected = 0
    for number, (index, more) in enumerate(
        ((0, 1), (15, 0), (16, 1), (64, 1), (511, 0), (512, 1), (4096, 3))
    ):
        assert persistent.put(OBJECT, index, page("zero", 0)) == 1
        expected += more
        s = of_pool(persistent)
        assert (s.objects, s.nodes, s.pages) == (1, expected, number + 1)
    for number in range(2, 12):
        assert persistent.put(oid(number), 3, page("zero", 0)) == 1
    s = of_pool(persistent)
    assert (s.objects, s.objects_max, s.nodes, s.nodes_max) == (11, 11, expected + 10, expected + 10)
    assert (of(small).objects, of(small).nodes) == (11, expected + 10)
    for number in range(2, 12):
        persistent.flush_object(oid(number))
    assert of_pool(persistent).objects_max == 11
    persistent.destroy()
    small.reap()
    total = of(small)
    assert (total.objects, total.nodes) == (0, 0)
    assert (total.objects_max, total.nodes_max) == (11, expected + 10)


def test_the_most_that_there_were(small: _native.Segment, client: _native.Client, kept: _native.Pool) -> None:
    assert kept.put(OBJECT, 0, b"".join(pages("text", 0, 300))) == 300
    kept.flush(OBJECT, 0, 250)
    assert kept.put(OBJECT, 400, b"".join(pages("text", 0, 20))) == 20
    assert (of_pool(kept).pages, of_pool(kept).pages_max) == (70, 300)
    assert (of_client(client).ephemeral_pages, of_client(client).ephemeral_pages_max) == (70, 300)
    kept.destroy()
    assert of_client(client).ephemeral_pages_max == 300
    # Of the whole segment they are looked at now and then: the 20 single puts of a look are the bound.
    assert of(small).pages_max <= 300


def test_maxima_of_the_segment_are_looked_at(small: _native.Segment, kept: _native.Pool) -> None:
    for first in range(0, 600, 2):
        assert kept.put(OBJECT, first, b"".join(pages("word32", 0, 2))) == 2
    kept.flush_object(OBJECT)
    for _ in range(600):
        kept.flush(OBJECT, 0)
    s = of(small)
    assert 600 - 2 * 256 <= s.pages_max <= 600
    assert 600 - 2 * 256 <= s.ephemeral_pages_max <= 600
    assert s.ephemeral_pages == 0


def test_operations_live_on_when_their_pool_is_gone(small: _native.Segment, client: _native.Client) -> None:
    pools = [client.new_pool(persistent) for persistent in (True, False)]
    before = of(small)
    for pool in pools:
        assert pool.put(OBJECT, 0, b"".join(pages("text", 0, 10))) == 10
        assert pool.put(OBJECT, 0, b"".join(pages("text", 5, 3))) == 3
        assert pool.get(OBJECT, 0, bytearray(20 * PAGE_SIZE)) == 10
        pool.flush(OBJECT, 0, 5)
        pool.flush_object(OBJECT)
    for _ in range(2):
        s, c = of(small), of_client(client)
        assert s.operations - before.operations == 2 * (10 + 3 + 11 + 5 + 1)
        assert s.ephemeral_puts_new - before.ephemeral_puts_new == 10
        assert (c.persistent_puts_stored, c.persistent_gets_hit, c.ephemeral_gets_hit) == (13, 10, 10)
        for pool in client.pools():
            pool.destroy()


def test_gets_from_a_shared_pool_count_for_the_getter(small: _native.Segment) -> None:
    pools = []
    for name in ("owner", "other"):
        small.client(name).authorise(UUID)
        pools.append(small.client(name).new_pool(persistent=False, uuid=UUID))
    assert pools[1].put(OBJECT, 0, b"".join(pages("text", 0, 10))) == 10
    assert pools[1].get(OBJECT, 0, bytearray(7 * PAGE_SIZE)) == 7
    assert pools[0].get(OBJECT, 0, bytearray(2 * PAGE_SIZE)) == 2
    owner, other = of_client(pools[0].client), of_client(pools[1].client)
    assert (owner.ephemeral_gets_hit, other.ephemeral_gets_hit) == (2, 7)
    assert (owner.ephemeral_pages, other.ephemeral_pages) == (10, 0)
    assert (owner.authorised_pools, owner.pools) == (1, 1)
    for pool in pools:
        s = of_pool(pool)
        assert (s.shared, s.puts, s.gets, s.gets_hit, s.pages) == (True, 10, 9, 9, 10)
    check_sums(small)


def test_errors_are_counted(small: _native.Segment, client: _native.Client) -> None:
    pool = client.new_pool(persistent=True)
    before = of(small).failed_operations
    pool.destroy()
    for call in (
        lambda: pool.put(OBJECT, 0, page("zero", 0)),
        lambda: page_at(pool, 0),
        lambda: pool.flush(OBJECT, 0),
    ):
        with pytest.raises(PoolError):
            call()
    assert of(small).failed_operations == before + 3


def test_memory_that_was_not_found(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool
) -> None:
    assert of(small).allocation_failures == 0
    fill(persistent)
    s, c = of(small), of_client(client)
    assert s.allocation_failures > 0
    assert c.allocation_failures == 1
    client.cap_bytes = 1
    for index in range(5):
        assert persistent.put(oid(2), index, page("random", 1)) == 0
    assert of_client(client).allocation_failures == 6
    client.mode = "frozen"
    assert persistent.put(oid(2), 0, page("random", 1)) == 0
    assert of_client(client).allocation_failures == 6


def test_evictions_trims_and_chunks(small: _native.Segment, kept: _native.Pool) -> None:
    begin = of(small)
    assert begin.chunks_used + begin.chunks_free == begin.chunks_total
    assert kept.put(OBJECT, 0, b"".join(pages("random", 0, 3000))) == 3000
    s = of(small)
    assert s.evicted_pages == of_pool(kept).evictions == 3000 - s.ephemeral_pages > 0
    assert s.eviction_attempts >= s.evicted_pages // (CHUNK // 4160)
    assert s.evictions_per_request_max >= 1
    assert s.chunks_used_max >= s.chunks_used > begin.chunks_used
    assert s.used_bytes - begin.used_bytes == (s.chunks_used - begin.chunks_used) * CHUNK
    small.evict(1 << 40)
    s = of(small)
    assert (s.evicted_pages, s.ephemeral_pages) == (3000, 0)
    before, file = of(small), Path(small.path)
    backed = file.stat().st_blocks * 512
    returned = small.trim(0)
    s = of(small)
    assert (s.trims, s.trimmed_bytes) == (before.trims + 1, before.trimmed_bytes + returned)
    assert returned == before.reserve_bytes >= backed - file.stat().st_blocks * 512
    assert s.reserve_bytes == 0


def test_pages_that_are_moved_together(small: _native.Segment, client: _native.Client) -> None:
    """Before a put is refused, half-empty chunks of persistent pages are made full ones."""
    pool = client.new_pool(persistent=True)
    npages = fill(pool, "text")
    assert of(small).relocated_pages == 0
    for index in range(npages):
        if index % 4:
            pool.flush(oid(900), index)
    stored = pool.put(oid(2), 0, b"".join(pages("random", 0, 1000)), keep_old=True)
    assert of(small).relocated_pages > 0
    assert stored * 4160 > 0.6 * npages * 1408 * 3 / 4
    for index in range(0, npages, 4):
        assert page_at(pool, index, oid(900)) == page("text", 10_000 + index)


def bucket_of(ns: int) -> int:
    """The bucket that a time belongs to."""
    return bisect.bisect_left(BUCKETS_NS, ns)


def test_quantiles_of_a_histogram() -> None:
    """Within the bucket in which so many samples have been counted, by proportion."""
    nothing = (0,) * (len(BUCKETS_NS) + 1)
    assert Timing(0, 0, 0, 0, nothing).quantile_ns(0.5) is None
    buckets = [*nothing]
    buckets[3], buckets[5] = 90, 10  # up to 1024, up to 4096 ns
    some = Timing(100, 0, 600, 4000, tuple(buckets))
    assert some.quantile_ns(0.45) == 512 + 512 * 0.5
    assert some.quantile_ns(0.9) == 1024
    assert some.quantile_ns(0.95) == 2048 + 2048 * 0.5
    assert some.quantile_ns(1) == 4096
    slow = Timing(1, 5 << 30, 5 << 30, 5 << 30, (*nothing[1:], 1))
    assert slow.quantile_ns(1) == 5 << 30
    assert some.since(some).quantile_ns(0.5) is None
    assert some.since(Timing(0, 0, 0, 0, nothing)) == some


def test_timing(small: _native.Segment, client: _native.Client, persistent: _native.Pool) -> None:
    """Every 64th operation of a thread is measured: so many samples, each no longer than all of it took."""
    names = ["put_stored", "put_refused", "get_hit", "get_missed", "flush", "flush_object"]
    assert set(small.timing()) == {*names, "compress", "decompress", "expand"}
    before = {name: Timing(*value) for name, value in small.timing().items()}
    busy = of_client(client).busy_ns
    for index in range(6400):
        persistent.put(OBJECT, index % 500, page("text", index % 100))
        page_at(persistent, index % 500)
        page_at(persistent, 1000 + index % 500)
        persistent.flush(OBJECT, 2000)
        persistent.flush_object(oid(5))
    after = {name: Timing(*value) for name, value in small.timing().items()}
    counted = {name: after[name].samples - before[name].samples for name in after}
    assert 490 <= sum(counted[name] for name in names) <= 510
    assert all(counted[name] > 0 for name in names if name != "put_refused")
    assert counted["compress"] > 0
    for timing in after.values():
        if timing.samples:
            assert 0 < timing.least_ns <= timing.total_ns / timing.samples <= timing.most_ns
        # A snapshot beside nobody: each sample is in one bucket, and the extremes are in the outermost ones.
        assert sum(timing.buckets) == timing.samples
        assert len(timing.buckets) == len(BUCKETS_NS) + 1
        if timing.samples:
            assert bucket_of(timing.least_ns) == next(i for i, n in enumerate(timing.buckets) if n)
            assert bucket_of(timing.most_ns) == max(i for i, n in enumerate(timing.buckets) if n)
            median = timing.quantile_ns(0.5)
            assert median is not None
            assert timing.least_ns / 2 <= median <= timing.most_ns * 2
    assert of_client(client).busy_ns > busy
    client.mode = "frozen"
    for _ in range(640):
        persistent.put(OBJECT, 0, page("text", 1))
    assert small.timing()["put_refused"][0] == counted["put_refused"] + before["put_refused"].samples + 10


def test_timing_of_a_client(small: _native.Segment, client: _native.Client, persistent: _native.Pool) -> None:
    """All that is timed of the segment is somebody's, and who comes under a former number begins anew."""
    other = small.client("other")
    theirs = other.new_pool(persistent=False, exclusive=False)
    for index in range(640):
        persistent.put(OBJECT, index % 100, page("text", index % 100))
        theirs.put(OBJECT, index % 100, page("text", index % 100))
        page_at(persistent, index % 100)
        page_at(theirs, 1000)
        page_at(theirs, index % 100)
    both = [{name: Timing(*value) for name, value in one.timing().items()} for one in (client, other)]
    assert [*both[0]] == ["put_stored", "put_refused", "get_hit", "get_missed"]
    for name, value in small.timing().items():
        if name in both[0]:
            whole = Timing(*value)
            assert whole.samples == sum(one[name].samples for one in both)
            assert whole.total_ns == sum(one[name].total_ns for one in both)
            assert whole.buckets == tuple(map(sum, zip(*(one[name].buckets for one in both), strict=True)))
            assert whole.most_ns == max(one[name].most_ns for one in both)
    assert both[0]["get_missed"].samples == 0 < both[1]["get_missed"].samples
    number = other.id
    other.destroy()
    again = small.client("another")
    assert again.id == number
    assert set(again.timing().values()) == {(0, 0, 0, 0, (0,) * len(whole.buckets))}
    with pytest.raises(PoolError):
        other.timing()
