"""What is done with open files: read, write, fsync, truncate.

A read that lies in the pool is answered at once, on the event loop, into a reused buffer; what is missing is
loaded (`loading`). Without a pool, what the kernel has cached is read at once (RWF_NOWAIT). The last page is
kept padded with zeros and cut to the file's size, which is asked for whenever a request reaches the end.
Writes go through to the lower file between two flushes (`coherence`). Only whole-file state that the event
loop owns is touched here outside worker threads; `pause` is called at named points for tests of
interleavings.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import lower
from tmem.fs.acting import drop_set_ids, within_limits
from tmem.fs.base import FAILURES, errno_seen, errors
from tmem.fs.buffers import Buffers
from tmem.fs.extents import Extents
from tmem.fs.loading import Loader
from tmem.fs.openfile import OpenFile, Pause, no_pause
from tmem.fs.policy import DEFAULT, Policy
from tmem.fs.reading import Reading
from tmem.types import MAX_INDEX, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends._native import Pool

_PAGE_MASK = PAGE_SIZE - 1


class Files(Extents):
    """Handlers of open files."""

    def __init__(
        self, *arguments: object, pause: Pause = no_pause, policy: Policy = DEFAULT, **keywords: object
    ) -> None:
        super().__init__(*arguments, policy=policy, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._pause = pause
        self._loader = Loader(self, policy, pause)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; the bytes up to the end of the file. Returns what `Buffers.reply` does."""
        try:
            return await self._read(fh, off, size)
        except FAILURES as failure:
            raise pyfuse3.FUSEError(errno_seen(failure)) from None

    async def _read(self, fh: int, off: int, size: int) -> bytes:
        """Do that. OSError, TmemError, MemoryError."""
        file = self._files[fh]
        if self.watch is not None:
            self.watch.catch_up()  # what is over now must show
        end = off + size
        state = file.state
        status: os.stat_result | None = None
        pool = self._pool_of(file, end)
        if pool is not None and (end > state.size or state.changes) and not self.is_here(file.inode):
            status = await self._status_elsewhere(file)
            pool = None if status is None else self._pool_of(file, end)
        if pool is None:
            return await self._pass_through(file, off, size)
        if end > state.size or state.changes:
            if status is None:
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
        buffer = self._loader.buffers.take(npages * PAGE_SIZE)
        found = self.precache.get(pool, state.oid, first, buffer[: npages * PAGE_SIZE])
        counters.hit_pages += found
        ahead = file.ahead
        if ahead is not None:
            ahead.comes(first, first + npages)
            if found < npages and ahead.running:
                with self._waiting(), file.used():  # it goes on with the handle after that
                    moved = await ahead.wait(first + found, first + npages)
                if moved:
                    counters.hit_pages -= found
                    self._loader.buffers.give(buffer)
                    return await self._read(fh, off, size)
        if found == npages:
            if not file.accessed:
                file.accessed = True
                lower.note_access(file.descriptor)
            counters.hit_reads += 1
            counters.hit_bytes += end - off
            return self._loader.buffers.reply(buffer, skip, end - off)
        counters.miss_reads += 1
        counters.miss_pages += npages - found
        try:
            filled, failure = await self._loader.fill(file, buffer, first, found, npages)
        except BaseException:
            self._loader.buffers.give(buffer)
            raise
        count = max(min(end - off, filled - skip), 0)
        if failure is not None and count < end - off:
            return self._loader.buffers.reply_before(buffer, skip, count, failure)
        return self._loader.buffers.reply(buffer, skip, count)

    def _pool_of(self, file: OpenFile, end: int) -> "Pool | None":
        """Return the pool that reads of a file up to byte `end` may be answered from, if any."""
        pool = self.precache.pool()
        used = file.state.served and not file.inode.declined and end <= MAX_INDEX * PAGE_SIZE
        return pool if used else None

    async def _status_elsewhere(self, file: OpenFile) -> os.stat_result | None:
        """Return the status of a file whose lower may not answer, None if a change of ours is beside it."""
        if file.state.changes:
            return None
        turn = file.state.turn
        with file.used():
            status = await self.read_in_thread(file.inode, os.fstat, file.descriptor)
        return status if file.state.turn == turn else None

    async def _pass_through(self, file: OpenFile, off: int, size: int) -> bytes:
        """Read from the lower file alone, at once if the kernel has it."""
        buffer = self._loader.buffers.take(size)
        wanted = buffer[:size]
        if file.exact or file.state.takes:  # so does the native reader
            file.exact = False
            lower.read_exactly(file.descriptor, False)
        failure = None
        try:
            count = lower.read_cached(file.descriptor, off, wanted)
            if count < size and not self._ends_at(file, off + count):
                with file.used():
                    more, failure = await self.read_in_thread(
                        file.inode, lower.read_until_error, file.descriptor, off + count, wanted[count:]
                    )
                    count += more
        except BaseException as error:
            if isinstance(error, OSError):
                self.precache.counters.lower_errors += 1
            self._loader.buffers.give(buffer)
            raise
        if failure is not None:
            self.precache.counters.lower_errors += 1
            return self._loader.buffers.reply_before(buffer, 0, count, failure)
        self.precache.counters.passthrough_reads += 1
        self.precache.counters.lower_bytes += count
        return self._loader.buffers.reply(buffer, 0, count)

    def _ends_at(self, file: OpenFile, end: int) -> bool:
        """Say whether a file is known to end there. What may not answer is not asked, but read."""
        if not self.is_here(file.inode):
            return False
        size = os.fstat(file.descriptor).st_size
        return 0 < size <= end

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to the lower file, between two flushes of the pages it touches."""
        file = self._files[fh]
        descriptor = file.descriptor
        data = self._loader.buffers.payload(buf)
        limits = self.limits_of(file.inode, file.caller)
        lost = False

        def work() -> int:
            nonlocal lost
            with change.seen(descriptor):
                start: int = off
                end: int | None = off + len(data)
                status = os.fstat(descriptor)
                if file.append:  # the lower file appends where its end is, not where the kernel believes
                    start, end = min(off, status.st_size), None
                # First, as on the lower: what fails after the write is no reason to say that it failed. FUSE
                # does not say who writes; who opened the file stands for him.
                lost = drop_set_ids(descriptor, status, file.caller)
                change.flush(start, end)
                self._pause("write:flushed")
                try:
                    with within_limits(limits):
                        written = lower.write_fully(descriptor, off, data)
                    self._pause("write:written")
                    return written
                finally:
                    change.flush(start, end)

        with errors(), self.change_of(file.state, descriptor, self.is_here(file.inode)) as change:
            try:
                return await self.change_in_thread(work)
            finally:
                self.tell_lost(file.inode, lost)
                self.rewrites += 1

    async def flush(self, fh: int) -> None:
        """Let the lower file system report what it reports at close."""
        file = self._files[fh]
        if file.writable:
            with errors():
                descriptor = os.dup(file.descriptor)
                with self._distrusting(file):
                    await self.change_in_thread(os.close, descriptor)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make content durable."""
        file = self._files[fh]
        with errors(), self._distrusting(file), file.used():
            await self.change_in_thread(os.fdatasync if datasync else os.fsync, file.descriptor)

    @contextlib.contextmanager
    def _distrusting(self, file: OpenFile) -> Iterator[None]:
        """Keep no pages of a file whose lower could not write what it had taken."""
        try:
            yield
        except OSError:
            self.coherence.distrust(file.state)
            raise

    def read_by(self, reading: Reading | None) -> None:
        """Have hits answered by a native reader from now on, or not any more."""
        super().read_by(reading)
        self._loader.buffers = reading.buffers if reading is not None else Buffers()

    def resize(self, descriptor: int, size: int, fh: int | None) -> None:
        """Truncate through the open file if there is one: its mode may have changed since."""
        file = self._files.get(fh) if fh is not None else None
        if file is not None and file.writable:
            os.ftruncate(file.descriptor, size)
        else:
            super().resize(descriptor, size, fh)
        self._pause("truncate:done")
