"""Replays accesses through the real store: a get of each page, and a put of it after a miss.

The room is bounded in one of two ways. `Bound.PAGES`: pages are not compressed and the client's cap is that
of so many blocks, so the store keeps as many pages as the simulated caches: this compares policies.
`Bound.MEMORY`: pages are compressed into as many chunks as the same number of raw pages needs, with all
that chunks and size classes cost; the index, which the simulations do not count either, was made before,
and the rest of the segment is filled. That is what users get.
"""

import enum
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import _native
from tmem.types import PAGE_SIZE

BLOCK_BYTES = 4160
"""Memory of a page that is stored raw."""
CHUNK_BYTES = 65536
CHUNK_PAGES = CHUNK_BYTES // BLOCK_BYTES
_INDEX_LEAF_PAGES = 512
_LEAVES_OF_A_CHUNK = 16
_RESERVE_CHUNKS = 8  # that no put may take
_SPARE_CHUNKS = 64


class Bound(enum.Enum):
    """What is held equal between the store and the simulated caches."""

    PAGES = "pages"
    MEMORY = "memory"


@dataclass(frozen=True)
class Outcome:
    """What a replay came to."""

    hits: int
    pages_most: int
    """The most pages that were stored at once."""


def _object_of(page: int) -> tuple[bytes, int]:
    return (page >> 32).to_bytes(_native.OID_SIZE, "little"), page & 0xFFFFFFFF


def _make_index(pool: _native.Pool, pages: Sequence[int]) -> None:
    """Have every leaf made that the pages need; pages of zeros occupy no block."""
    zeros = bytes(PAGE_SIZE)
    for leaf in {page // _INDEX_LEAF_PAGES for page in pages}:
        oid, index = _object_of(leaf * _INDEX_LEAF_PAGES)
        for kind in (index, index + 16, index + 64) if not index else (index,):  # leaves of 16, 64 and 512
            pool.put(oid, kind, zeros)
            pool.flush(oid, kind)


def _fill_but(segment: _native.Segment, filler: _native.Pool, keep_chunks: int) -> None:
    """Occupy the segment until `keep_chunks` are free."""
    oid, page, index = bytes(_native.OID_SIZE), bytes(range(256)) * 16, 0
    while segment.statistics()["chunks_free"] > keep_chunks:
        if filler.put(oid, index, page * CHUNK_PAGES) < CHUNK_PAGES:
            break
        index += CHUNK_PAGES
    if segment.statistics()["chunks_free"] != keep_chunks:
        raise RuntimeError("the segment could not be filled to the size that is to be measured")


def replay(
    pages: Sequence[int], room: int, bound: Bound, content: Callable[[int], bytes], directory: Path
) -> Outcome:
    """Replay the accesses with room for `room` raw pages; RuntimeError if a hit's content is not the page's.

    The segment is made in `directory`, which must be on a tmpfs, and removed.
    """
    leaves = len({page // _INDEX_LEAF_PAGES for page in pages})
    chunks = -(-room // CHUNK_PAGES)
    total = chunks + leaves // _LEAVES_OF_A_CHUNK + leaves // 8 + _RESERVE_CHUNKS + _SPARE_CHUNKS
    memory = max(total * CHUNK_BYTES + (total * CHUNK_BYTES >> 6) + (4 << 20), 8 << 20)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        segment = _native.create(f"{place}/segment", memory)
        try:
            client = segment.client("replay")
            pool = client.new_pool(False, exclusive=False)
            if bound is Bound.PAGES:
                client.compress = "none"
                client.cap_bytes = room * BLOCK_BYTES
            else:
                _make_index(pool, pages)
                other = segment.client("filler")
                other.compress = "none"
                _fill_but(segment, other.new_pool(True), chunks + _RESERVE_CHUNKS)
            hits = _run(pool, pages, content)
            return Outcome(hits, pool.statistics()["pages_max"])
        finally:
            segment.close()
            _native.destroy(f"{place}/segment")


def _run(pool: _native.Pool, pages: Sequence[int], content: Callable[[int], bytes]) -> int:
    buffer = bytearray(PAGE_SIZE)
    hits = 0
    for page in pages:
        oid, index = _object_of(page)
        if pool.get(oid, index, buffer):
            hits += 1
            if buffer != content(page):
                raise RuntimeError(f"the store returned other bytes for page {page} than were put")
        else:
            pool.put(oid, index, content(page))
    return hits
