"""Loading pages of open files: from the lower file into the pool, and out of the kernel's page cache.

A small read whose bytes the kernel has cached is done at once; any other goes to a worker thread. Either way
the pages are put, if nobody changed the file meanwhile (`coherence`), and dropped from the kernel's page
cache, so that no second copy stays. Also what `readahead` reads from. Not for deciding what is cached.
Threading: the event loop's thread, except what is said to be in worker threads.
"""

import contextlib
import os
import time
from typing import TYPE_CHECKING

from tmem.fs import lower
from tmem.fs.base import Handlers
from tmem.fs.buffers import Buffers
from tmem.fs.identity import Content, common_name
from tmem.fs.openfile import OpenFile, Pause, no_pause
from tmem.fs.policy import Policy
from tmem.fs.readahead import NEVER, Stream, Streams
from tmem.types import MAX_INDEX, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.fs.beyond import Beyond

_AT_ONCE_BYTES = 64 << 10
"""What is read on the event loop if the kernel has it: to compress this much takes some 80 us."""
_REORDERED_BYTES = 1 << 20
"""A request so far beyond the one before belongs to the same stream: the kernel sends several at a time."""
_GAP_PAGES = 16
"""So many pages that are in the pool are read once more, if both before and after them some are missing."""
_AHEAD_SHARE = 32
"""A stream is read ahead by at most this part of the pool's memory."""


class Loader:
    """Loads pages for the handlers of one mount; `pause` is called before each put in a worker thread."""

    def __init__(self, handlers: Handlers, policy: Policy, pause: Pause) -> None:
        self._handlers = handlers
        self._policy = policy
        self._pause = pause
        self._streams = Streams()
        self.buffers = Buffers()

    async def fill(
        self, file: OpenFile, buffer: memoryview, first: int, found: int, npages: int
    ) -> tuple[int, OSError | None]:
        """Read the pages that were not found from the lower file, put them; the valid bytes in `buffer`.

        And what reading has ended with, if it has failed.
        """
        missing = buffer[found * PAGE_SIZE : npages * PAGE_SIZE]
        index = first + found
        start = index * PAGE_SIZE
        if file.ahead is not None and file.ahead.covers(first, first + npages):
            file.ahead.missed(index, first + npages)
        elif file.stream_end == start > 0:
            self._begin_ahead(file, first, first + npages)
        elif file.stream_end >= 0 and self._follows(file, start):
            file.stream_start = start  # what came before is dropped already
            self._begin_ahead(file, first, first + npages)
        elif not file.stream_start <= start <= file.stream_end + _REORDERED_BYTES or file.stream_end < 0:
            file.stream_start = start
        file.stream_end = start + len(missing)  # before it is done: the kernel's own requests may overlap
        put_from = min(file.stream_start, start)  # it may be late: the stream's next request was first
        count, stored, failure = await self.load(file, index, missing, put_from)
        if not stored:
            file.stream_end = -1
        return found * PAGE_SIZE + count, failure

    def _follows(self, file: OpenFile, start: int) -> bool:
        """Say whether the native reader answered a miss that ended at byte `start`."""
        reading = self._handlers.reading
        return reading is not None and reading.reader.follows(file.number, start)

    def _beyond(self, file: OpenFile, token: int | None) -> "tuple[Beyond, Content] | None":
        """Return whom to ask for the file's pages before the lower, and for what; None: nobody."""
        beyond, state, inode = self._handlers.beyond, file.state, file.inode
        if beyond is None or token is None or state.version is None or not state.served:
            return None
        if inode.key[0] != self._handlers.table.device:
            return None  # mounted below: whether it is there on other hosts is not said
        name = common_name(self._handlers.table.handle(inode), inode.key[1])
        return beyond, Content(name, state.version)

    async def load(
        self,
        file: OpenFile,
        index: int,
        pages: memoryview,
        put_from: int,
        missing: list[tuple[int, int]] | None = None,
    ) -> tuple[int, bool, OSError | None]:
        """Read the pages from `index` on, put them, and drop them from the kernel's page cache.

        Only the ranges of pages in `missing` are put, if given: the others are in the pool. The bytes read,
        whether all pages are now in the pool, as are those from byte `put_from` on, and what has failed.
        """
        state, descriptor = file.state, file.descriptor
        token = self._handlers.coherence.read_token(state)
        start = index * PAGE_SIZE
        others = self._beyond(file, token)
        if not file.exact:
            file.exact = True
            lower.read_exactly(descriptor, True)

        def put(count: int, known: int = 0) -> tuple[int, int, int | None, int]:
            whole = lower.whole_pages(start, count, state.size)
            self._pause("read:lower-read")
            if not whole:
                return 0, 0, 0, 0
            if count < whole * PAGE_SIZE:
                pages[count : whole * PAGE_SIZE] = bytes(whole * PAGE_SIZE - count)
            wanted = 0
            stored: int | None = 0
            begun = time.monotonic_ns()
            for first, last in missing or [(index, index + whole)]:
                part = pages[(first - index) * PAGE_SIZE : min(last - index, whole) * PAGE_SIZE]
                wanted += len(part) // PAGE_SIZE
                if not part:  # the file ends before
                    break
                put = self._handlers.coherence.put_if(state, token, descriptor, first, part)
                stored = None if stored is None or put is None else stored + put
            put_ns = time.monotonic_ns() - begun
            if stored is not None and others is not None:
                others[0].offer(others[1], start + known, pages[known:count])
            if stored == wanted:
                lower.drop_cached(descriptor, start, start + whole * PAGE_SIZE, put_from, state.size)
            return whole, wanted, stored, put_ns

        def work() -> tuple[int, int, OSError | None, int, tuple[int, int, int | None, int]]:
            begun = time.monotonic_ns()
            known = others[0].get(others[1], start, pages) if others is not None else 0
            count, failure = known, None
            if known % PAGE_SIZE == 0 and known < len(pages):  # else that was the end of the file
                more, failure = lower.read_until_error(descriptor, start + known, pages[known:])
                count += more
            lower_ns = time.monotonic_ns() - begun
            return known, count, failure, lower_ns, put(count, known)

        begun, known, count, failure = time.monotonic_ns(), 0, 0, None
        # Who holds reads up at `pause` may do so in threads only. A shared pool asks for the version to put.
        asks_nobody = self._handlers.coherence.takes_below or self._handlers.is_here(file.inode)
        at_once = len(pages) <= _AT_ONCE_BYTES and asks_nobody and self._pause is no_pause
        if at_once and not state.lock.locked():
            count = lower.read_cached(descriptor, start, pages)
        lower_ns = time.monotonic_ns() - begun
        if count and (count == len(pages) or start + count == state.size):
            # Nothing of this waits, and a thread would cost 200 us.
            whole, wanted, stored, put_ns = put(count)
        else:
            file.loads += 1
            try:
                with file.used():
                    known, count, failure, lower_ns, was_put = await self._handlers.read_in_thread(
                        file.inode, work
                    )
                    whole, wanted, stored, put_ns = was_put
            finally:
                file.loads -= 1
        if whole and stored == wanted:
            self._drop_together(file, put_from, start + whole * PAGE_SIZE)
        counters = self._handlers.precache.counters
        counters.lower_bytes += count - known
        counters.lower_ns += lower_ns
        counters.put_ns += put_ns
        if stored is None:
            counters.overtaken_pages += wanted
        else:
            counters.put_pages += stored
            counters.refused_pages += wanted - stored
        counters.lower_errors += failure is not None
        return count, not failure and stored == wanted and whole == -(-count // PAGE_SIZE), failure

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
        most = (
            min(self._policy.ahead_bytes, self._handlers.precache.room_bytes() // _AHEAD_SHARE) // PAGE_SIZE
        )
        if most and (file.ahead is None or not file.ahead.running):
            source = _Source(self._handlers, self, file, file.stream_start)
            file.ahead = Stream(source, self._streams, last, last - first, most)
            file.ahead.extend(last)


class _Source:
    """An open file as `readahead.Stream` sees it."""

    def __init__(self, handlers: Handlers, loader: Loader, file: OpenFile, put_from: int) -> None:
        self._handlers = handlers
        self._loader = loader
        self._file = file
        self._put_from = put_from

    def length(self) -> int:
        return min(-(-self._file.state.size // PAGE_SIZE), MAX_INDEX)

    async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
        ranges = self._handlers.precache.absent(self._file.state.oid, first, last)
        if self._handlers.beyond is None or not self._handlers.beyond.up:  # the lower may not be needed
            ranges = bridged(ranges)
            await self._handlers.read_in_thread(
                self._file.inode, lower.prefetch, self._file.descriptor, ranges
            )
        return ranges

    async def load(self, first: int, last: int) -> bool:
        missing = self._handlers.precache.absent(self._file.state.oid, first, last)
        if not missing:  # somebody else has put it meanwhile
            size = self._file.state.size
            start, end = first * PAGE_SIZE, min(last * PAGE_SIZE, size)
            lower.drop_cached(self._file.descriptor, start, end, self._put_from, size)
            return True
        buffers = self._loader.buffers
        buffer = buffers.take((last - first) * PAGE_SIZE)
        try:
            pages = buffer[: (last - first) * PAGE_SIZE]
            count, stored, failure = await self._loader.load(
                self._file, first, pages, self._put_from, missing
            )
        finally:
            buffers.give(buffer)
        if failure is not None:
            raise failure
        if stored:
            self._handlers.precache.counters.ahead_pages += sum(b - a for a, b in missing)
        return stored and count > 0

    def leave(self, first: int, last: int) -> None:
        start, end = first * PAGE_SIZE, last * PAGE_SIZE
        lower.drop_cached(self._file.descriptor, start, end, start, end + 1)

    def begin(self, page: int) -> None:
        if self._handlers.reading is not None:
            at = page * PAGE_SIZE if page != NEVER else NEVER
            self._handlers.reading.reader.stream(self._file.number, at)

    def mark(self, page: int, end: int) -> None:
        if self._handlers.reading is not None:
            self._handlers.reading.reader.mark(self._file.number, page * PAGE_SIZE, end * PAGE_SIZE)

    def position(self) -> int | None:
        if self._handlers.reading is None:
            return None
        at = self._handlers.reading.reader.position(self._file.number)
        return -(-at // PAGE_SIZE) if at != NEVER else None


def bridged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of pages without the gaps between them that take no longer to read than to leave out."""
    whole: list[tuple[int, int]] = []
    for first, last in ranges:
        if whole and first - whole[-1][1] <= _GAP_PAGES:
            whole[-1] = (whole[-1][0], last)
        else:
            whole.append((first, last))
    return whole
