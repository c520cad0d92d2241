"""What the core counts, as frozen dataclasses with documented fields.

`from_dict` takes the core's dictionaries and ignores nothing: a key that is missing or unknown means that the
compiled core and this file are of different versions. Not for rates or history: a caller takes two and
subtracts. Values are snapshots; counters only grow for as long as their pool lives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from tmem.errors import SegmentError


@dataclass(frozen=True)
class _Statistics:
    """Common construction from a dictionary of the core."""

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Self:
        """Build from the core's dictionary. Raises `SegmentError` unless the keys are exactly the fields."""
        wanted = {field.name: field.type for field in fields(cls)}
        if odd := wanted.keys() ^ values.keys():
            raise SegmentError(
                f"the compiled core does not fit this version of tmem ({', '.join(sorted(odd))}): "
                "build it again with scripts/test or 'pip install -e .'"
            )
        typed = {name: bool(values[name]) if kind is bool else values[name] for name, kind in wanted.items()}
        return cls(**typed)


@dataclass(frozen=True)
class SegmentStatistics(_Statistics):
    """One segment."""

    layout_version: int
    """Version of the segment file's layout."""
    memory_bytes: int
    """The bound on everything: blocks, index and tables."""
    used_bytes: int
    """Memory in use: index and tables, and the chunks that hold pages."""
    reserve_bytes: int
    """Memory that is free but backed, so that the next puts need none from the system."""
    metadata_bytes: int
    """Memory of index and tables, a part of `used_bytes`."""
    persistent_pages: int
    """Pages in persistent pools."""
    ephemeral_pages: int
    """Pages in ephemeral pools."""
    fill_pages: int
    """Pages among both that repeat one word and take no block."""
    evicted_pages: int
    """Ephemeral pages that were evicted since the segment was created."""
    chunks_total: int
    """Chunks that the segment is divided into."""
    chunks_used: int
    """Chunks that belong to a size class."""
    chunks_free: int
    """Chunks that belong to none, backed or not."""
    dead_threads_repaired: int
    """Threads that ended without taking their leave (killed, or their process exited at once) and were
    looked after; most had nothing to repair."""


@dataclass(frozen=True)
class ClientStatistics(_Statistics):
    """One client of a segment."""

    id: int
    """Its number in the segment."""
    cap_bytes: int
    """The most memory that its pages may occupy; 0 is no limit."""
    used_bytes: int
    """Memory that its pages occupy."""
    persistent_pages: int
    """Pages in its persistent pools."""
    ephemeral_pages: int
    """Pages in its ephemeral pools."""
    pools: int
    """Its pools."""


@dataclass(frozen=True)
class PoolStatistics(_Statistics):
    """One pool of a client."""

    id: int
    """0 to 15, within the client."""
    persistent: bool
    """A page that was put stays until it is flushed; else it may be evicted."""
    exclusive: bool
    """A get removes the page."""
    pages: int
    """Pages stored."""
    bytes: int
    """Memory of their blocks."""
    compressed_pages: int
    """Pages stored compressed."""
    raw_pages: int
    """Pages stored as they are, because compression did not pay."""
    fill_pages: int
    """Pages that repeat one word and take no block."""
    puts: int
    """Pages that were offered."""
    puts_stored: int
    """Pages that were stored, whether or not the handle had one before: puts = puts_stored + puts_refused +
    puts_flushed."""
    puts_refused: int
    """Pages that were refused for want of memory."""
    puts_replaced: int
    """Duplicate puts that replaced the old page."""
    puts_flushed: int
    """Duplicate puts that were refused and removed the old page."""
    gets: int
    """Pages that were asked for."""
    gets_hit: int
    """Pages that were there."""
    gets_taken: int
    """Pages that a get removed, because the pool is exclusive."""
    flushes: int
    """Pages that were to be flushed."""
    flushes_found: int
    """Pages that were flushed."""
    object_flushes: int
    """Objects that were to be flushed."""
    object_flushes_found: int
    """Objects that were flushed and had pages."""
    evictions: int
    """Pages that were evicted."""
    corrupt_pages: int
    """Pages whose checksum failed."""
