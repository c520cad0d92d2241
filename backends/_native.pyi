"""The native core as Python sees it. Sources in ``native/``; `tmem.backends.segment` is the way in.

Threading: every method may be called from any thread, of any process that has the segment attached. Calls on
single pages keep the GIL; calls on 16 pages or more release it. After a fork the child may go on using the
objects (each thread registers itself with the segment at its first call).

Buffers are C-contiguous; no reference is kept after return. Errors: `tmem.errors.SegmentError`,
`PoolError`, `CorruptPageError`; TypeError and ValueError for arguments out of range.
"""

from typing import final

from typing_extensions import Buffer

PAGE_SIZE: int
OID_SIZE: int
VERSION: int  # of the segment's layout

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
    def alive(self) -> bool:
        """False once the segment was destroyed; costs one memory read."""

    def client(self, name: str, create: bool = True) -> Client:
        """Return the client called `name` (1 to 63 bytes of UTF-8), creating it unless told not to."""

    def clients(self) -> list[Client]: ...
    def statistics(self) -> dict[str, int]:
        """Counters of the whole segment; see `tmem.backends.statistics.SegmentStatistics`."""

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

    def freeable_bytes(self) -> int:
        """Free memory of the segment plus everything that ephemeral pages occupy."""

    def close(self) -> None:
        """Detach. Objects that came from this mapping raise SegmentError from then on."""

@final
class Client:
    """A client of the segment: a guest, a swap device, a mount. Equality is by identity in the segment."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def cap_bytes(self) -> int:
        """The most memory that the client's pages may occupy; 0 is no limit. Settable."""
    @cap_bytes.setter
    def cap_bytes(self, value: int) -> None: ...
    def new_pool(self, persistent: bool, exclusive: bool | None = None) -> Pool:
        """Create a private pool. `exclusive`: a get removes the page; default True if ephemeral."""

    def pools(self) -> list[Pool]: ...
    def pool(self, id: int) -> Pool: ...
    def statistics(self) -> dict[str, int]: ...
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

    def statistics(self) -> dict[str, int]: ...
    def destroy(self) -> None: ...

@final
class Device:
    """A block device of `size_bytes` on one object of a persistent pool, with nbdkit's callbacks.

    The first argument `h` of each is nbdkit's handle and ignored. A refused write raises OSError(ENOSPC), a
    corrupt page OSError(EIO), and tells nbdkit so; bytes never written read as zeros. Requests that are not
    whole pages are read-modify-write, atomic per page. With `pin_threads` the calling thread's Python thread
    state is kept from its first call until the thread ends, which makes these callbacks cheap in nbdkit;
    never for threads that Python itself started.
    """

    def __init__(self, pool: Pool, oid: bytes, size_bytes: int, pin_threads: bool = False) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    def pread(self, h: object, buf: Buffer, offset: int, flags: int) -> None: ...
    def pwrite(self, h: object, buf: Buffer, offset: int, flags: int) -> None: ...
    def zero(self, h: object, count: int, offset: int, flags: int) -> None: ...
    def trim(self, h: object, count: int, offset: int, flags: int) -> None: ...
    def extents(self, h: object, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]: ...
