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
    """The ceiling of everything: blocks, index and tables."""
    used_bytes: int
    """Memory in use: index and tables, and the chunks that hold pages."""
    limit_bytes: int
    """The bound of now, at most `memory_bytes`."""
    persistent_limit_bytes: int
    """How far persistent pages that find nothing to evict may pass it."""
    size_least_bytes: int
    """The manager does not move the limit below this..."""
    size_most_bytes: int
    """... nor above this. Equal: it does not move it."""
    reserve_bytes: int
    """Memory that is free but backed, so that the next puts need none from the system."""
    hole_bytes: int
    """Free blocks in chunks that hold pages, a part of `used_bytes`: for more pages of their sizes, or gained
    by moving the others together."""
    metadata_bytes: int
    """Memory of index and tables, a part of `used_bytes`."""
    persistent_pages: int
    """Pages in persistent pools."""
    ephemeral_pages: int
    """Pages in ephemeral pools."""
    fill_pages: int
    """Pages among both that repeat one word and take no block."""
    tier_pages: int
    """Persistent pages that are in tiers, originals among them, and take no memory but their slots."""
    twin_pages: int
    """Persistent pages that equal others of their client, and are kept once with those."""
    original_pages: int
    """What is kept for them: pages that nobody put as such, and that no other number counts."""
    packed_pages: int
    """Persistent pages that are stored together with neighbours, in packs."""
    packs: int
    """How many there are."""
    pack_bytes: int
    """Their memory."""
    pages_max: int
    """The most pages that there were; like the other maxima of the segment, looked at every 256 operations
    of a thread."""
    ephemeral_pages_max: int
    """The most ephemeral pages that there were."""
    compressed_bytes: int
    """Memory of the pages that are stored compressed."""
    objects: int
    """Objects, also empty ones that were not looked for yet."""
    objects_max: int
    """The most objects that there were."""
    nodes: int
    """Leaves and nodes of the index."""
    nodes_max: int
    """The most that there were."""
    operations: int
    """Pages put, got and flushed, and objects flushed, whatever came of it."""
    failed_operations: int
    """Calls that ended with an error: a pool that is gone, a corrupt page, no room for a thread."""
    ephemeral_puts_new: int
    """Ephemeral puts that stored a page where there was none."""
    allocation_failures: int
    """Times that no memory was found, for a page or for the index."""
    evicted_pages: int
    """Ephemeral pages that were evicted since the segment was created."""
    eviction_attempts: int
    """Chunks that were drained to get memory."""
    evictions_per_request_max: int
    """The most chunks that one request for memory had to drain."""
    trims: int
    """Times that memory was to be given back to the system."""
    trimmed_bytes: int
    """Memory that was given back."""
    relocated_pages: int
    """Pages that were moved to free a chunk."""
    compacted_bytes: int
    """Memory of the chunks that came free so."""
    compacting_ns: int
    """What that took, in puts that found no other memory and in the background."""
    shrinks: int
    """Times that the limit was lowered."""
    squeezed_pages: int
    """Pages that were stored as they are while there was memory in plenty, and compressed when it ran out."""
    squeezed_bytes: int
    """Memory that this saved."""
    squeezing_ns: int
    """What that took where memory was wanted at once; in the background it is in `condensing_ns`."""
    condensed_pages: int
    """Pages that were stored smaller because nobody had asked for them in a while."""
    condensed_bytes: int
    """Memory that this saved."""
    restored_pages: int
    """Of those, pages that were asked for again and stored as before."""
    restored_bytes: int
    """Memory that this took again."""
    condensing_ns: int
    """CPU time of all this, loose pages in the background included."""
    pages_packed: int
    """Condensed pages that were packed together with neighbours."""
    pages_packed_bytes: int
    """Memory that this saved, beyond what condensing did."""
    pages_unpacked: int
    """Of those, pages that got memory of their own again."""
    packing_ns: int
    """CPU time of both, but of taking packs apart that are read: that is in `condensing_ns`."""
    dedup_pages: int
    """Pages that were found to equal others, and are kept once with those from then on."""
    dedup_bytes: int
    """Memory that this saved at that time, the originals deducted."""
    dedup_ns: int
    """CPU time of looking for them."""
    chunks_total: int
    """Chunks that the segment is divided into."""
    chunks_used: int
    """Chunks that belong to a size class."""
    chunks_used_max: int
    """The most that did."""
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
    floor_bytes: int
    """Memory that it can count on."""
    weight: int
    """Its share of the ephemeral memory under contention is in proportion to this."""
    used_bytes: int
    """Memory that its pages occupy, those of shared pools that it owns among them, and its originals."""
    ephemeral_bytes: int
    """Memory of the chunks that hold its ephemeral pages: what weights divide."""
    persistent_pages: int
    """Pages in its persistent pools."""
    ephemeral_pages: int
    """Pages in its ephemeral pools, and in the shared pools that it owns."""
    ephemeral_pages_max: int
    """The most that there were."""
    compressed_pages: int
    """Pages stored compressed."""
    compressed_bytes: int
    """Memory of those."""
    raw_pages: int
    """Pages stored as they are: compression did not pay, was not wanted, or there was memory in plenty."""
    tier_pages: int
    """Persistent pages that are in its tier, originals among them."""
    twin_pages: int
    """Persistent pages that equal others of its, and are kept once with those."""
    original_pages: int
    """What is kept for them."""
    original_bytes: int
    """Memory of that, a part of `used_bytes`."""
    packed_pages: int
    """Persistent pages that are stored together with neighbours, in packs."""
    packs: int
    """How many there are."""
    pack_bytes: int
    """Their memory, a part of `used_bytes`."""
    unreachable_gets: int
    """Gets that ended with an error because the tier did not answer, or had lost the page."""
    allocation_failures: int
    """Times that no memory was found for it, or its cap did not allow it."""
    persistent_puts_stored: int
    """Pages that were put into its persistent pools."""
    persistent_gets_hit: int
    """Pages that were got from them."""
    ephemeral_gets_hit: int
    """Pages that it got from ephemeral pools, shared ones among them."""
    busy_ns: int
    """Time spent in put, get and flush for it: 64 times what every 64th operation took."""
    held: bool
    """A living process serves it."""
    authorised_pools: int
    """Shared pools that it may use."""
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
    shared: bool
    """Several clients may use it."""
    pages: int
    """Pages stored."""
    pages_max: int
    """The most that there were."""
    objects: int
    """Objects, also empty ones that were not looked for yet."""
    objects_max: int
    """The most that there were."""
    nodes: int
    """Leaves and nodes of their indexes."""
    nodes_max: int
    """The most that there were."""
    bytes: int
    """Memory of their blocks."""
    compressed_pages: int
    """Pages stored compressed."""
    raw_pages: int
    """Pages stored as they are: compression did not pay, was not wanted, or there was memory in plenty."""
    fill_pages: int
    """Pages that repeat one word and take no block."""
    tier_pages: int
    """Pages that are in a tier, and not in memory."""
    twin_pages: int
    """Pages that equal others of the client, and are kept once with those."""
    packed_pages: int
    """Pages that are stored together with neighbours, in memory that is counted for the client."""
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
    pages_demoted: int
    """Pages that left memory for a tier."""
    pages_fetched: int
    """Pages that were read from it because somebody asked for them."""
    pages_prefetched: int
    """Pages that came back from it in the background, because there was plenty of memory."""
    evictions: int
    """Pages that were evicted."""
    corrupt_pages: int
    """Pages whose checksum failed."""
    pages_dropped: int
    """Pages that went because the client was turned off, or because their last user left the shared pool."""


BUCKETS_NS = tuple(1 << bits for bits in range(7, 31))
"""Upper bounds of the buckets of `Timing`: powers of two from 128 ns to 1 s."""


@dataclass(frozen=True)
class Timing:
    """How long one kind of operation takes: of every 64th of a thread, in nanoseconds."""

    samples: int
    total_ns: int
    least_ns: int
    most_ns: int
    buckets: tuple[int, ...]
    """How many of them took longer than one bound of `BUCKETS_NS` and at most the next; the last: longer than
    all bounds."""

    def since(self, before: "Timing") -> "Timing":
        """Return what has come since `before`; least and most are those of all time."""
        return Timing(
            self.samples - before.samples,
            self.total_ns - before.total_ns,
            self.least_ns,
            self.most_ns,
            tuple(now - then for now, then in zip(self.buckets, before.buckets, strict=True)),
        )

    def quantile_ns(self, share: float) -> float | None:
        """Return the time that `share` of the samples did not exceed, within a factor of two; None of none.

        Between the bounds of a bucket it is interpolated, and `most_ns` bounds the last one.
        """
        left, below = share * sum(self.buckets), 0
        for number, bound in zip(self.buckets, (*BUCKETS_NS, max(self.most_ns, BUCKETS_NS[-1])), strict=True):
            if number and left <= number:
                return below + (bound - below) * left / number
            left -= number
            below = bound
        return None
