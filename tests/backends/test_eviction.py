"""Which ephemeral pages go: scans pass through, hits count once a page has been there for a while."""

import os
import random

import pytest

from tmem.backends import _native

OID = bytes(_native.OID_SIZE)
BLOCK_BYTES = 4160
ROOM = 600
"""Pages that the client may keep, in some 40 chunks; a tenth of them on probation."""


@pytest.fixture
def pool(client: _native.Client, kept: _native.Pool) -> _native.Pool:
    """A pool with room for ROOM pages."""
    client.compress = "none"
    client.cap_bytes = ROOM * BLOCK_BYTES
    return kept


def put(pool: _native.Pool, first: int, npages: int) -> None:
    for index in range(first, first + npages):
        assert pool.put(OID, index, os.urandom(4096)) == 1


def get(pool: _native.Pool, first: int, npages: int) -> None:
    buffer = bytearray(4096)
    for index in range(first, first + npages):
        pool.get(OID, index, buffer)


def there(pool: _native.Pool, first: int, npages: int) -> int:
    return sum(pages for _, pages in pool.present(OID, first, npages))


SCAN = 100_000
LATER = 200_000


def test_a_scan_leaves_pages_that_were_hit(pool: _native.Pool) -> None:
    put(pool, 0, 300)
    put(pool, LATER, 200)
    get(pool, 0, 300)
    put(pool, SCAN, 5 * ROOM)
    # Who waits for memory does not wait until every page was moved: some of a long row of hit pages go.
    assert there(pool, 0, 300) >= 255
    assert there(pool, LATER, 200) == 0


def test_a_hit_right_after_the_put_does_not_count(pool: _native.Pool) -> None:
    put(pool, SCAN, ROOM)
    for index in range(300):
        put(pool, index, 1)
        get(pool, index, 1)
    put(pool, SCAN, 3 * ROOM)
    assert there(pool, 0, 300) == 0


def test_a_page_that_comes_back_stays(pool: _native.Pool) -> None:
    put(pool, 0, 300)
    put(pool, SCAN, ROOM)
    assert there(pool, 0, 300) == 0
    put(pool, 0, 300)
    put(pool, SCAN + ROOM, 3 * ROOM)
    assert there(pool, 0, 300) >= 285


def test_a_page_that_comes_back_late_is_new(pool: _native.Pool) -> None:
    put(pool, 0, 300)
    put(pool, SCAN, 3 * ROOM)
    put(pool, 0, 300)
    put(pool, SCAN + 3 * ROOM, 3 * ROOM)
    assert there(pool, 0, 300) == 0


def test_a_page_that_is_put_again_keeps_its_place(pool: _native.Pool) -> None:
    put(pool, 0, 300)
    put(pool, LATER, 200)
    get(pool, 0, 300)
    put(pool, SCAN, 2 * ROOM)
    put(pool, 0, 300)
    put(pool, SCAN + 2 * ROOM, 5 * ROOM)
    assert there(pool, 0, 300) >= 255


def test_few_chunks_hold_pages_of_many_sizes(small: _native.Segment, kept: _native.Pool) -> None:
    """Blocks of all sizes share 8 MiB: chunks that are begun for each size must not lie about half empty."""
    rng = random.Random(5)
    for index in range(12_000):
        random_bytes = rng.randrange(300, 3_900)
        kept.put(OID, index, rng.randbytes(random_bytes) + bytes(4096 - random_bytes))
    counts = small.statistics()
    assert kept.statistics()["pages"] * 2_150 > 0.64 * counts["chunks_total"] * 65_536
