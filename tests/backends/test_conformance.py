"""The minimum set of conformance tests of docs/semantics.md, by its numbers.

9 and 13 are in `test_conformance_limits`, 10 and 12 in `test_conformance_control`; the weights of 8 in
`test_weights`; 11, death in the middle, in `test_kill_python` and the crash harness; 14, counters, in
`test_state`; 15, concurrency, in `test_processes`; 16, swap, in ``tests/nbd/test_swap.py``.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import MAX_INDEX, PAGE_SIZE

from .model import check_identities, indexes
from .operations import page_at as get
from .pages import KINDS, oid, page, pages

OBJECT = oid(1)
RAW_BYTES = 4160
CHUNK = 65536
UUID = b"conformance test"


@pytest.mark.parametrize(
    ("persistent", "exclusive", "second"),
    [(False, None, False), (False, False, True), (True, None, True), (True, True, False)],
)
def test_1_each_pool_type(
    small: _native.Segment, persistent: bool, exclusive: bool | None, second: bool
) -> None:
    pool = small.client("a").new_pool(persistent, exclusive)
    assert get(pool, 0) is None
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    assert get(pool, 0) == page("text", 1)
    assert get(pool, 0) == (page("text", 1) if second else None)


def test_1_a_shared_pool(small: _native.Segment) -> None:
    """Ephemeral and shared: whoever gets a page, it stays for the others, and for who put it."""
    pools = []
    for name in ("a", "b"):
        small.client(name).authorise(UUID)
        pools.append(small.client(name).new_pool(persistent=False, uuid=UUID))
    assert [(pool.persistent, pool.exclusive, pool.uuid) for pool in pools] == [(False, False, UUID)] * 2
    assert pools[0].put(OBJECT, 0, page("text", 1)) == 1
    assert [get(pool, 0) for pool in (*pools, *pools)] == [page("text", 1)] * 4
    assert pools[1].put(OBJECT, 0, page("text", 2)) == 1
    assert [get(pool, 0) for pool in pools] == [page("text", 2)] * 2
    assert pools[0].flush(OBJECT, 0) == 1
    assert [get(pool, 0) for pool in pools] == [None] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_1_hits_change_the_order_of_eviction(small: _native.Segment, shared: bool) -> None:
    """Of the oldest pages those that were got since stay, and those beside them go."""
    client = small.client("a")
    client.authorise(UUID)
    pool = client.new_pool(persistent=False, exclusive=False, uuid=UUID if shared else None)
    pool.put(OBJECT, 0, b"".join(pages("random", 0, 1200)))
    for index in range(0, 400, 4):
        assert get(pool, index) is not None
    pool.put(oid(2), 0, b"".join(pages("random", 2000, 500)))
    left = {index for first, n in pool.present(OBJECT, 0, 400) for index in range(first, first + n)}
    hot = {index for index in left if index % 4 == 0}
    assert len(hot) >= 90
    assert len(left - hot) <= 200


@pytest.mark.parametrize("kind", [(True, None), (True, True), (False, None), (False, False)])
def test_2_the_second_put_counts(small: _native.Segment, kind: tuple[bool, bool | None]) -> None:
    """All kinds of pages over all others."""
    pool = small.client("a").new_pool(*kind)
    for old, new in ((old, new) for old in KINDS for new in KINDS):
        assert pool.put(OBJECT, 7, page(old, 1)) == 1
        assert pool.put(OBJECT, 7, page(new, 2)) == 1
        assert get(pool, 7) == page(new, 2)
    check_identities(pool.statistics())


def no_space(pool: _native.Pool) -> None:
    """Fill the memory with pages of other objects, in all sizes."""
    filler = pool.client.new_pool(persistent=True)
    for number, kind in enumerate(("random", "near", "text", "tail", "sparse")):
        filler.put(oid(50 + number), 0, b"".join(pages(kind, 0, 3000)))


def over_cap(pool: _native.Pool) -> None:
    pool.client.cap_bytes = 1


def frozen(pool: _native.Pool) -> None:
    pool.client.mode = "frozen"


def switched_off(pool: _native.Pool) -> None:
    pool.client.mode = "off"


def handed_over(pool: _native.Pool) -> None:
    pool.client.handoff("copy")
    pool.client.handoff("freeze")


@pytest.mark.parametrize("reason", [no_space, over_cap, frozen, switched_off, handed_over])
@pytest.mark.parametrize("new", ["random", "text", "near", "zero"])
@pytest.mark.parametrize("old", ["text", "sparse", "zero"])
@pytest.mark.parametrize("persistent", [True, False])
def test_3_put_refused_over_an_old_page(
    small: _native.Segment, reason: Callable[[_native.Pool], None], new: str, old: str, persistent: bool
) -> None:
    """Never the old page: the new one if it was accepted after all, else a miss. Also in an ephemeral pool,
    and of incompressible pages over those that compressed well."""
    pool = small.client("a").new_pool(persistent, exclusive=False)
    assert pool.put(OBJECT, 0, b"".join(pages(old, 0, 40))) == 40
    reason(pool)
    refused = 0
    for index in range(40):
        stored = pool.put(OBJECT, index, page(new, 500 + index))
        refused += not stored
        assert get(pool, index) == (page(new, 500 + index) if stored else None)
    always = reason in (frozen, switched_off, handed_over) or (reason is over_cap and new != "zero")
    assert refused == 40 if always else refused < 40 if new == "zero" else True
    if reason is no_space and new == "random":
        assert refused > 0
    if reason is handed_over:
        pool.client.handoff("end")
    pool.client.mode, pool.client.cap_bytes = "on", 0
    assert pool.statistics()["pages"] == 40 - refused


def test_3_a_bad_buffer_is_no_put(small: _native.Segment) -> None:
    """In Xen a put found out half-way that the client's address was bad, and flushed the handle (-EFAULT).

    Here a buffer is checked before anything begins: what cannot be a page raises, so the caller knows that
    there was no put; nothing is counted, C1 is not concerned, and the old page is the current one.
    """
    pool = small.client("a").new_pool(persistent=True)
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    good = page("random", 2)
    for error, arguments in (
        (ValueError, (OBJECT, 0, good[:-1])),
        (ValueError, (OBJECT, 0, good + b"1")),
        (ValueError, (OBJECT[:-1], 0, good)),
        (ValueError, (OBJECT + b"1", 0, good)),
        (ValueError, (bytearray(OBJECT), 0, good)),
        (ValueError, (OBJECT, 2**32, good)),
        (ValueError, (OBJECT, MAX_INDEX, good + good)),
        (OverflowError, (OBJECT, -1, good)),
        (OverflowError, (OBJECT, 2**64, good)),
        (TypeError, (OBJECT, "0", good)),
        (TypeError, (OBJECT, 0, "text")),
        (TypeError, (OBJECT, 0, None)),
        (TypeError, (OBJECT, 0)),
        (TypeError, (OBJECT, 0, good, False, 1)),
    ):
        with pytest.raises(error):
            pool.put(*arguments)
    with pytest.raises(TypeError):
        pool.put(OBJECT, 0, good, keep=True)  # type: ignore[call-arg]
    with pytest.raises(BufferError):
        pool.put(OBJECT, 0, memoryview(good + good)[::2])
    assert get(pool, 0) == page("text", 1)
    assert pool.statistics()["puts"] == 1


def test_4_a_miss_stays_a_miss(small: _native.Segment) -> None:
    pool = small.client("a").new_pool(persistent=False, exclusive=False)
    pool.put(OBJECT, 0, b"".join(pages("random", 0, 1000)))
    small.evict(20 * 65536)
    missing = {index for index in range(1000) if get(pool, index) is None}
    assert 0 < len(missing) < 1000
    pool.put(oid(2), 0, b"".join(pages("random", 2000, 500)))
    small.populate(1 << 40)
    small.trim(0)
    assert missing <= {index for index in range(1000) if get(pool, index) is None}


@pytest.mark.parametrize("edge", [16, 64, 512, 1024, 4096, 2**19, 2**20, 2**29, 2**31])
@pytest.mark.parametrize("side", ["below", "above", "both"])
def test_5_ranges_over_the_edges_of_the_index(small: _native.Segment, edge: int, side: str) -> None:
    """Ranges that begin or end where the index has nothing, on either side of where it changes its shape."""
    pool = small.client("a").new_pool(persistent=True)
    below = range(edge - 2, edge) if side != "above" else range(0)
    above = range(edge, edge + 2) if side != "below" else range(0)
    there = [*below, *above]
    for index in there:
        assert pool.put(OBJECT, index, page("text", index)) == 1
    run = [(there[0], len(there))]
    for margin in (2, 3, 15, 1000, edge):
        first = max(edge - margin, 0)
        assert pool.present(OBJECT, first, edge + margin - first) == run
    assert pool.present(OBJECT, 0, 2**32) == run
    for first, npages in ((edge - 1, 2), (max(edge - 1500, 0), 3000), (0, 2**32)):
        hit = [index for index in there if first <= index < first + npages]
        assert pool.flush(OBJECT, first, npages) == len(hit)
        assert pool.flush(OBJECT, first, npages) == 0
        for index in hit:
            assert pool.put(OBJECT, index, page("text", index)) == 1
    assert pool.flush_object(OBJECT) == len(there)
    assert pool.flush_object(OBJECT) == 0


def copying(pool: _native.Pool) -> None:
    pool.client.handoff("copy")


@pytest.mark.parametrize(
    "state",
    [no_space, over_cap, frozen, switched_off, copying, handed_over],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("persistent", [True, False])
def test_5_flushes_work_in_every_state(
    small: _native.Segment, state: Callable[[_native.Pool], None], persistent: bool
) -> None:
    """And are idempotent, and leave siblings alone. Once a client has departed nothing of it is here."""
    pool = small.client("a").new_pool(persistent, exclusive=False)
    sibling = small.client("a").new_pool(persistent, exclusive=False)
    data = pages("word32", 1, 30)  # these take no memory, so none is evicted
    for each in (pool, sibling):
        for number in range(3):
            assert each.put(oid(number), 0, b"".join(data)) == 30
    state(pool)
    there = persistent or state is not switched_off
    assert [pool.flush(oid(0), 5) for _ in range(3)] == [int(there), 0, 0]
    assert [pool.flush(oid(0), 0, 30) for _ in range(2)] == [29 * there, 0]
    assert [pool.flush_object(oid(1)) for _ in range(2)] == [30 * there, 0]
    assert pool.flush_object(oid(77)) == 0
    assert [pool.present(oid(number), 0, 2**32) for number in (0, 1)] == [[], []]
    if there:
        assert pool.present(oid(2), 0, 2**32) == [(0, 30)]
        assert all(sibling.present(oid(number), 0, 2**32) == [(0, 30)] for number in range(3))
    if state is handed_over:
        pool.client.handoff("depart")
        for call in (lambda: pool.flush(oid(2), 0), lambda: pool.flush_object(oid(2)), lambda: get(pool, 0)):
            with pytest.raises(PoolError, match="handed over"):
                call()


@pytest.mark.parametrize("hits", [0, 1, 3])
@pytest.mark.parametrize("memory_mib", [8, 64])
@pytest.mark.parametrize("kind", ["random", "text"])
def test_6_persistent_puts_drain_ephemeral_pages(
    directory: Path, kind: str, hits: int, memory_mib: int
) -> None:
    """However often these were got: none is left when a persistent put is refused, and none of those lost."""
    segment = _native.create(str(directory / "segment"), memory_mib << 20)
    ephemeral = segment.client("mount").new_pool(persistent=False, exclusive=False)
    persistent = segment.client("guest").new_pool(persistent=True)
    block, buffer = pages(kind, 0, 64), bytearray(64 * PAGE_SIZE)
    npages = memory_mib * (256 if kind == "random" else 800)
    for first in range(0, npages, 64):
        assert ephemeral.put(OBJECT, first, b"".join(block)) == 64
    for first in range(0, npages * hits, 64):
        ephemeral.get(OBJECT, first % npages, buffer)
    assert ephemeral.statistics()["evictions"] > 0
    data = pages("random", 500, 64)
    index = 0
    while persistent.put(OBJECT, index, data[index % 64]):
        index += 1
    assert ephemeral.statistics()["pages"] == 0, f"refused after {index} pages"
    s = segment.statistics()
    assert s["chunks_free"] <= 8
    assert index > 0.9 * (s["chunks_total"] - s["chunks_free"]) * (CHUNK // RAW_BYTES)
    for i in range(index):
        assert get(persistent, i) == data[i % 64]
    assert persistent.statistics()["evictions"] == 0
    assert segment.check() == []
    segment.close()


def test_6_a_cap_drains_the_clients_own_ephemeral_pages(small: _native.Segment) -> None:
    client, other = small.client("a"), small.client("b").new_pool(persistent=False)
    persistent, ephemeral = (
        client.new_pool(persistent=True),
        client.new_pool(persistent=False, exclusive=False),
    )
    assert other.put(OBJECT, 0, b"".join(pages("text", 0, 50))) == 50
    client.cap_bytes = 200 * RAW_BYTES
    for _ in range(3):
        assert ephemeral.put(OBJECT, 0, b"".join(pages("random", 0, 400))) == 400
        assert ephemeral.get(OBJECT, 300, bytearray(PAGE_SIZE)) <= 1
        assert client.statistics()["used_bytes"] <= client.cap_bytes
    assert persistent.put(OBJECT, 0, b"".join(pages("random", 1000, 300)), keep_old=True) == 200
    assert (ephemeral.statistics()["pages"], other.statistics()["pages"]) == (0, 50)


def test_7_a_client_at_its_cap(small: _native.Segment) -> None:
    """Refused while free memory exists; a flush gives the credit back; other clients do not notice."""
    client, other = small.client("a"), small.client("b").new_pool(persistent=True)
    pool = client.new_pool(persistent=True)
    client.cap_bytes = 100 * RAW_BYTES
    assert client.cap_bytes == 100 * RAW_BYTES
    assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 150)), keep_old=True) == 100
    assert client.statistics()["used_bytes"] == client.cap_bytes
    assert pool.put(OBJECT, 500, page("random", 1)) == 0
    assert pool.put(OBJECT, 50, page("random", 777)) == 1
    assert pool.put(OBJECT, 500, page("zero", 0)) == 1
    assert other.put(OBJECT, 0, b"".join(pages("random", 0, 300))) == 300
    assert pool.flush(OBJECT, 10, 30) == 30
    assert pool.put(OBJECT, 600, b"".join(pages("random", 0, 50)), keep_old=True) == 30
    client.cap_bytes = 0
    assert pool.put(OBJECT, 700, b"".join(pages("random", 0, 50)), keep_old=True) == 50


@pytest.mark.parametrize("hits", [0, 3])
def test_6_eviction_until_none_are_left(directory: Path, hits: int) -> None:
    segment = _native.create(str(directory / "segment"), 16 << 20)
    pool = segment.client("a").new_pool(persistent=False, exclusive=False)
    pool.put(OBJECT, 0, b"".join(pages("random", 0, 3000)))
    for _ in range(hits):
        for first in range(0, 3000, 100):
            pool.get(OBJECT, first, bytearray(100 * PAGE_SIZE))
    freeable = segment.freeable_bytes()
    segment.evict(1 << 40)
    assert pool.statistics()["pages"] == 0
    assert segment.freeable_bytes() == freeable
    assert segment.check() == []
    segment.close()


# 8: eviction order (weights: `test_weights`)


def test_8_the_oldest_pages_of_an_exclusive_pool_go_first(small: _native.Segment) -> None:
    """First in, first out, by the chunk: what goes together was put together."""
    pool = small.client("a").new_pool(persistent=False)
    assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 1000))) == 1000
    for _ in range(7):
        small.evict(3 * CHUNK)
        runs = pool.present(OBJECT, 0, 1000)
        assert len(runs) == 1
        assert sum(runs[0]) == 1000, "a younger page went before an older one"
        assert runs[0][0] > 0
    first = runs[0][0]
    assert get(pool, first) == page("random", first)
    assert pool.put(OBJECT, first, page("random", first)) == 1
    small.evict(8 * CHUNK)
    assert indexes(pool.present(OBJECT, 0, 1000)) > set(range(first + 200, 1000))


def test_8_pages_that_are_got_stay_in_a_pool_that_keeps_them(small: _native.Segment) -> None:
    """Those of a working set survive a scan of pages that nobody wants again."""
    pool = small.client("a").new_pool(persistent=False, exclusive=False)
    assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 300))) == 300
    buffer = bytearray(300 * PAGE_SIZE)
    for first in range(0, 20_000, 100):
        pool.put(oid(2), first, b"".join(pages("random", 0, 100)))
        pool.get(OBJECT, 0, buffer)
    assert len(indexes(pool.present(OBJECT, 0, 300))) > 200
    assert pool.statistics()["evictions"] > 15_000
