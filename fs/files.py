"""Open files: open, create, read, write, fsync, close.

A read that lies in the pool is answered at once, on the event loop, into a reused buffer; so is a small one
whose missing pages the kernel has cached. Everything else goes to a worker thread. Either way the missing
pages are put and dropped from the kernel's page cache, so that no second copy stays. Without a pool, what the
kernel has cached is read at once (RWF_NOWAIT). The last page is kept padded with zeros and cut to the file's
size, which is asked for whenever a request reaches the end. Writes go through to the lower file between two
flushes (`coherence`). Only whole-file state that the event loop owns is touched here outside worker threads;
`pause` is called at named points for tests of interleavings.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import lower
from tmem.fs.acting import Caller, acting_as
from tmem.fs.base import errors
from tmem.fs.buffers import Buffers
from tmem.fs.coherence import FileState
from tmem.fs.inodes import Inode, proc_path
from tmem.fs.namespace import Namespace
from tmem.fs.policy import DEFAULT, Policy
from tmem.fs.precache import ignore_pool
from tmem.fs.readahead import NEVER, Stream, Streams
from tmem.fs.reading import Reading
from tmem.fs.rules import path_below
from tmem.fs.state import SavedFile
from tmem.fs.worth import Account, Worth
from tmem.types import MAX_INDEX, PAGE_SIZE

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, FileInfo, RequestContext

_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_TRUNC | os.O_NOATIME
_PAGE_MASK = PAGE_SIZE - 1
_AT_ONCE_BYTES = 64 << 10
"""What is read on the event loop if the kernel has it: to compress this much takes some 80 us."""
_REORDERED_BYTES = 1 << 20
"""A request so far beyond the one before belongs to the same stream: the kernel sends several at a time."""
_AHEAD_SHARE = 32
"""A stream is read ahead by at most this part of the pool's memory."""

Pause = Callable[[str], None]
"""Called in worker threads, at ``read:lower-read`` (before the put), ``write:flushed``, ``write:written`` and
``truncate:done``."""


def no_pause(point: str) -> None:
    """Do nothing."""


@dataclass(eq=False, slots=True)
class OpenFile:
    """One open file of the mount."""

    inode: Inode
    state: FileState
    descriptor: int
    writable: bool
    append: bool
    stream_start: int = 0
    """Where the stretch of bytes began that ends at `stream_end` and was put as it was read."""
    stream_end: int = 0
    exact: bool = False
    """Whether the kernel reads no more of the lower file than it is asked for."""
    ahead: Stream | None = None
    """What is read ahead of it."""
    marker: int = NEVER
    """The page that tells, when it is read, that more can be read ahead."""
    number: int = 0
    """The handle."""
    loads: int = 0
    """Reads of the lower file for the pool that are under way."""
    side_by_side: tuple[int, int] | None = None
    """The bytes that were put by reads that were under way at a time."""
    caller: Caller | None = None
    """Who opened it; None after the code was replaced."""
    accessed: bool = False
    """Whether its access time needs no more care."""


class Files(Namespace):
    """Handlers of open files.

    `cached` says whether the kernel caches what is read from a file with this status (else direct_io);
    `clock` is a monotonic clock in seconds.
    """

    def __init__(
        self,
        *arguments: object,
        cached: Callable[[os.stat_result], bool],
        pause: Pause = no_pause,
        policy: Policy = DEFAULT,
        clock: Callable[[], float] = time.monotonic,
        **keywords: object,
    ) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._cached = cached
        self._pause = pause
        self._policy = policy
        self._worth = Worth(self._account, clock)
        self._streams = Streams()
        self._no_atimes = bool(os.fstatvfs(self.table.root).f_flag & (os.ST_NOATIME | os.ST_RDONLY))
        self._counted: dict[str, int] = {}  # of its counters, what ours have already
        self._files: dict[int, OpenFile] = {}
        self._next_file = 1
        self._buffers = Buffers()

    async def open(self, inode: int, flags: int, ctx: "RequestContext") -> "FileInfo":
        """Open a file, and check whether its pages still show it."""
        with errors():
            node = self.table[inode]
            if flags & os.O_TRUNC:
                return await self._open_truncated(node, flags, Caller.of(ctx))
            path = self.table.path(node)
            unchanged: bool | None = None
            if flags & os.O_ACCMODE != os.O_RDONLY:
                # First with a descriptor that only reads: one of our own that writes hides other writers.
                with contextlib.suppress(PermissionError):
                    unchanged = self._validate(node, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            descriptor = os.open(path, (flags & _KEPT_FLAGS) | os.O_CLOEXEC)
            return self._opened(node, descriptor, flags, Caller.of(ctx), unchanged)

    def _validate(self, inode: Inode, descriptor: int) -> bool:
        """Check with `descriptor`, which is closed, whether the file's pages still show it."""
        try:
            return self.coherence.validate(self.state_of(inode), os.fstat(descriptor), descriptor)
        finally:
            os.close(descriptor)

    async def _open_truncated(self, inode: Inode, flags: int, caller: Caller | None = None) -> "FileInfo":
        # Opened without O_TRUNC first: the change needs a descriptor before it happens.
        descriptor = os.open(self.table.path(inode), (flags & _KEPT_FLAGS & ~os.O_TRUNC) | os.O_CLOEXEC)
        try:
            with self.coherence.change(self.state_of(inode), descriptor) as change:
                change.flush(0, None)
                try:
                    before = os.fstat(descriptor)
                    # By its path: it may be open for reading only.
                    await self.in_thread(os.truncate, proc_path(descriptor), 0)
                    self.lose_set_ids(inode, descriptor, before, caller)
                finally:
                    change.flush(0, None)
        except BaseException:
            os.close(descriptor)
            raise
        return self._opened(inode, descriptor, flags, caller)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: "RequestContext"
    ) -> tuple["FileInfo", "EntryAttributes"]:
        """Create a file and open it."""
        with errors():
            wanted = (flags & (_KEPT_FLAGS | os.O_EXCL)) | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            directory = self.table.descriptor(self.table[parent_inode])
            with acting_as(ctx):
                descriptor = os.open(name, wanted & ~os.O_TRUNC, stat.S_IMODE(mode), dir_fd=directory)
            try:
                entry = self.enter(self.table[parent_inode], name)
                node = self.table[entry.st_ino]
                if flags & os.O_TRUNC:  # it may have come into being underneath
                    with self.coherence.change(node.state, descriptor) as change:
                        change.flush(0, None)
                        os.ftruncate(descriptor, 0)
                        change.flush(0, None)
            except BaseException:
                os.close(descriptor)
                raise
            return self._opened(node, descriptor, flags, Caller.of(ctx)), entry

    def _opened(
        self,
        inode: Inode,
        descriptor: int,
        flags: int,
        caller: Caller | None,
        unchanged: bool | None = None,
    ) -> "FileInfo":
        """Register an open file; `unchanged` is what its validation said, None if there was none yet."""
        try:
            self.precache.pool()  # senses a segment that has appeared
            state = self.state_of(inode)
            status = os.fstat(descriptor)
            if unchanged is None:
                unchanged = self.coherence.validate(state, status, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        number = self._next_file
        self._next_file += 1
        if not inode.opens:  # all opens of a file agree, as the kernel wants it where it passes them through
            inode.declined = self._declines(status, descriptor)
        self.precache.counters.declined_opens += inode.declined
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        file = OpenFile(
            inode, state, descriptor, writable, bool(flags & os.O_APPEND), number=number, caller=caller
        )
        file.accessed = self._no_atimes or bool(flags & os.O_NOATIME) or lower.was_accessed(status)
        self._files[number] = file
        inode.opens += 1
        if self._reading is not None and not inode.declined:
            self._reading.open(number, descriptor, state)
            if not file.accessed:
                self._reading.reader.mark(number, 0)  # so that the first read comes here, and is noted
        cached = self._cached(status)
        if cached and not unchanged:
            with contextlib.suppress(OSError):  # it may know no such inode; an old size must not cut reads
                pyfuse3.invalidate_inode(inode.nodeid, attr_only=True)
        return pyfuse3.FileInfo(fh=number, direct_io=not cached, keep_cache=cached and unchanged)

    def _declines(self, status: os.stat_result, descriptor: int) -> bool:
        """Say whether a file that is opened now is to be passed through."""
        if self._policy.steps_aside and self._worth.aside():
            return True
        return self._policy.rules.decline(status.st_size, lambda: path_below(self.table.root, descriptor))

    def _account(self) -> Account:
        """Tell how caching stands."""
        self.count_native_hits()
        counters = self.precache.counters
        evicted, stored = self.precache.turnover()
        return Account(
            hit_pages=counters.hit_pages,
            ahead_pages=counters.ahead_pages,
            miss_reads=counters.miss_reads,
            lower_pages=counters.miss_pages + counters.ahead_pages,
            lower_ns=counters.lower_ns,
            put_ns=counters.put_ns,
            gone_pages=evicted + counters.refused_pages,
            stored_pages=stored,
        )

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; the bytes up to the end of the file. Returns a view of a reused buffer."""
        file = self._files[fh]
        if self.watch is not None:
            self.watch.catch_up()  # what is over now must show
        pool = self.precache.pool()
        end = off + size
        state = file.state
        if pool is None or not state.served or file.inode.declined or end > MAX_INDEX * PAGE_SIZE:
            return await self._pass_through(file, off, size)
        if end > state.size or state.changes:
            with errors():
                status = os.fstat(file.descriptor)
            if status.st_size != state.size and not state.changes:
                self.coherence.validate(state, status, file.descriptor)
            # Some file systems say 0 of files that have content. And while a file changes, its last page in
            # the pool ends at the size that was.
            if not status.st_size or (state.changes and status.st_size != state.size):
                return await self._pass_through(file, off, size)
            end = min(end, status.st_size)
            if end <= off:
                return b""
        first = off // PAGE_SIZE
        skip = off & _PAGE_MASK
        npages = (end + _PAGE_MASK) // PAGE_SIZE - first
        counters = self.precache.counters
        buffer = self._buffers.take(npages * PAGE_SIZE)
        found = self.precache.get(pool, state.oid, first, buffer[: npages * PAGE_SIZE])
        counters.hit_pages += found
        ahead = file.ahead
        if ahead is not None:
            if first + npages > file.marker:
                ahead.reached(first, first + npages)
            if found < npages and ahead.running:
                with self._waiting():
                    moved = await ahead.wait(first + found, first + npages)
                if moved:
                    counters.hit_pages -= found
                    self._buffers.give(buffer)
                    return await self.read(fh, off, size)
        if found == npages:
            if not file.accessed:
                file.accessed = True
                lower.note_access(file.descriptor)
            counters.hit_reads += 1
            counters.hit_bytes += end - off
            self._buffers.give(buffer)
            return buffer[skip : skip + end - off]  # type: ignore[return-value]  # any buffer will do
        counters.miss_reads += 1
        counters.miss_pages += npages - found
        try:
            with errors():
                filled = await self._fill(file, buffer, first, found, npages)
        finally:
            self._buffers.give(buffer)
        return buffer[skip : max(min(skip + end - off, filled), skip)]  # type: ignore[return-value]

    async def _fill(self, file: OpenFile, buffer: memoryview, first: int, found: int, npages: int) -> int:
        """Read the pages that were not found from the lower file, put them; the valid bytes in `buffer`."""
        missing = buffer[found * PAGE_SIZE : npages * PAGE_SIZE]
        index = first + found
        start = index * PAGE_SIZE
        if file.ahead is not None and file.ahead.covers(index):
            file.ahead.missed(index, first + npages)
        elif file.stream_end == start > 0:
            self._begin_ahead(file, first, first + npages)
        elif not file.stream_start <= start <= file.stream_end + _REORDERED_BYTES or file.stream_end < 0:
            file.stream_start = start
        file.stream_end = start + len(missing)  # before it is done: the kernel's own requests may overlap
        count, stored = await self._load(file, index, missing, file.stream_start)
        if not stored:
            file.stream_end = -1
        return found * PAGE_SIZE + count

    async def _load(self, file: OpenFile, index: int, pages: memoryview, put_from: int) -> tuple[int, bool]:
        """Read the pages from `index` on, put them, and drop them from the kernel's page cache.

        The bytes read, and whether all pages are now in the pool, as are those from byte `put_from` on.
        """
        state, descriptor = file.state, file.descriptor
        token = self.coherence.read_token(state)
        start = index * PAGE_SIZE
        if not file.exact:
            file.exact = True
            lower.read_exactly(descriptor, True)

        def put(count: int) -> tuple[int, int | None, int]:
            whole = lower.whole_pages(start, count, state.size)
            self._pause("read:lower-read")
            if not whole:
                return 0, 0, 0
            if count < whole * PAGE_SIZE:
                pages[count : whole * PAGE_SIZE] = bytes(whole * PAGE_SIZE - count)
            begun = time.monotonic_ns()
            stored = self.coherence.put_if(state, token, descriptor, index, pages[: whole * PAGE_SIZE])
            put_ns = time.monotonic_ns() - begun
            if stored == whole:
                lower.drop_cached(descriptor, start, start + whole * PAGE_SIZE, put_from, state.size)
            return whole, stored, put_ns

        def work() -> tuple[int, OSError | None, int, int, int | None, int]:
            begun = time.monotonic_ns()
            count, failure = lower.read_until_error(descriptor, start, pages)
            lower_ns = time.monotonic_ns() - begun
            return count, failure, lower_ns, *put(count)

        begun, count, failure = time.monotonic_ns(), 0, None
        # Who holds reads up at `pause` may do so in threads only.
        if len(pages) <= _AT_ONCE_BYTES and not state.lock.locked() and self._pause is no_pause:
            count = lower.read_cached(descriptor, start, pages)
        lower_ns = time.monotonic_ns() - begun
        if count and (count == len(pages) or start + count == state.size):
            whole, stored, put_ns = put(count)  # nothing of this waits, and a thread would cost 200 us
        else:
            file.loads += 1
            try:
                count, failure, lower_ns, whole, stored, put_ns = await self.in_thread(work)
            finally:
                file.loads -= 1
        if whole and stored == whole:
            self._drop_together(file, put_from, start + whole * PAGE_SIZE)
        counters = self.precache.counters
        counters.lower_bytes += count
        counters.lower_ns += lower_ns
        counters.put_ns += put_ns
        if stored is None:
            counters.overtaken_pages += whole
        else:
            counters.put_pages += stored
            counters.refused_pages += whole - stored
        if failure is not None:  # not fewer bytes: in the kernel's cache that would mean zeros from there on
            raise failure
        return count, stored == whole == -(-count // PAGE_SIZE)

    def _drop_together(self, file: OpenFile, start: int, end: int) -> None:
        """Drop once more what was put from `start` to `end`, when the last of several reads is done.

        Each keeps the others from dropping a folio that it reads from.
        """
        if file.side_by_side is not None:
            start, end = min(start, file.side_by_side[0]), max(end, file.side_by_side[1])
        elif not file.loads:
            return
        file.side_by_side = (start, end) if file.loads else None
        if not file.loads:
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def _begin_ahead(self, file: OpenFile, first: int, last: int) -> None:
        """Begin to read ahead of a reader that is about to read the pages from `first` to before `last`."""
        most = min(self._policy.ahead_bytes, self.precache.room_bytes() // _AHEAD_SHARE) // PAGE_SIZE
        if most and (file.ahead is None or not file.ahead.running):
            source = _Source(self, file, file.stream_start)
            file.ahead = Stream(source, self._streams, last, last - first, most)
            file.ahead.extend(last)

    async def _pass_through(self, file: OpenFile, off: int, size: int) -> bytes:
        """Read from the lower file alone, at once if the kernel has it."""
        buffer = self._buffers.take(size)
        wanted = buffer[:size]
        if file.exact:
            file.exact = False
            lower.read_exactly(file.descriptor, False)
        try:
            with errors():
                count = lower.read_cached(file.descriptor, off, wanted)
                end = os.fstat(file.descriptor).st_size
                if count < size and (off + count < end or not end):
                    count += await self.in_thread(
                        lower.read_fully, file.descriptor, off + count, wanted[count:]
                    )
        finally:
            self._buffers.give(buffer)
        self.precache.counters.passthrough_reads += 1
        self.precache.counters.lower_bytes += count
        return wanted[:count]  # type: ignore[return-value]  # any buffer will do

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to the lower file, between two flushes of the pages it touches."""
        file = self._files[fh]
        descriptor = file.descriptor
        with errors(), self.coherence.change(file.state, descriptor) as change:
            start: int = off
            end: int | None = off + len(buf)
            if file.append:  # the lower file appends where its end is, not where the kernel believes
                start, end = min(off, os.fstat(descriptor).st_size), None
            change.flush(start, end)

            def work() -> int:
                self._pause("write:flushed")
                try:
                    written = lower.write_fully(descriptor, off, buf)
                    self._pause("write:written")
                    return written
                finally:
                    change.flush(start, end)

            written = await self.in_thread(work)
            # FUSE does not say who writes; who opened the file stands for him.
            self.lose_set_ids(file.inode, descriptor, os.fstat(descriptor), file.caller)
            return written

    async def flush(self, fh: int) -> None:
        """Let the lower file system report what it reports at close."""
        file = self._files[fh]
        if file.writable:
            with errors(), self._distrusting(file):
                await self.in_thread(os.close, os.dup(file.descriptor))

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make content durable."""
        file = self._files[fh]
        with errors(), self._distrusting(file):
            await self.in_thread(os.fdatasync if datasync else os.fsync, file.descriptor)

    @contextlib.contextmanager
    def _distrusting(self, file: OpenFile) -> Iterator[None]:
        """Keep no pages of a file whose lower could not write what it had taken."""
        try:
            yield
        except OSError:
            self.coherence.distrust(file.state)
            raise

    async def release(self, fh: int) -> None:
        """Close; a file without a name loses its pages with its last close."""
        if self._reading is not None:
            self._reading.close(fh)
        file = self._files.pop(fh)
        if file.ahead is not None and file.ahead.running:
            with self._waiting():
                await file.ahead.close()
        file.inode.opens -= 1
        with errors():
            try:
                if not file.inode.opens:
                    self.discard_if_unlinked(file.descriptor)
            finally:
                os.close(file.descriptor)

    def resize(self, descriptor: int, size: int, fh: int | None) -> None:
        """Truncate through the open file if there is one: its mode may have changed since."""
        file = self._files.get(fh) if fh is not None else None
        if file is not None and file.writable:
            os.ftruncate(file.descriptor, size)
        else:
            super().resize(descriptor, size, fh)
        self._pause("truncate:done")

    def read_by(self, reading: Reading | None) -> None:
        """Have hits answered by a native reader from now on, or not any more."""
        self.count_native_hits()
        self._reading, self._counted = reading, {}
        self.precache.on_pool = reading.use_pool if reading is not None else ignore_pool
        if reading is not None:
            reading.use_pool(self.precache.current)
            for number, file in self._files.items():
                if not file.inode.declined:
                    reading.open(number, file.descriptor, file.state)

    def count_native_hits(self) -> None:
        """Bring the counters up to date with what the native reader has answered."""
        if self._reading is None:
            return
        counted, before = self._reading.reader.counters(), self._counted
        counters = self.precache.counters
        counters.hit_reads += counted["hit_reads"] - before.get("hit_reads", 0)
        counters.hit_pages += counted["hit_pages"] - before.get("hit_pages", 0)
        counters.hit_bytes += counted["hit_bytes"] - before.get("hit_bytes", 0)
        self._counted = counted

    def used_by_files(self) -> list[Inode]:
        """Return the inodes of open files."""
        return [file.inode for file in self._files.values()]

    def saved_files(self, places: dict[Inode, int]) -> tuple[list[SavedFile], int]:
        """Return the open files, with their inodes as `places`, and the next handle."""
        files = [
            (number, places[file.inode], file.descriptor, file.writable, file.append, file.inode.declined)
            for number, file in self._files.items()
        ]
        return files, self._next_file

    def restore_files(self, saved: list[SavedFile], next_file: int, inodes: list[Inode]) -> None:
        """Have the files open that were saved."""
        self._next_file = next_file
        for number, place, descriptor, writable, append, declined in saved:
            inode = inodes[place]
            inode.declined = declined
            assert inode.state is not None
            self._files[number] = OpenFile(inode, inode.state, descriptor, writable, append, number=number)
            inode.opens += 1

    def close_files(self) -> None:
        """Close what is still open at the end of the mount."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)


class _Source:
    """An open file as `readahead.Stream` sees it."""

    def __init__(self, files: Files, file: OpenFile, put_from: int) -> None:
        self._files = files
        self._file = file
        self._put_from = put_from

    def length(self) -> int:
        return min(-(-self._file.state.size // PAGE_SIZE), MAX_INDEX)

    async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
        ranges = self._files.precache.absent(self._file.state.oid, first, last)
        await self._files.in_thread(lower.prefetch, self._file.descriptor, ranges)
        return ranges

    async def load(self, first: int, last: int) -> bool:
        buffers = self._files._buffers
        buffer = buffers.take((last - first) * PAGE_SIZE)
        try:
            pages = buffer[: (last - first) * PAGE_SIZE]
            count, stored = await self._files._load(self._file, first, pages, self._put_from)
        finally:
            buffers.give(buffer)
        if stored:
            self._files.precache.counters.ahead_pages += -(-count // PAGE_SIZE)
        return stored and count > 0

    def leave(self, first: int, last: int) -> None:
        start, end = first * PAGE_SIZE, last * PAGE_SIZE
        lower.drop_cached(self._file.descriptor, start, end, start, end + 1)

    def mark(self, page: int) -> None:
        self._file.marker = page
        if page != NEVER and self._files._reading is not None:
            self._files._reading.reader.mark(self._file.number, page * PAGE_SIZE)
