"""The minimum set of conformance tests of the specification's section 16, by its numbers: 1-7, 9 and 13.

15, concurrency, is `test_processes`; 11, death in the middle, `test_kill_python` and the crash harness; 14,
counters, holds after every step of the state machine. The others concern what does not exist yet.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import MAX_INDEX, OID_SIZE, PAGE_SIZE

from . import operations as op
from .operations import Where
from .pages import NEAR_FIRST, NEAR_SPAN, oid, page, pages

OBJECT = oid(1)
RAW_BYTES = 4160
CHUNK = 65536


def get(pool: _native.Pool, index: int, o: bytes = OBJECT) -> bytes | None:
    buffer = bytearray(PAGE_SIZE)
    return bytes(buffer) if pool.get(o, index, buffer) else None


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


def test_1_hits_change_the_order_of_eviction(small: _native.Segment) -> None:
    """Of the oldest pages those that were got since stay, and those beside them go."""
    pool = small.client("a").new_pool(persistent=False, exclusive=False)
    pool.put(OBJECT, 0, b"".join(pages("random", 0, 1200)))
    for index in range(0, 400, 4):
        assert get(pool, index) is not None
    pool.put(oid(2), 0, b"".join(pages("random", 2000, 500)))
    left = {index for first, n in pool.present(OBJECT, 0, 400) for index in range(first, first + n)}
    hot = {index for index in left if index % 4 == 0}
    assert len(hot) >= 90
    assert len(left - hot) <= 200


def no_space(pool: _native.Pool) -> None:
    """Fill the memory with pages of other objects, in all sizes."""
    for number, kind in enumerate(("random", "near", "text", "tail", "sparse")):
        pool.put(oid(50 + number), 0, b"".join(pages(kind, 0, 3000)))


def over_cap(pool: _native.Pool) -> None:
    pool.client.cap_bytes = 1


@pytest.mark.parametrize("shortage", [no_space, over_cap])
@pytest.mark.parametrize("new", ["random", "text", "near"])
@pytest.mark.parametrize("old", ["text", "sparse", "zero"])
def test_3_put_refused_over_an_old_page(
    small: _native.Segment, shortage: Callable[[_native.Pool], None], new: str, old: str
) -> None:
    """Never the old page: the new one if it was accepted after all, else a miss."""
    pool = small.client("a").new_pool(persistent=True)
    assert pool.put(OBJECT, 0, b"".join(pages(old, 0, 40))) == 40
    shortage(pool)
    refused = 0
    for index in range(40):
        stored = pool.put(OBJECT, index, page(new, 500 + index))
        refused += not stored
        assert get(pool, index) == (page(new, 500 + index) if stored else None)
    assert refused == 40 or (shortage is no_space and (refused > 0 or new == "text"))


def test_3_bad_arguments_change_nothing(small: _native.Segment) -> None:
    """Unlike a bad address in a hypercall, a wrong argument is an error of the program and no put."""
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
def test_eviction_until_none_are_left(directory: Path, hits: int) -> None:
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


# 9: limits


def test_9_pools(small: _native.Segment) -> None:
    client = small.client("a")
    pools = [client.new_pool(persistent=bool(i % 2)) for i in range(16)]
    assert [pool.id for pool in pools] == list(range(16))
    with pytest.raises(PoolError, match="16"):
        client.new_pool(persistent=True)
    pools[5].destroy()
    assert client.new_pool(persistent=True).id == 5
    assert [pool.id for pool in client.pools()] == list(range(16))
    assert client.pool(5).persistent
    for number in (16, 17, 2**31, 2**62):
        with pytest.raises(PoolError, match="no pool"):
            client.pool(number)
    with pytest.raises(OverflowError):
        client.pool(-1)
    assert small.client("b").new_pool(persistent=True).id == 0


def test_9_clients(small: _native.Segment) -> None:
    clients = [small.client(f"client {i}") for i in range(64)]
    assert sorted(c.id for c in clients) == list(range(64))
    with pytest.raises(PoolError, match="64"):
        small.client("one more")
    clients[7].destroy()
    assert small.client("one more").id == 7
    assert small.client("client 8") == clients[8]
    assert len(small.clients()) == 64


def test_9_names(small: _native.Segment) -> None:
    for name in ("x", "x" * 63, "ä" * 31, "a b/c\n"):
        assert small.client(name).name == name
    for name in ("", "x" * 64, "ä" * 32, "nul\0"):
        with pytest.raises(ValueError, match="63 bytes"):
            small.client(name)


def test_9_indexes(small: _native.Segment) -> None:
    pool = small.client("a").new_pool(persistent=True)
    edges = [0, 1, 15, 16, 63, 64, 511, 512, 1023, 1024, 4095, 4096, 4607, 4608, 2**19 - 1, 2**19]
    edges += [2**20 - 1, 2**20, 2**29 - 1, 2**29, 2**31 - 1, 2**31, MAX_INDEX - 1, MAX_INDEX]
    for index in edges:
        assert get(pool, index) is None
        assert pool.put(OBJECT, index, page("text", index)) == 1
    for index in edges:
        assert get(pool, index) == page("text", index)
    assert [i for first, n in pool.present(OBJECT, 0, 2**32) for i in range(first, first + n)] == edges
    assert pool.put(OBJECT, MAX_INDEX - 19, b"".join(pages("text", 0, 20))) == 20
    for call in (pool.flush, pool.present):
        with pytest.raises(ValueError, match="4294967295"):
            call(OBJECT, 1, 2**32)
    assert pool.flush(OBJECT, 0, 2**32) == len(edges) + 18


def test_9_all_bits_of_an_object_id_count(small: _native.Segment) -> None:
    pool = small.client("a").new_pool(persistent=True)
    every = [bytes(OID_SIZE), *((1 << bit).to_bytes(OID_SIZE, "little") for bit in range(8 * OID_SIZE))]
    for number, o in enumerate(every):
        assert pool.put(o, 3, page("text", number)) == 1
    for number, o in enumerate(every):
        assert get(pool, 3, o) == page("text", number)
    assert [pool.flush_object(o) for o in every] == [1] * len(every)


# 13: codecs


def test_13_same_filled_pages_take_no_memory(small: _native.Segment) -> None:
    client = small.client("a")
    pool = client.new_pool(persistent=True)
    words = [0, 1, 2**32 - 1, 2**31, 0xDEADBEEF]
    data = [word.to_bytes(4, "little") * 1024 for word in words]
    # As 64-bit words: those below 2**35 fit the slot.
    wide = [2**32, 2**35 - 1, 1, 0x500000005]
    data += [word.to_bytes(8, "little") * 512 for word in wide]
    for index, filled in enumerate(data):
        assert pool.put(OBJECT, index, filled) == 1
    assert client.statistics()["used_bytes"] == 0
    assert pool.statistics()["fill_pages"] == len(data)
    others = [2**35, 2**63, 2**64 - 2, 0x0123456789ABCDEF]
    for index, word in enumerate(others, len(data)):
        data.append(word.to_bytes(8, "little") * 512)
        assert pool.put(OBJECT, index, data[index]) == 1
    counters = pool.statistics()
    assert (counters["fill_pages"], counters["compressed_pages"]) == (len(words + wide), len(others))
    assert [get(pool, index) for index in range(len(data))] == data


def test_13_one_byte_makes_a_difference(small: _native.Segment) -> None:
    """A page is same-filled only if all of its bytes are."""
    pool = small.client("a").new_pool(persistent=True)
    for base in (bytes(PAGE_SIZE), b"\1\2\3\4" * 1024):
        for at in (0, 1, 7, 8, 9, 2047, 2048, 4087, 4088, 4095):
            data = bytearray(base)
            data[at] ^= 0x80
            assert pool.put(OBJECT, at, data) == 1
            assert get(pool, at) == bytes(data)
    assert pool.statistics()["fill_pages"] == 0


def test_13_raw_threshold(small: _native.Segment) -> None:
    """Pages whose compressed length goes through the raw threshold byte by byte."""
    client = small.client("a")
    pool = client.new_pool(persistent=True)
    raw = []
    for seed in range(NEAR_SPAN):
        assert pool.put(OBJECT, seed, page("near", seed)) == 1
        raw.append(pool.statistics()["raw_pages"])
        assert get(pool, seed) == page("near", seed)
    assert raw[0] == 0 < raw[-1], f"the threshold is not between {NEAR_FIRST} and {NEAR_FIRST + NEAR_SPAN}"
    first = raw.index(1)
    assert raw[first:] == list(range(1, NEAR_SPAN - first + 1))
    assert client.statistics()["used_bytes"] <= NEAR_SPAN * RAW_BYTES


@pytest.mark.parametrize("step", [1, 37])
def test_13_every_length(small: _native.Segment, step: int) -> None:
    """From nothing to a whole page of random bytes: all size classes, and no block overlaps another."""
    pool = small.client("a").new_pool(persistent=True)
    source = page("random", 5)
    lengths = range(0, PAGE_SIZE + 1, step)
    for round_ in range(0, len(lengths), 600):
        some = lengths[round_ : round_ + 600]
        data = [source[:length].ljust(PAGE_SIZE, b"\0") for length in some]
        assert pool.put(OBJECT, 0, b"".join(data)) == len(data)
        assert op.get(small, Where("a", pool.id), OBJECT, 0, len(data)) == data
