"""Conformance tests of docs/semantics.md: 9, limits, and 13, codecs. See `test_conformance`.

Of 9, versions, page sizes and reserved bits are fields of save files here (`test_savefile`), and of the
segment's header (`test_segment_file`): creating a pool has no such arguments.
"""

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import MAX_INDEX, OID_SIZE, PAGE_SIZE

from . import operations as op
from .operations import Where
from .operations import page_at as get
from .pages import NEAR_FIRST, NEAR_SPAN, oid, page, pages

OBJECT = oid(1)
RAW_BYTES = 4160


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
