"""Read ahead of a sequential reader, from the lower file into the pool, in the background.

A stream begins at the second of two misses that follow each other. It reads a window of pages beyond the
reader, twice as long each time the reader comes to the first page of the newest window (the *marker*), up to
a limit. So a reader that hits all the time is never asked about, but for one look at each marker: whoever
answers its hits need only tell when a read reaches it. A reader that goes elsewhere does not come to the
marker, and nothing is read any more.

The kernel is asked for a whole window at once, so that a lower file that is far away works on all of it; then
the window is read, put and dropped from the page cache by `CHUNK_PAGES`, like any miss. A reader that comes
to pages that are on their way waits for them. Pages that are in the pool already are left out. An error of
the lower file ends the stream: the reader meets it itself.

Threading: the event loop's thread.
"""

import logging
from collections import deque
from typing import Protocol

import trio

log = logging.getLogger(__name__)

NEVER = (1 << 64) - 1
"""A marker that no read reaches."""
CHUNK_PAGES = 256
FIRST_PAGES = 32
"""The first window is four requests, but no less than this."""
LOADS = 2
"""Chunks under way: one is read while the other one is put."""
MOST_STREAMS = 8
"""So many streams of a mount are read ahead at a time: each uses two worker threads and two buffers."""


class Source(Protocol):
    """What a stream reads from. Pages are given by their indices, ranges by first and beyond the last."""

    def length(self) -> int:
        """Return how many pages the file has."""

    async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges that are not in the pool, and have the kernel begin to read them. OSError."""

    async def load(self, first: int, last: int) -> bool:
        """Read at most `CHUNK_PAGES` into the pool; False if it did not take them. OSError."""

    def leave(self, first: int, last: int) -> None:
        """Have the kernel forget what was prepared and will not be loaded."""

    def mark(self, page: int) -> None:
        """Have `Stream.reached` called when a read reaches `page`; replaces the mark before."""


class Streams:
    """Counts the streams of a mount that are being read, and bounds them."""

    def __init__(self) -> None:
        self.running = 0

    @property
    def full(self) -> bool:
        """Whether there are enough."""
        return self.running >= MOST_STREAMS


class Stream:
    """What is read ahead of one open file.

    It begins before page `at`, with a reader whose requests have `request_pages`; `limit_pages` bounds what
    was read and not yet asked for.
    """

    def __init__(
        self, source: Source, streams: Streams, at: int, request_pages: int, limit_pages: int
    ) -> None:
        self._source = source
        self._streams = streams
        self._limit = max(limit_pages // 2, 1)  # a window is begun while the one before is not used up
        self._window = min(max(4 * request_pages, FIRST_PAGES), self._limit)
        self._start = at
        self._ready = at  # was read up to here
        self._prepared = at
        self._end = at
        self._ranges: deque[tuple[int, int]] = deque()  # prepared, to be loaded
        self._loading: set[int] = set()  # first pages of chunks
        self._running = self._ended = False
        self._moved = trio.Event()

    @property
    def running(self) -> bool:
        """Whether it uses the file right now."""
        return self._running

    def covers(self, page: int) -> bool:
        """Say whether a reader that goes on at `page` is the one of this stream."""
        # Requests that are not aligned begin in the last page of the one before.
        return self._start - 1 <= page <= self._end and not self._ended

    def reached(self, first: int, last: int) -> None:
        """Note a read of the pages from `first` to before `last` that has reached the mark."""
        self._source.mark(NEVER)
        if self.covers(first):
            self.extend(last)

    def missed(self, first: int, last: int) -> None:
        """Note that pages were missed where this stream expects its reader, and nothing is on its way."""
        if first < self._ready:  # evicted before they were asked for: there is no room for so much
            self._limit = max(self._limit // 2, 1)
            self._window = min(self._window, self._limit)
        self.extend(last)

    def extend(self, beyond: int) -> None:
        """Read the next window; the reader itself reads up to page `beyond`."""
        if not self._running:
            if self._streams.full:
                return
            self._end = self._ready = self._prepared = max(self._end, beyond)
        elif beyond > self._end:  # it has overtaken what is under way
            if self._prepared < self._end:
                return
            self._end = self._prepared = beyond
        end = min(self._end + self._window, self._source.length())
        if end <= self._end:
            return
        self._source.mark(self._end)
        self._end = end
        self._window = min(2 * self._window, self._limit)
        if not self._running:
            self._running = True
            self._streams.running += 1
            # The nursery that the handler runs in: who serves requests waits for it, and so for this.
            nursery = trio.lowlevel.current_task().parent_nursery
            assert nursery is not None
            nursery.start_soon(self._run)

    async def wait(self, first: int, last: int) -> bool:
        """Wait until the pages from `first` to before `last` are there, as far as they are on their way.

        False, at once, if `first` is not.
        """
        if not self._running or not self._ready <= first < self._end:
            return False
        while self._running and self._ready < min(last, self._end):
            await self._moved.wait()
        return True

    async def close(self) -> None:
        """Stop, and come back when the file is not used any more."""
        self._ended = True
        while self._running:
            await self._moved.wait()

    async def _run(self) -> None:
        try:
            while self._ready < self._end and not self._ended:  # again, if it was extended at the last moment
                await self._load_all()
        except* OSError as errors:
            log.debug("reading ahead: %s", errors.exceptions[0])
        except* Exception:
            log.exception("reading ahead failed")
        finally:
            self._move()
            for first, last in self._ranges:
                self._source.leave(first, last)
            self._ranges.clear()
            self._loading.clear()
            self._ended |= self._ready < self._end
            self._end = self._prepared = self._ready
            self._streams.running -= 1
            self._running = False
            self._move()

    async def _load_all(self) -> None:
        async with trio.open_nursery() as nursery:
            while self._ready < self._end and not self._ended:
                if self._prepared < self._end:  # first: it gives the lower file work meanwhile
                    end = self._end
                    self._ranges.extend(await self._source.prepare(self._prepared, end))
                    self._prepared = end
                if self._ranges and len(self._loading) < LOADS:
                    nursery.start_soon(self._load, *self._take())
                elif self._loading:
                    await self._moved.wait()
                self._move()

    def _take(self) -> tuple[int, int]:
        """Return the next chunk, which is being loaded from now on."""
        first, last = self._ranges.popleft()
        upto = min(first + CHUNK_PAGES, last)
        if upto < last:
            self._ranges.appendleft((upto, last))
        self._loading.add(first)
        return first, upto

    async def _load(self, first: int, last: int) -> None:
        stored = await self._source.load(first, last)
        if stored:
            self._loading.remove(first)
        else:
            self._ended = True  # and readers get no further than here
        self._move()

    def _move(self) -> None:
        """Find out up to where all is there, and wake who waits for that."""
        left = [*self._loading, *(first for first, _ in self._ranges)]
        self._ready = min(left, default=self._prepared)
        self._moved.set()
        self._moved = trio.Event()
