"""The native core as Python sees it. Sources in ``native/``; `tmem.backends.segment` is the way in.

Threading: every method may be called from any thread, of any process that has the segment attached. Calls on
single pages keep the GIL; calls on 16 pages or more release it. After a fork the child may go on using the
objects (each thread registers itself with the segment at its first call).

Buffers are C-contiguous; no reference is kept after return. Errors: `tmem.errors.SegmentError`,
`PoolError`, `CorruptPageError`; TypeError and ValueError for arguments out of range.
"""

from collections.abc import Callable
from typing import Generic, TypeVar, final

from typing_extensions import Buffer

PAGE_SIZE: int
OID_SIZE: int
UUID_SIZE: int
VERSION: int  # of the segment's layout

def pack(
    records: list[Buffer], size_bytes: int, most: int, room: bytearray | None, before: int, after: int, /
) -> tuple[bytearray, list[int], list[int]]:
    """Return the values that hold the records, in order, as many in each as go in (`tiers.redis_values`).

    In `room`, or in a new one if they do not fit, with so many bytes `before` and `after` each; where they
    begin, and where they end. At most `size_bytes` long, with at most `most` (255) records. ValueError for a
    record that is too long.
    """

def unpack(read: Buffer, start: int, end: int, /) -> tuple[list[bytes | None], int, bool]:
    """Return the records of the value that `read` holds from `start` to `end` (`tiers.redis_values`).

    The records by place, None where there is none (of a damaged value those that are whole); how many bytes
    they are together; and whether any is None.
    """

def runs(locations: list[int], most: int, /) -> list[tuple[int, int, int, int]]:
    """Return where in `locations` neighbours in one value of `most` places begin.

    For each: where that is in the list, the number of the value, the place of the first, and how many.
    """

def resp_encode(
    commands: list[tuple[bytes | memoryview | str | int | float, ...] | bytes | memoryview],
    sent_bytes: int,
    copied_bytes: int,
    /,
) -> list[list[bytes | memoryview]]:
    """Return what to send to a Redis server for the commands, as lists of what one call of the kernel takes.

    A command is a tuple of words, or what is sent of one. Each list but the last is at least `sent_bytes`, or
    as many pieces as the kernel takes. Words of `copied_bytes` are the caller's own objects, shorter ones are
    put together.
    """

def resp_sets(
    room: bytearray, starts: list[int], ends: list[int], prefix: str, numbers: list[int], group_bits: int, /
) -> list[int]:
    """Write around the values that begin and end there what makes each a SET, under the key of its number
    (`tiers.redis_values.key`), and return where these begin; they end two bytes after the value. ValueError
    if there is no room."""

def resp_unlinks(prefix: str, numbers: list[int], group_bits: int, /) -> list[bytes]:
    """Return an UNLINK for the key of each number, as it is sent."""

def resp_answers(
    read: Buffer, start: int, end: int, most: int, taken: Callable[[Buffer, int, int], object] | None, /
) -> tuple[list[object], int]:
    """Return the answers that are whole from `start` on before `end`, `most` at most, and where they end.

    Of values `taken(read, start, end)`, all of it as bytes if that is None; of a value that is not there
    None; of numbers int; of a status bytes. Ends before whatever else comes, as an error: the caller's.
    """

def resp_slot(key: bytes, /) -> int:
    """Return the hash slot of a key in a Redis cluster, of its tag in braces if it has one."""

def checksum(data: Buffer) -> int:
    """XXH3 of `data`, 64 bits; what save files and handoffs are protected with. Releases the GIL."""

def create(path: str, memory_bytes: int) -> Segment:
    """Create the segment file `path` (mode 0600) bounded to `memory_bytes`, and attach it.

    `memory_bytes` bounds everything: blocks, index and tables. At least 8 MiB. FileExistsError if it exists.
    """

def attach(path: str) -> Segment:
    """Attach an existing segment. SegmentError if it is missing, foreign, damaged or of another version."""

def destroy(path: str) -> None:
    """Remove the segment at `path`: give its memory back and make every process that has it see PoolError."""

@final
class Segment:
    """A process's mapping of one segment."""

    @property
    def path(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def nonce(self) -> int:
        """64 bits that tell this life of the segment from any other."""
    @property
    def alive(self) -> bool:
        """False once the segment was destroyed; costs one memory read."""
    @property
    def tier_patience_ms(self) -> int:
        """How long this process tries again to read from a tier that does not answer; 30000 to begin with.
        Settable."""
    @tier_patience_ms.setter
    def tier_patience_ms(self, value: int) -> None: ...
    def client(self, name: str, create: bool = True) -> Client:
        """Return the client called `name` (1 to 63 bytes of UTF-8), creating it unless told not to."""

    def clients(self) -> list[Client]: ...
    @property
    def mode(self) -> str:
        """What all clients may do at most: "on", "frozen" or "off"; see `Client.mode`. Settable."""
    @mode.setter
    def mode(self, value: str) -> None: ...
    def stage(self, name: str) -> Client:
        """Create a client that nobody else sees, to be filled, then shown by `commit`, or destroyed.

        It belongs to the calling thread: should that end before `commit`, the client is destroyed by the next
        reaper. PoolError if a client of that name is there already.
        """

    def commit(self) -> int:
        """Show all clients that the calling thread has staged, all or, if it dies on the way, none of them.

        Returns their number. PoolError, and none is shown, if one of the names has been taken meanwhile.
        """

    def statistics(self) -> dict[str, int]:
        """Counters of the whole segment; see `tmem.backends.statistics.SegmentStatistics`."""

    def timing(self) -> dict[str, tuple[int, int, int, int, tuple[int, ...]]]:
        """The fields of `tmem.backends.statistics.Timing` for "put_stored", "put_refused", "get_hit",
        "get_missed", "flush", "flush_object", "compress", "decompress" and "expand" (of condensed pages)."""

    def check(self) -> list[str]:
        """Check every invariant; one line per violation, [] when sound. Exact only while nobody works."""

    def reap(self) -> int:
        """Repair what dead threads left; the number of dead threads found."""

    def populate(self, size_bytes: int) -> int:
        """Fault in memory until `size_bytes` of free blocks are backed; the bytes added."""

    def trim(self, keep_bytes: int) -> int:
        """Return free backed memory beyond `keep_bytes` to the system; the bytes returned."""

    def evict(self, size_bytes: int) -> int:
        """Evict ephemeral pages until `size_bytes` of blocks are free, or none are left; the bytes freed."""

    @property
    def limits(self) -> tuple[int, int]:
        """How much may be used now, tables included: by everybody, and by persistent pages that find nothing
        to evict (and clients below their floors), who may pass the first as far as the second."""
    def set_limits(self, limit_bytes: int, persistent_bytes: int) -> int:
        """Move the limits below `memory_bytes`, the ceiling; the first limit that is in force now.

        It stays above what persistent pages and floors need. Lowering it frees nothing: see `shrink`.
        """

    @property
    def size_range(self) -> tuple[int, int]:
        """Between which sizes the manager may move the limit; equal: not at all."""
    def size_within(self, least_bytes: int, most_bytes: int) -> None:
        """Set `size_range`; the limits stay where they are until somebody moves them."""

    def shrink(self, keep_bytes: int, hard: bool = False, most_bytes: int = ...) -> int:
        """Give back what exceeds the limit, `most_bytes` or a little more; the bytes given back.

        First what is free beyond `keep_bytes`, then what ephemeral pages occupy (with `hard` without sparing
        those that were hit, which is faster). No persistent page goes, and nothing moves: see `compact`.
        """

    def compact(self, holes: int, most_ns: int) -> int:
        """Move together the pages of all chunks of which at least `holes` sixteenths are free, for at most
        `most_ns`; the bytes of the chunks that came free. The next call goes on where this one ended."""

    def freeable_bytes(self) -> int:
        """What persistent pages could have: what is free below their limit, and all that ephemeral ones
        occupy."""

    @property
    def occupied(self) -> tuple[int, int, int]:
        """`used_bytes`, `reserve_bytes` and `hole_bytes` of the statistics, for who asks a hundred times a
        second."""

    @property
    def condense_percent(self) -> int:
        """How much of one CPU the manager may spend on storing cold pages smaller; 0: none. Settable."""
    @condense_percent.setter
    def condense_percent(self, value: int) -> None: ...
    @property
    def condense_level(self) -> int:
        """The level of zstd, 1 to 19, at which `condense`, `pack` and `dedup` compress pages from now on;
        what they have made at another one stays as it is. 3 at first. Settable."""
    @condense_level.setter
    def condense_level(self, value: int) -> None: ...
    @property
    def condenser_bytes(self) -> int:
        """Memory of this process for compressing with zstd."""
    @property
    def tier_cold_s(self) -> int:
        """After how long without use the manager moves persistent pages to their client's tier although
        there is memory; 0: never. Settable."""
    @tier_cold_s.setter
    def tier_cold_s(self, value: int) -> None: ...
    def condense(
        self,
        first: int,
        most_ns: int,
        *,
        persistent: bool = False,
        ephemeral: bool = False,
        loose: bool = False,
        warm: bool = False,
    ) -> tuple[int, int, int, int, int, int]:
        """Store pages smaller that were not put or got between the last two visits, from chunk `first` on.

        Those of persistent or ephemeral pools, and of loose pages all; with `warm` whatever was put and got.
        Goes on for `most_ns` of CPU time, and to the end of a page; returns where to go on, 0 after the last
        chunk, the CPU time spent, and of what it has visited how many pages are condensed there now, how many
        bytes that saves, how many of them are in packs, and how many bytes that saves beyond it. Releases the
        GIL.

        Packs whose pages would take less by themselves, because others have left, or that were read in two
        intervals, are taken apart.
        """

    def pack(self, first: int, most_ns: int, *, warm: bool = False) -> tuple[int, int]:
        """Store condensed neighbours of persistent pools together where that saves memory, from chunk `first`
        on, unless `packing` is off: those that were not put or got lately, or with `warm` all.

        Goes on for `most_ns` of CPU time, and to the end of a pack; returns where to go on, 0 after the last
        chunk, and the CPU time spent. Releases the GIL.
        """

    def unpack(self, first: int, most_ns: int) -> tuple[int, int]:
        """Take packs apart that pages have left, where that saves memory; as `pack`."""

    @property
    def packing(self) -> bool:
        """Whether `pack` does anything. Settable; what is in packs stays there."""
    @packing.setter
    def packing(self, value: bool) -> None: ...
    @property
    def pack_losses(self) -> int:
        """Pages that have left packs which are still there: about a KiB each that is lost in them."""

    def dedup(self, first: int, most_ns: int, *, warm: bool = False) -> tuple[int, int]:
        """Keep equal pages once, of clients that allow it (`Client.dedup`), from chunk `first` on: those that
        were not put or got lately, or with `warm` all. Persistent and ephemeral ones apart, and not of
        ephemeral pools whose gets are exclusive; of a shared pool those of that pool.

        After the last chunk what no page needs any more is freed. Goes on for `most_ns` of CPU time; returns
        where to go on, 0 after the last chunk, and the CPU time spent. Releases the GIL.
        """

    def close(self) -> None:
        """Detach. Objects that came from this mapping raise SegmentError from then on."""

@final
class Client:
    """A client of the segment: a guest, a swap device, a mount. Equality is by identity in the segment."""

    @property
    def id(self) -> int: ...
    @property
    def serial(self) -> int:
        """Which client of that number."""
    @property
    def name(self) -> str: ...
    @property
    def tiered(self) -> bool:
        """Its persistent pages may leave memory: uses of them are noted, for `collect`. Settable; once it is
        off nothing is demoted any more (PoolError if a process that is stopped may still)."""
    @tiered.setter
    def tiered(self, value: bool) -> None: ...
    @property
    def tier_epoch(self) -> int:
        """How often `tiered` was set anew: another number is another tier."""
    def attach_tier(
        self, source: str | Callable[[list[int]], list[bytes | None]], epoch: int = ..., /
    ) -> None:
        """Read records of the client in this process from a spill file (its path; read natively), or by a
        callable as `Tier.read`. Without it `tmem.backends.tiering.source` is asked when there is need,
        and again after `tiered` was set anew. `epoch` is the `tier_epoch` from before it was looked up where
        the source is; by default that of now.
        TierDownError or TierCorruptError for a file that cannot be read or is another's."""
    def collect(
        self, hand: int, buffer: Buffer, most: int, any: bool, epoch: int, /
    ) -> tuple[int, list[tuple[int, int]], bytes]:
        """Copy at most `most` (65536) cold persistent pages as records to `buffer`, from slot `hand` (0: the
        first) on. Returns where to go on (0: it was all), offset and length of each record, and what
        `demote` wants to know of them. A page that was used since the last look is not cold; `any`: take it
        nevertheless. Nothing if the client has not the tier of that epoch now. Releases the GIL."""
    def demote(self, pages: bytes, locations: Buffer, /) -> int:
        """Let the collected pages leave memory, whose records have been acknowledged at these locations
        (8 bytes each, in order, native endianness); the number that did. Pages that were put, flushed or
        used since stay as they are, and all if the client has another tier by now, or none. Releases the
        GIL."""
    def promote(self, hand: int, most: int, /) -> tuple[int, int]:
        """Bring at most `most` pages back from the tier, from slot `hand` (0: the first) on; where to go on
        (0: that was all) and how many came. PoolError if there is no memory for the first,
        CorruptPageError or TierDownError if it cannot be read. Releases the GIL."""
    def prefetch(self, hand: int, most: int, near: bool, keep: int, /) -> tuple[int, int, str]:
        """Bring about `most` pages back as `promote`, but only into memory that is free, so that `keep`
        sixteenths of it and of the client's cap stay so; `near`: only from groups of slots of which a page
        was read from the tier lately. Nothing is evicted, and a tier that fails is left alone. Returns where
        to go on (0: that was all), how many came, and what ended it: "" nothing, "room", "down", or
        "corrupt" for a record that cannot be read, which is passed over. Releases the GIL."""
    def live(self, timeout_ms: int, /) -> bytes | None:
        """Return the locations that slots name (8 bytes each, ascending), once nobody reads any others any
        more; None if somebody still does after that time. Only for the one who demotes. Releases the GIL."""
    @property
    def cap_bytes(self) -> int:
        """The most memory that the client's pages may occupy; 0 is no limit. Settable."""
    @cap_bytes.setter
    def cap_bytes(self, value: int) -> None: ...
    @property
    def floor_bytes(self) -> int:
        """Memory of pages that the client can count on: nobody else takes it, and its ephemeral pages are not
        evicted below it for others. Settable; PoolError if so much cannot be promised now."""
    @floor_bytes.setter
    def floor_bytes(self, value: int) -> None: ...
    @property
    def most_floor_bytes(self) -> int:
        """The largest `floor_bytes` that would not be refused now, to the byte."""
    @property
    def weight(self) -> int:
        """Share of the ephemeral memory under contention, in proportion to the other clients' weights.

        0 to 65535, 100 to begin with. Pages of a client of weight 0, or whose processes are all gone, go
        first. Settable.
        """
    @weight.setter
    def weight(self, value: int) -> None: ...
    @property
    def compress(self) -> str:
        """How its pages are compressed from now on: "lz4", "none", or "auto", which leaves ephemeral pages as
        they are while half of the memory is free, and compresses those when it runs out. Settable."""
    @compress.setter
    def compress(self, value: str) -> None: ...
    @property
    def dedup(self) -> bool:
        """Equal pages of its pools, and of shared pools that it owns, may be kept once, see `Segment.dedup`;
        False to begin with. Settable; turned off, what is kept once already stays so until it is put
        again."""
    @dedup.setter
    def dedup(self, value: bool) -> None: ...
    @property
    def mode(self) -> str:
        """What the client may do: "on", "frozen" or "off". Settable; the segment's mode may restrict it
        more.

        Frozen: a put is refused and, unless it keeps the old page, flushes its handle; gets and flushes go
        on. Off: as frozen, and the ephemeral pages are dropped and every get of an ephemeral pool misses.
        Persistent pages stay readable. When the setter returns, every operation that began before has ended.
        """
    @mode.setter
    def mode(self, value: str) -> None: ...
    @property
    def usable(self) -> bool:
        """False if an ephemeral pool of the client has nothing to offer now: it or the segment is off, or
        destroyed. One or two memory reads: for every request. Flush all the same."""
    @property
    def phase(self) -> str:
        """Where a handoff stands: "none", "copying", "frozen" or "departed"."""
    def handoff(self, step: str) -> None:
        """Take a step of a handoff: "copy", "freeze", "depart" or "end".

        copy: an export of `changes` now finds what is new; the first one after it has every page. freeze:
        additionally puts are refused (a `Device` waits instead); when this returns, nothing that was under
        way before is still running. depart: the pages are about to live elsewhere: a last export of changes
        gives the flushes that came until then, everything else is refused; devices wait, and end when the
        client is destroyed. end: back to normal. The phases copying and frozen end with the thread that began
        them; departed stays until "end" or the destruction of the client. PoolError if another thread is at
        it, or for a step that does not follow.
        """

    def hold(self) -> None:
        """Say that the calling thread's process serves the client, until this thread ends."""
    @property
    def held(self) -> bool:
        """Some living thread holds the client."""
    def authorise(self, uuid: bytes) -> None:
        """Allow the client to share the ephemeral pool `uuid` (16 bytes). PoolError beyond 16 of them."""
    def revoke(self, uuid: bytes) -> bool:
        """Withdraw that; a pool of this uuid that the client shares, it leaves. False: it was not allowed."""
    def authorised(self) -> list[bytes]: ...
    def evict(self, size_bytes: int) -> int:
        """Evict its ephemeral pages until `size_bytes` of memory are free, or none are left; the bytes
        freed."""
    def new_pool(
        self,
        persistent: bool,
        exclusive: bool | None = None,
        *,
        uuid: bytes | None = None,
        id: int | None = None,
    ) -> Pool:
        """Create a pool, with the number `id` if given (PoolError if it is taken).

        `exclusive`: a get removes the page; default True if private and ephemeral, never for a shared pool.
        With `uuid` (16 bytes, neither all zeros nor all ones) it is shared and ephemeral: joined if another
        client has it already. PoolError if the client is not authorised for it, or shares it already.
        """

    def pools(self) -> list[Pool]: ...
    def pool(self, id: int) -> Pool: ...
    def statistics(self) -> dict[str, int]: ...
    def timing(self) -> dict[str, tuple[int, int, int, int, tuple[int, ...]]]:
        """As `Segment.timing`, of what this client asked for: "put_stored", "put_refused", "get_hit" and
        "get_missed"."""

    def destroy(self) -> None:
        """Destroy all pools of the client, then the client."""

@final
class Pool:
    """A pool. `oid` is always OID_SIZE bytes, `index` 0 to 2**32 - 1."""

    @property
    def id(self) -> int:
        """0 to 15, within its client."""
    @property
    def client(self) -> Client: ...
    @property
    def persistent(self) -> bool: ...
    @property
    def exclusive(self) -> bool: ...
    @property
    def uuid(self) -> bytes | None:
        """Of a shared pool."""
    @property
    def owner(self) -> Client:
        """The client that pays for the pages: of a shared pool one of its sharers."""
    @property
    def sharers(self) -> list[Client]:
        """Everybody who uses the pool; of a private one its client."""
    @property
    def alive(self) -> bool: ...
    def put(self, oid: bytes, index: int, data: Buffer, keep_old: bool = False) -> int:
        """Store len(data) / PAGE_SIZE pages from `index` on; the number of pages stored.

        A refused page leaves its handle a miss and the call goes on with the next page. With `keep_old` a
        refused page keeps what was there before and the call stops there.
        """

    def get(self, oid: bytes, index: int, buffer: Buffer) -> int:
        """Fill `buffer` (writable, whole pages) from `index` on, up to the first miss; the pages filled."""

    def flush(self, oid: bytes, index: int, npages: int = 1) -> int:
        """Drop pages; the number that existed. Never fails for want of memory."""

    def flush_object(self, oid: bytes) -> int:
        """Drop every page of the object; the number that existed."""

    def present(self, oid: bytes, index: int, npages: int) -> list[tuple[int, int]]:
        """Return the runs (first index, pages) that are stored within the range, in order."""

    def statistics(self) -> dict[str, int]:
        """Counters of the pool; of a shared one, of the whole pool, whoever called."""

    def destroy(self) -> None:
        """Destroy a private pool. A shared one is left: the pages that the client used last are dropped, what
        it owned the next sharer owns, and the pool ends with its last sharer."""

    def export(self, changes: bool = False) -> Exporter:
        """Read all pages of a persistent pool, or with `changes` those that are new since they were last
        exported so, and the flushes since then; that needs a handoff under way (`Client.handoff`)."""

    def import_records(self, records: Buffer) -> int:
        """Put and flush what an `Exporter` has written; the number of records.

        ValueError if they are malformed (those before are in). PoolError if there is no memory for a page.
        """

@final
class Exporter:
    """An iteration over the pages of a pool, in the form in which they are stored.

    A record is little-endian: oid (24 bytes), index (u32), length (u16), kind (u8), 0 (u8), then `length`
    bytes. Kinds: 0 fill (the 64-bit word that the page repeats), 1 raw (the page), 2 LZ4 block of the page,
    3 absent (length 0: flushed since it was exported).
    """

    def fill(self, buffer: Buffer) -> int:
        """Write whole records to `buffer` (at least 8192 bytes); the bytes written, 0 at the end. Releases
        the GIL. CorruptPageError if a page fails its checksum; the next call goes on behind it."""

@final
class Device:
    """A block device of `size_bytes` on one object of a persistent pool, with nbdkit's callbacks.

    The first argument `h` of each is nbdkit's handle and ignored. A refused write raises OSError(ENOSPC), a
    corrupt page OSError(EIO), and tells nbdkit so; bytes never written read as zeros. Requests that are not
    whole pages are read-modify-write, atomic per page. With `pin_threads` the calling thread's Python thread
    state is kept from its first call until the thread ends, which makes these callbacks cheap in nbdkit;
    never for threads that Python itself started.
    """

    def __init__(
        self,
        pool: Pool,
        oid: bytes,
        size_bytes: int,
        pin_threads: bool = False,
        departed: Callable[[], object] | None = None,
    ) -> None:
        """While the client is frozen by a handoff, writes wait; once it has departed, all requests do, and
        `departed` is called (it should end the process) when the client is destroyed then."""

    @property
    def size_bytes(self) -> int: ...
    def pread(self, h: object, buf: Buffer, offset: int, flags: int) -> None: ...
    def pwrite(self, h: object, buf: Buffer, offset: int, flags: int) -> None: ...
    def zero(self, h: object, count: int, offset: int, flags: int) -> None: ...
    def trim(self, h: object, count: int, offset: int, flags: int) -> None: ...
    def extents(self, h: object, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]: ...

class Node:
    """One inode of `Nodes`, to be derived from; its attributes are what the table knows now.

    Once the table has it no more, its descriptor is -1 and no name leads to it.
    """

    @property
    def nodeid(self) -> int: ...
    @property
    def key(self) -> tuple[int, int]:
        """(st_dev, st_ino) of the lower file."""

    @property
    def kind(self) -> int:
        """S_IFMT bits of its mode."""

    @property
    def descriptor(self) -> int:
        """O_PATH, or -1 while closed to save descriptors; use `Nodes.descriptor`."""

    @property
    def lookups(self) -> int:
        """That the kernel has not taken back."""

    @property
    def generation(self) -> int:
        """Tells it from other files that have had its node id: handles of the mount's files hold both."""

    @property
    def handle(self) -> bytes | None:
        """Its file handle, once asked for."""

    opens: int
    """Open handles of a regular file: its descriptor stays open meanwhile."""
    @property
    def known_since(self) -> float:
        """When the kernel was first told of it (monotonic seconds); long ago if other code did."""

    @property
    def stored_to(self) -> bool:
        """Whether programs may write to it through the mount without our knowledge; see `Nodes.store_to`."""

    @property
    def by_id(self) -> bool:
        """Whether its node id leads to it."""

    @property
    def by_key(self) -> bool:
        """Whether its lower identity does: its number may be another file's by now."""

_N = TypeVar("_N", bound=Node)

class Nodes(Generic[_N]):
    """The inodes that the kernel knows; made of a root directory (a descriptor, owned) and a class of nodes.

    An object of that class is made once a node is asked for, and kept until it is dropped. For the event
    loop's thread; what others ask of it is below Python (backends/native/reader_nodes.h).
    """

    def __init__(
        self, root: int, kind: type[_N], numbers_tell: bool = True, is_fuse: bool = False, /
    ) -> None:
        """`numbers_tell`: no two open files on the root's device have one number; else handles tell."""
    def __len__(self) -> int: ...
    @property
    def open(self) -> int:
        """How many O_PATH descriptors are open."""

    def bound(self, quota: int, batch: int, by_handle: bool, /) -> None:
        """Have at most `quota` descriptors open, and close `batch` at a time, if that can be done."""

    def close(self) -> None:
        """Close every descriptor, and forget all."""

    def believe(
        self,
        device: int,
        name: float,
        name_elsewhere: float,
        young: float,
        old: float,
        age: float,
        absent: float,
        /,
    ) -> None:
        """Say how long the kernel is to believe things (`fs.lifetimes.Rule`)."""

    def doubt(self) -> None:
        """Have listings tell of all files again: the kernel will ask for their names."""

    def get(self, nodeid: int, /) -> _N | None: ...
    def find(self, device: int, number: int, /) -> _N | None: ...
    def known(self, device: int, number: int, descriptor: int, /) -> _N | None:
        """Return that of an open file with this device and number."""

    def all(self) -> list[_N]:
        """Return all, first those that are open, the oldest first."""

    def meet(self, device: int, number: int, kind: int, descriptor: int, now: float, /) -> _N:
        """Return the node of a file that was looked up, made if need be; owns its O_PATH descriptor."""

    def remember(self, node: _N, /) -> None:
        """Count a lookup."""

    def take_back(self, nodeid: int, count: int, /) -> _N | None:
        """Take lookups back. One whose last they are is gone, or if it was made returned, to be dropped."""

    def drop(self, node: _N, /) -> None:
        """Remove it, unless lookups are left."""

    def restore(
        self,
        nodeid: int,
        device: int,
        number: int,
        kind: int,
        descriptor: int,
        lookups: int,
        generation: int,
        handle: bytes | None,
        by_id: bool,
        by_key: bool,
        stored_to: bool,
        /,
    ) -> _N:
        """Take in a node as it was."""

    def counters(self) -> tuple[int, int]:
        """Return the next node id for files on other devices, and the last generation."""

    def go_on(self, next_foreign: int, last_generation: int, /) -> None:
        """Count on from there."""

    def descriptor(self, node: _N, /) -> int:
        """Return its O_PATH descriptor, opened again if need be. OSError(ESTALE)."""

    def handle(self, node: _N, /) -> bytes | None: ...
    def store_to(self, node: _N, stored_to: bool, /) -> None:
        """Say whether its attributes are not to be believed."""

    def reported_by(self, descriptor: int, /) -> None:
        """Take what becomes readable when changes are reported; -1: there are no reports any longer."""

    def catches_up(self, begins: bool, /) -> None:
        """Say that all reports that are waiting now are going to be read and applied, or that they were."""

    def has_old(self, node: _N, mtime_ns: int, all: bool, /) -> bool:
        """Say that it is reported that bytes of a file have changed that was modified then.

        True if the kernel was told of that time before: it may have taken old bytes since, and keep them. So
        it will be told another time, once; only where no program sees it, unless `all` and no report was
        unread when it was told.
        """

    def still_has_old(self, node: _N, mtime_ns: int, /) -> None:
        """Say it again some time later, when the kernel may not have heard of it.

        Programs are told another time then, too, if they were spared that only for a report that was unread.
        """

    def tells(self, node: _N, mtime_ns: int, hidden: bool, /) -> tuple[bool, bool]:
        """Say that the kernel is being told that it was modified then, and programs too unless `hidden`.

        Whether it is to be another time; and whether it is not to be believed.
        """

class Opens:
    """Opens that a `Reader` answers by itself, and what there is to learn of them.

    By the thread that calls `Reader.serve`. See backends/native/reader_opens.h.
    """

    def __init__(self) -> None: ...
    def grant(self, seconds: float, kept_bytes: int, fine_stamps: bool, accessed: bool, /) -> None:
        """Allow them for so long; 0: not any more.

        Files of up to `kept_bytes` are kept by the kernel; `accessed`: access times need no care.
        """

    def number(self) -> int:
        """Return the next handle of a file; no other one gets it."""

    def number_from(self, number: int, /) -> None:
        """Go on with handles from this one."""

    def know(self, node: int, device: int, inode: int, gate: Gate | None, /) -> None:
        """Have a file, whose coherence is known, opened from its gate; None: not there."""

    def forget(self, node: int, /) -> None:
        """Know nothing of a file, whose node goes."""

    def remember(self, name: bytes, remembered: bool, /) -> None:
        """Leave the first open of the file with this name to the caller, or not any more.

        Each time that it is to be remembered counts.
        """

    def learn(
        self,
    ) -> tuple[
        list[tuple[int, Gate, bytes, int, tuple[int, int, int] | None, bool]],
        list[tuple[int, int, int, bool, int, int, int]],
    ]:
        """Return what has been opened since the last time, and make it the caller's.

        For each file of which nothing was known: its node, gate, name, size, the version that its pages are
        valid for, and whether nobody had it open for writing then. For each that is open still: its handle,
        node, descriptor, whether its access time needs no more care, and user, group and process of who
        opened it.
        """

class Listings:
    """The directories that are open, and their listings (backends/native/reader_listings.h).

    A `Reader` answers their requests from it. For the event loop's thread.
    """

    def __init__(self, nodes: Nodes[_N], /) -> None: ...
    def open(self, nodeid: int, /) -> int:
        """Open a directory; return the handle. OSError."""

    def close(self, fh: int, /) -> None:
        """Close a directory. OSError(EBADF) if there is none, as all that follow."""

    def close_all(self) -> None: ...
    def descriptor(self, fh: int, /) -> int: ...
    def names(self, fh: int, number: int, /) -> list[bytes]:
        """Return some names of a listing, from `number` on; from 0 on it begins anew. OSError that ended it
        early, once there are no more."""

    def saved(self) -> tuple[list[tuple[int, int, int, int, list[bytes]]], int]:
        """Return handle, node id, generation, descriptor and names of each, and the next handle."""

    def restore(self, fh: int, nodeid: int, descriptor: int, names: list[bytes], /) -> None:
        """Take in an open directory of the code before this; its descriptor is the table's then."""

    def number_from(self, next: int, /) -> None:
        """Count handles on from there."""

class Gate:
    """Where the pages of one file are, for a `Reader`: closed when new, and while the file changes."""

    def __init__(self) -> None: ...
    def set(
        self,
        oid: bytes,
        size: int,
        open: bool,
        takes: bool = False,
        version: tuple[int, int, int] | None = None,
        /,
    ) -> None:
        """Say in which object (24 bytes) its pages are and how many bytes it has. For any thread.

        Once this has returned, no READ that begins later is answered from what was said before, and nothing
        that the reader has read of the file before will be put. `takes`: what is missed while it is open may
        be read and put by the reader. `version`: mtime and ctime in ns, and size, that its pages are valid
        for: who opens the file in that state needs no further answer; until the gate is told anything else.
        """

    def overtake(self) -> None:
        """Have nothing put that was read of the file before."""

    @property
    def top(self) -> int:
        """No page at this index or above was ever put by the reader itself."""

class ReaderBuffer:
    """Writable memory of a `Reader`; it goes back there with the last reference to it."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Rings:
    """An io_uring for each CPU, by which a FUSE connection's requests of at most `payload_bytes` may come.

    OSError: this process may not have them. See backends/native/reader_rings.h.
    """

    def __init__(self, payload_bytes: int) -> None: ...
    @property
    def descriptors(self) -> list[int]:
        """Theirs, none once a reader has them. Who has them lead elsewhere ends the rings when their threads
        end."""

class Reader:
    """Answers READ requests of a FUSE connection that hit, below Python; passes all others on to libfuse.

    `device` is the descriptor of /dev/fuse, non-blocking; `ours` and `theirs` are the ends of a pair of
    SOCK_SEQPACKET sockets, of which libfuse uses `theirs`; all stay the caller's. More room in the sockets
    allows more requests under way. What libfuse gets as the data of a WRITE is a number for `payload`, and
    what it replies to a READ is one from `send`, or nothing.

    Up to `helpers` threads serve beside the caller of `serve` when several requests wait (a single one only
    if they are large, or Python is asked); another one stands in for it once nobody has been in `serve` for
    `away_ms` (0: never). A lower that usually answers within
    `quick_us` is waited for in `serve`. See backends/native/reader.h.
    """

    def __init__(
        self,
        device: int,
        ours: int,
        theirs: int,
        helpers: int = 1,
        largest_bytes: int = 1 << 20,
        away_ms: int = 50,
        quick_us: int = 100,
    ) -> None: ...
    def serve(self, wake: int, timeout_ms: int, /) -> int:
        """Answer hits until a request for libfuse can be read from `theirs` (1), one lies with `asked` (3),
        the connection is over (2), or the descriptor `wake` (-1: none) is readable, the time (-1: none) is
        over or a signal came (0).

        By one thread at a time; passes libfuse's replies on as well. 4 is added if there is something to
        learn (`Opens`).
        """

    def set_opens(self, opens: Opens, /) -> None:
        """Answer opens as these allow, if `set_nodes` has nodes' attributes told here as well; once."""

    def open_shortcut(self) -> int:
        """Have requests of names, listings and open files put by for `asked` from now on; `serve` returns 3.

        Return a descriptor, the reader's, that is readable when a helper has put one there.
        """

    def asked(self) -> tuple[int, int, int, int, int, int, bytes, int] | None:
        """Return the oldest that was put by, None if there is none: opcode, number, node, user, group and
        process of who asks, the argument as the kernel's fuse.h has it, and how often it was fetched for.

        To be answered with `reply` or `look_up`, but for a FORGET. By the thread that calls `serve`.
        """

    def reply(self, number: int, error: int, argument: bytes = b"", /) -> bool:
        """Answer with a positive errno or 0, and an argument of at most 256 bytes.

        False: nobody hears it, for the request was given up. What it did is undone in a moment.
        """

    def look_up(self, number: int, parent: int, name: bytes, may_wait: bool, /) -> bool:
        """Answer a LOOKUP of a name, which ends with a zero, in the node `parent` of `set_nodes`.

        Unless it `may_wait`, False if the kernel does not have it at hand (and the lower is not quick).
        """

    def fetch(self, directory: int, names: list[bytes], /) -> bool:
        """Have threads look at names in an open directory, and the request asked last asked once more then.

        After that the kernel has the names at hand. False: there is no memory, descriptor or thread for it,
        and who is asked has to wait itself.
        """

    def open_in_thread(self, descriptor: int, flags: int, /) -> bool:
        """Have a thread open the file at `descriptor` (O_PATH), and the OPEN asked last asked once more.

        Then it has to be answered, with what `opened` says, also if it was given up. False: as `fetch`.
        """

    def opened(self) -> tuple[int, tuple[int, ...], tuple[int, int, int]] | None:
        """Return what a thread has opened for the request asked last, None if none has tried.

        A descriptor, the caller's from now on, and what stat says of it: mode, number, device, links, user,
        group and size; nanoseconds of access, modification and change. OSError if it could not.
        """

    def drain(self) -> None:
        """Pass on to the kernel what libfuse has replied; by the thread that calls `serve`."""

    def pause(self, paused: bool, /) -> None:
        """Have the helpers leave the device alone, or not any more."""

    def watched(self) -> None:
        """Take it that the thread that calls `serve` tells gates of changes underneath as they are reported.

        While it stays away, a local file is asked whether it has changed before a READ of it is answered.
        """

    @property
    def quiet(self) -> bool:
        """Whether nothing is in hand: no helper at work, no request for libfuse, no reply for the kernel."""

    @property
    def full(self) -> bool:
        """Whether no request is read from the device until libfuse has answered more."""

    def take(self, size: int, /) -> ReaderBuffer:
        """Return a page-aligned buffer of at least `size` bytes.

        For any thread, as are `send` and `payload`.
        """

    def send(self, buffer: ReaderBuffer, start: int, length: int, error: int = 0, /) -> bytes:
        """Return what to reply to a READ to have it answered with these bytes of a buffer, which is not to be
        changed any more; once for each that was taken. `error`: the errno that the bytes end before; a
        program gets the bytes, and the kernel, where it fills its own cache, the error."""

    def payload(self, number: bytes, /) -> ReaderBuffer:
        """Return what a WRITE brings, given the data that libfuse has got of it. ValueError if there is none.

        To be called before it is answered.
        """

    def use_rings(self, rings: Rings, /) -> None:
        """Take requests by these rings, now that the reply to INIT has asked for them; once.

        OSError: the kernel takes none, or not all; requests then come by the device.
        """

    def set_pool(self, pool: Pool | None, /) -> None:
        """Use this pool from now on; returns when no thread uses the one before. One thread at a time."""

    def set_nodes(self, nodes: Nodes[_N], answers: bool, /) -> None:
        """Use these from now on, once. `answers`: GETATTRs are answered from them."""

    def set_listings(self, listings: Listings, /) -> None:
        """Answer what is asked of directories from these, once, and after `set_nodes`: nothing of it is put
        by for `asked`."""

    def list(self, number: int, fh: int, /) -> None:
        """Have a READDIRPLUS that libfuse has got, given the offset that it got, answered from a listing once
        libfuse has replied with nothing. However long the lower takes. OSError."""

    def open(self, fh: int, descriptor: int, gate: Gate, local: bool = False, /) -> None:
        """Serve the open file `fh` by `descriptor` until `close_file`; `local`: its size is known at once."""

    def close_file(self, fh: int, /) -> bool:
        """Serve a file no more; True if a thread has not done with its descriptor, and will close it."""

    def stream(self, fh: int, at: int, /) -> None:
        """Pass misses of a stream on whose reader comes to the byte `at` next; 2**64 - 1: it is over."""

    def mark(self, fh: int, offset: int, end: int, /) -> None:
        """Pass its READ on that gets beyond the byte `offset`, and forget the mark.

        Its misses are passed on up to the byte `end`.
        """

    def position(self, fh: int, /) -> int:
        """Return up to where the reader of the stream has come; 2**64 - 1 without one."""

    def note(self, fh: int, /) -> None:
        """Pass the next hit on, unless something is missed before."""

    def follows(self, fh: int, offset: int, /) -> bool:
        """Say whether one of the last misses of the file ended at the byte `offset`."""

    def pass_through(self, fh: int, backing_id: int, /) -> None:
        """Have the reply to the OPEN or CREATE that will give out `fh` ask for FUSE passthrough."""

    def counters(self) -> dict[str, int]:
        """Return what was answered here, by the names of `fs.statistics`; ahead_reads: hits that had been
        fetched before they were asked for; forwarded: requests passed on; given_up: those of programs that
        were killed; woken: how often a helper was."""

    def close(self) -> None:
        """End the helpers. No thread may be in `serve`."""

class Headroom:
    """Keeps memory free for others by lowering the limit of a segment, see native/headroom.c."""

    def __init__(self, segment: Segment, meminfo: str, groups: list[tuple[str, str, str]], /) -> None:
        """`groups`: the files with the limit, the usage and the statistics of each control group."""

    def run(self) -> None:
        """Make room until `end`, or until the segment ends. By a thread of its own, which it has scheduled
        before others if it may."""

    def end(self) -> None:
        """Have `run` return. Any thread, as for those below."""

    def give_back(self, keep_bytes: int, local: bool, /) -> None:
        """Have `run` look now; `keep_bytes` stay backed, and this machine swaps to the segment or not."""

    def look(self) -> tuple[int, int, int, int]:
        """Return bytes: used by the segment, its limit, spare beyond the margin, and that margin. Not while
        `run` runs."""

    def decide(
        self, now_s: float, used: int, limit: int, spare: int, margin: int, least: int, most: int, /
    ) -> tuple[int, int, bool, float]:
        """Return what `run` would do: limit, limit of persistent pages, whether pages that were hit go too,
        and the seconds until the next look. For tests."""

    @property
    def lowered_s(self) -> float:
        """When the limit was lowered last, or could not be for it is the least; monotonic, 0: never."""

    def statistics(self) -> dict[str, int]:
        """Return what the last look saw and what has been done, by the names of `resizing.ResizeStatistics`;
        short: whether pages that were hit had to go since the last call."""
