"""Ephemeral pages stay as they are while memory is in plenty, and are compressed before any has to go."""

import random

import pytest

from tmem.backends import _native

OID = bytes(_native.OID_SIZE)
RAW_BYTES = 4160


def page(number: int) -> bytes:
    """A page of which about half is left when it is compressed."""
    return random.Random(number).randbytes(1_900).ljust(_native.PAGE_SIZE, b"t")


def dense(number: int) -> bytes:
    return random.Random(number).randbytes(_native.PAGE_SIZE)


def put(pool: _native.Pool, first: int, npages: int) -> int:
    return sum(pool.put(OID, index, page(index)) for index in range(first, first + npages))


def there(pool: _native.Pool, npages: int) -> list[int]:
    """The pages that are there, each of them as it was put."""
    buffer = bytearray(_native.PAGE_SIZE)
    found = [index for index in range(npages) if pool.get(OID, index, buffer) and buffer == page(index)]
    assert len(found) == pool.statistics()["pages"]
    return found


def test_pages_stay_raw_while_half_of_the_memory_is_free(
    small: _native.Segment, persistent: _native.Pool, kept: _native.Pool
) -> None:
    assert (put(persistent, 0, 100), put(kept, 0, 1_500)) == (100, 1_500)
    assert persistent.statistics()["raw_pages"] == 0
    raw = kept.statistics()["raw_pages"]
    chunks = small.statistics()["chunks_total"]
    assert 0.3 < raw * RAW_BYTES / (chunks * 65_536) < 0.5
    assert there(kept, 1_500) == list(range(1_500))
    assert small.statistics()["squeezed_pages"] == 0


def test_a_full_segment_holds_as_many_pages_as_if_all_had_been_compressed(
    small: _native.Segment, client: _native.Client
) -> None:
    kept = {}
    for way in ("lz4", "auto"):
        client.compress = way
        pool = client.new_pool(persistent=False, exclusive=False)
        put(pool, 0, 2_500)
        assert pool.statistics()["evictions"] == 0, "before what is raw was compressed"
        put(pool, 2_500, 3_500)
        kept[way] = len(there(pool, 6_000))
        assert pool.statistics()["raw_pages"] == 0
        pool.destroy()
        small.reap()
    assert kept["auto"] >= 0.97 * kept["lz4"]
    counts = small.statistics()
    assert 600 < counts["squeezed_pages"] < 1_000
    # From 4160 to 1984 bytes, or where there are few chunks to somewhat more.
    assert 1_900 < counts["squeezed_bytes"] / counts["squeezed_pages"] < 2_200
    # Nobody else was at it: a pass in the background would be in `condensing_ns`.
    assert 200 < counts["squeezing_ns"] / counts["squeezed_pages"] < 10**7
    assert counts["condensing_ns"] == 0


def test_a_client_near_its_cap_compresses(client: _native.Client, kept: _native.Pool) -> None:
    client.cap_bytes = 300 * RAW_BYTES
    put(kept, 0, 145)
    assert kept.statistics()["raw_pages"] == 145
    put(kept, 145, 200)
    assert kept.statistics()["raw_pages"] <= 150
    put(kept, 345, 400)
    assert kept.statistics()["raw_pages"] == 0
    assert kept.statistics()["pages"] > 500


def test_what_swap_needs_it_gets_from_loose_pages(persistent: _native.Pool, kept: _native.Pool) -> None:
    put(kept, 0, 700)
    assert put(persistent, 0, 2_900) == 2_900
    assert there(persistent, 2_900) == list(range(2_900))


def test_pages_that_do_not_compress_are_evicted_as_others_are(
    small: _native.Segment, kept: _native.Pool
) -> None:
    for index in range(4_000):
        assert kept.put(OID, index, dense(index)) == 1
    assert small.statistics()["squeezed_pages"] == 0
    buffer = bytearray(_native.PAGE_SIZE)
    newest = [index for index in range(3_000, 4_000) if kept.get(OID, index, buffer)]
    assert len(newest) == 1_000


@pytest.mark.parametrize("way", ["lz4", "none"])
def test_who_says_how_is_obeyed(client: _native.Client, kept: _native.Pool, way: str) -> None:
    client.compress = way
    put(kept, 0, 50)
    assert kept.statistics()["raw_pages"] == (50 if way == "none" else 0)


def test_to_evict_is_not_to_compress(small: _native.Segment, kept: _native.Pool) -> None:
    """Who says so wants the memory now."""
    put(kept, 0, 300)
    small.evict(1 << 40)
    assert kept.statistics()["pages"] == small.statistics()["squeezed_pages"] == 0
