"""Open files: open, create, read, write, fsync, close.

A read that lies in the pool is answered at once, on the event loop, into a reused buffer. Everything else
goes to a worker thread, which reads the missing pages, puts them and drops them from the kernel's page cache,
so that no second copy stays. Without a pool, what the kernel has cached is read at once (RWF_NOWAIT). The
last page is kept padded with zeros and cut to the file's size, which is asked for whenever a request reaches
the end. Writes go through to the lower file between two flushes (`coherence`). Only whole-file state that the
event loop owns is touched here outside worker threads; `pause` is called at named points for tests of
interleavings.
"""

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import lower
from tmem.fs.base import errors
from tmem.fs.buffers import Buffers
from tmem.fs.coherence import FileState
from tmem.fs.inodes import Inode
from tmem.fs.namespace import Namespace
from tmem.fs.state import SavedFile
from tmem.types import MAX_INDEX, PAGE_SIZE

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, FileInfo, RequestContext

_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_TRUNC
_PAGE_MASK = PAGE_SIZE - 1

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


class Files(Namespace):
    """Handlers of open files.

    `cached` says whether the kernel caches what is read from a file with this status (else direct_io).
    """

    def __init__(
        self,
        *arguments: object,
        cached: Callable[[os.stat_result], bool],
        pause: Pause = no_pause,
        **keywords: object,
    ) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._cached = cached
        self._pause = pause
        self._files: dict[int, OpenFile] = {}
        self._next_file = 1
        self._buffers = Buffers()

    async def open(self, inode: int, flags: int, ctx: "RequestContext") -> "FileInfo":
        """Open a file, and check whether its pages still show it."""
        with errors():
            node = self.table[inode]
            if flags & os.O_TRUNC:
                return await self._open_truncated(node, flags)
            path = self.table.path(node)
            unchanged: bool | None = None
            if flags & os.O_ACCMODE != os.O_RDONLY:
                # First with a descriptor that only reads: one of our own that writes hides other writers.
                with contextlib.suppress(PermissionError):
                    unchanged = self._validate(node, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            descriptor = os.open(path, (flags & _KEPT_FLAGS) | os.O_CLOEXEC)
            return self._opened(node, descriptor, flags, unchanged)

    def _validate(self, inode: Inode, descriptor: int) -> bool:
        """Check with `descriptor`, which is closed, whether the file's pages still show it."""
        try:
            return self.coherence.validate(self.state_of(inode), os.fstat(descriptor), descriptor)
        finally:
            os.close(descriptor)

    async def _open_truncated(self, inode: Inode, flags: int) -> "FileInfo":
        # Opened without O_TRUNC first: the change needs a descriptor before it happens.
        descriptor = os.open(self.table.path(inode), (flags & _KEPT_FLAGS & ~os.O_TRUNC) | os.O_CLOEXEC)
        try:
            with self.coherence.change(self.state_of(inode), descriptor) as change:
                change.flush(0, None)
                try:
                    await self.in_thread(os.ftruncate, descriptor, 0)
                finally:
                    change.flush(0, None)
        except BaseException:
            os.close(descriptor)
            raise
        return self._opened(inode, descriptor, flags)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: "RequestContext"
    ) -> tuple["FileInfo", "EntryAttributes"]:
        """Create a file and open it."""
        with errors():
            wanted = (flags & (_KEPT_FLAGS | os.O_EXCL)) | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            with self.new_name(parent_inode, name, ctx, mode) as directory:
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
            return self._opened(node, descriptor, flags), entry

    def _opened(self, inode: Inode, descriptor: int, flags: int, unchanged: bool | None = None) -> "FileInfo":
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
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        self._files[number] = OpenFile(inode, state, descriptor, writable, bool(flags & os.O_APPEND))
        inode.opens += 1
        cached = self._cached(status)
        if cached and not unchanged:
            with contextlib.suppress(OSError):  # it may know no such inode; an old size must not cut reads
                pyfuse3.invalidate_inode(inode.nodeid, attr_only=True)
        return pyfuse3.FileInfo(fh=number, direct_io=not cached, keep_cache=cached and unchanged)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; the bytes up to the end of the file. Returns a view of a reused buffer."""
        file = self._files[fh]
        pool = self.precache.pool()
        end = off + size
        state = file.state
        if pool is None or not state.served or end > MAX_INDEX * PAGE_SIZE:
            return await self._pass_through(file, off, size)
        if end > state.size or state.changes:
            status = os.fstat(file.descriptor)
            if status.st_size != state.size and not state.changes:
                self.coherence.validate(state, status, file.descriptor)
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
        if found == npages:
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
        state, descriptor = file.state, file.descriptor
        token = self.coherence.read_token(state)
        missing = buffer[found * PAGE_SIZE : npages * PAGE_SIZE]
        start = (first + found) * PAGE_SIZE

        def work() -> tuple[int, int, int | None]:
            count = lower.read_fully(descriptor, start, missing)
            whole = -(-count // PAGE_SIZE)
            self._pause("read:lower-read")
            if not whole:
                return 0, 0, 0
            if count < whole * PAGE_SIZE:
                missing[count : whole * PAGE_SIZE] = bytes(whole * PAGE_SIZE - count)
            pages = missing[: whole * PAGE_SIZE]
            stored = self.coherence.put_if(state, token, descriptor, first + found, pages)
            if stored == whole:
                lower.drop_cached(descriptor, start, start + whole * PAGE_SIZE, put_from, state.size)
            return count, whole, stored

        if file.stream_end != start:
            file.stream_start = start
        put_from = file.stream_start
        file.stream_end = start + len(missing)  # before it is done: read-ahead overlaps
        count, whole, stored = await self.in_thread(work)
        if stored != whole:
            file.stream_end = -1
        counters = self.precache.counters
        counters.lower_bytes += count
        if stored is None:
            counters.overtaken_pages += whole
        else:
            counters.put_pages += stored
            counters.refused_pages += whole - stored
        return found * PAGE_SIZE + count

    async def _pass_through(self, file: OpenFile, off: int, size: int) -> bytes:
        """Read from the lower file alone, at once if the kernel has it."""
        buffer = self._buffers.take(size)
        wanted = buffer[:size]
        try:
            with errors():
                count = lower.read_cached(file.descriptor, off, wanted)
                if count < size and off + count < os.fstat(file.descriptor).st_size:
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
                    lower.drop_privileges(descriptor)
                    return written
                finally:
                    change.flush(start, end)

            return await self.in_thread(work)

    async def flush(self, fh: int) -> None:
        """Let the lower file system report what it reports at close."""
        file = self._files[fh]
        if file.writable:
            with errors():
                await self.in_thread(os.close, os.dup(file.descriptor))

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make content durable."""
        with errors():
            await self.in_thread(os.fdatasync if datasync else os.fsync, self._files[fh].descriptor)

    async def release(self, fh: int) -> None:
        """Close; a file without a name loses its pages with its last close."""
        file = self._files.pop(fh)
        file.inode.opens -= 1
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

    def used_by_files(self) -> list[Inode]:
        """Return the inodes of open files."""
        return [file.inode for file in self._files.values()]

    def saved_files(self, places: dict[Inode, int]) -> tuple[list[SavedFile], int]:
        """Return the open files, with their inodes as `places`, and the next handle."""
        files = [
            (number, places[file.inode], file.descriptor, file.writable, file.append)
            for number, file in self._files.items()
        ]
        return files, self._next_file

    def restore_files(self, saved: list[SavedFile], next_file: int, inodes: list[Inode]) -> None:
        """Have the files open that were saved."""
        self._next_file = next_file
        for number, place, descriptor, writable, append in saved:
            inode = inodes[place]
            assert inode.state is not None
            self._files[number] = OpenFile(inode, inode.state, descriptor, writable, append)
            inode.opens += 1

    def close_files(self) -> None:
        """Close what is still open at the end of the mount."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)
