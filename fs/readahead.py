"""Read ahead of a sequential reader, from the lower file into the pool, in the background.

A stream begins at the second of two misses that follow each other. It reads a window of pages beyond the
reader, twice as long each time the reader comes to the first page of the newest window (the *marker*), up to
a limit. So a reader that hits all the time is never asked about, but for one look at each marker: whoever
answers its hits need only tell when its reads reach it. A reader that goes elsewhere does not come to the
marker, and nothing is read any more. What else is read in the file, at random, say, is not the stream's:
where its reader is tells the difference, and reads may be early or late by a few (several threads that read
by turns, the kernel that asks for several at a time).

The kernel is asked for a whole window at once, so that a lower file that is far away works on all of it; then
the window is read, put and dropped from the page cache by `CHUNK_PAGES`, like any miss. A reader that comes
to pages that are on their way waits for them. Stretches that are in the pool already are left out. An error
of the lower file ends the stream: the reader meets it itself.

Threading: the event loop's thread.
"""

import logging
from collections import deque
from typing import Protocol

import trio

log = logging.getLogger(__name__)

NEVER = (1 << 64) - 1
"""A marker that no read reaches."""
APART = 8
"""Reads by which one of a stream may be early or late; the native reader's, too (`reader_files`)."""
CHUNK_PAGES = 256
FIRST_PAGES = 32
"""The first window is four requests, but no less than this."""
_LOST_SHARE = 8
LOADS = 2
"""Chunks under way: one is read while the other one is put."""
MOST_STREAMS = 8
"""So many streams of a mount are read ahead at a time: each uses two worker threads and two buffers."""


class Source(Protocol):
    """What a stream reads from. Pages are given by their indices, ranges by first and beyond the last."""

    def length(self) -> int:
        """Return how many pages the file has."""

    async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges to be loaded, and have the kernel begin to read them. OSError."""

    async def load(self, first: int, last: int) -> bool:
        """Read at most `CHUNK_PAGES` into the pool; False if it did not take them. OSError."""

    def leave(self, first: int, last: int) -> None:
        """Have the kernel forget what was prepared and will not be loaded."""

    def begin(self, page: int) -> None:
        """Have misses of a reader that comes to `page` next told; NEVER: of none any more."""

    def mark(self, page: int, end: int) -> None:
        """Have the read told by which it gets beyond `page`, once, and misses before page `end`."""

    def position(self) -> int | None:
        """Return the page up to which the reader has come, if that is told; None: all reads are."""


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
        self._most = self._limit
        self._at = at  # where the reader has come to
        self._marker = NEVER
        self._lost = 0  # pages that were missed since it came to the last mark, and should have been there
        self._ready = at  # was read up to here
        self._prepared = at
        self._end = at
        self._ranges: deque[tuple[int, int]] = deque()  # prepared, to be loaded
        self._loading: set[int] = set()  # first pages of chunks
        self._running = self._ended = False
        self._moved = trio.Event()
        source.begin(at)

    @property
    def at(self) -> int:
        """The page up to which its reader has come, as far as is known."""
        return self._at

    @property
    def running(self) -> bool:
        """Whether it uses the file right now."""
        return self._running

    def covers(self, first: int, last: int) -> bool:
        """Say whether a read of the pages from `first` to before `last` may be one of this stream's."""
        apart = APART * (last - first)
        return self._at - apart <= first <= self._end + apart and not self._ended

    def comes(self, first: int, last: int) -> None:
        """Note a read of the pages from `first` to before `last`; go on if it has reached the mark."""
        at = self._source.position()
        if at is not None:
            self._at = at
        elif abs(first - self._at) <= APART * (last - first):
            self._at = max(self._at, last)
        if self._at > self._marker and not self._ended:
            self._marker = NEVER
            self._lost = 0
            # There is room after all, if pages had been evicted too soon: that may be long ago.
            self._limit = min(self._limit + FIRST_PAGES, self._most)
            self.extend(self._at)

    def missed(self, first: int, last: int) -> None:
        """Note that pages were missed which this stream `covers`, and nothing is on its way."""
        if last < self._at:  # late, or somebody else's
            return
        if first < self._ready:
            # Evicted before they were asked for. Some were in the pool before, and it was their time; but if
            # these are many, there is no room for so much.
            self._lost += last - first
            if self._lost > self._window // _LOST_SHARE:
                self._lost = 0
                self._limit = max(self._limit // 2, 1)
                self._window = min(self._window, self._limit)
        if first >= self._ready or self._marker == NEVER:
            if first > self._at + APART * (last - first):  # it has left some out, and goes on from here
                self._at = last
                self._source.begin(last)
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
        self._marker = self._end
        self._source.mark(self._end, end)
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
            if self._ended:
                self._source.begin(NEVER)
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
                    if self._ended:  # meanwhile, and nothing else may come that wakes who waits below
                        break
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
