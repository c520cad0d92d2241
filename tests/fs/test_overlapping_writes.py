"""Two own writes of one file at once, and one underneath, in every order.

Each own write is what `files` makes of it: the bracket begins and ends on the event loop's thread. On a lower
that is elsewhere the version before, the write and the version after are a worker thread's; on a local one
only the write is. What is served afterwards to who opens the file is compared with what it has.
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.fs.coherence import LONG_SECONDS, Change, Coherence
from tmem.fs.identity import has_fine_stamps
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

PAGES = 4
LOCAL = ("begin", "write", "end")
ELSEWHERE = ("begin", "before", "write", "after", "end")
FIRST, SECOND, UNDERNEATH, UNTOUCHED = range(PAGES)
"""Who writes, and which page."""


@dataclass
class Outcome:
    """What came of one order."""

    stale: bool
    """Somebody was shown what was written over underneath."""
    kept: bool
    """The page that nobody wrote stayed."""
    took_seconds: float


Order = tuple[tuple[int, str], ...]


def orders(steps: Sequence[str]) -> Iterator[Order]:
    """All orders in which both can do these steps; the first begins first."""
    for places in itertools.combinations(range(1, 2 * len(steps)), len(steps) - 1):
        left = [iter(steps), iter(steps)]
        owners = [FIRST if number in {0, *places} else SECOND for number in range(2 * len(steps))]
        yield tuple((owner, next(left[owner])) for owner in owners)


def times(order: Order) -> dict[tuple[int, str], int]:
    return {step: number for number, step in enumerate(order)}


class File:
    """A file of `PAGES` pages, and who keeps them right."""

    def __init__(self, path: Path, precache: Precache) -> None:
        self.path = path
        self.numbers = itertools.count(1)
        for page in range(PAGES):
            self.write(page)
        self.reader = os.open(path, os.O_RDONLY)
        pool = precache.pool()
        assert pool is not None
        self.pool, self.precache = pool, precache
        self.coherence = Coherence(precache)
        self.state = self.coherence.recall(b"file".ljust(24, b"\0"), fine_stamps=True)

    def write(self, page: int) -> None:
        """Write what was never there."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        word = f"{next(self.numbers):07d} ".encode()
        os.pwrite(descriptor, word * (PAGE_SIZE // len(word)), page * PAGE_SIZE)
        os.close(descriptor)

    def open(self) -> bool:
        """Do what an open does; whether the file has not changed."""
        return self.coherence.validate(self.state, os.fstat(self.reader), self.reader)

    def load(self) -> None:
        """Have all pages in the pool."""
        pages = memoryview(bytearray(os.pread(self.reader, PAGES * PAGE_SIZE, 0)))
        token = self.coherence.read_token(self.state)
        assert self.coherence.put_if(self.state, token, self.reader, 0, pages) == PAGES

    def served(self, page: int) -> bytes | None:
        buffer = memoryview(bytearray(PAGE_SIZE))
        return bytes(buffer) if self.precache.get(self.pool, self.state.oid, page, buffer) else None

    def play(self, order: Order, underneath: int | None = None, reported: int | None = None) -> Outcome:
        """Do these steps, and before those of two numbers (the last: after all) what concerns others.

        `underneath`: somebody writes; `reported`: the report of that is read.
        """
        self.open()
        assert self.state.version is not None
        self.load()
        elsewhere = len(order) > 2 * len(LOCAL)
        changes = [
            self.coherence.change_elsewhere(self.state)
            if elsewhere
            else self.coherence.change(self.state, self.reader)
            for _ in (FIRST, SECOND)
        ]
        seen = [change.seen(self.reader) for change in changes]
        begun = time.monotonic()
        for number, step in enumerate((*order, None)):
            if number == underneath:
                self.write(UNDERNEATH)
            if number == reported:
                self.coherence.reported(self.state, self.reader)
            if step is not None:
                who, what = step
                self.do(who, what, changes[who], seen[who])
        took = time.monotonic() - begun
        self.open()
        content = os.pread(self.reader, PAGES * PAGE_SIZE, 0)
        pages = [content[page * PAGE_SIZE :][:PAGE_SIZE] for page in range(PAGES)]
        shown = [self.served(page) for page in range(PAGES)]
        for page in {*range(PAGES)} - {UNDERNEATH}:
            assert shown[page] in (None, pages[page]), order
        stale = shown[UNDERNEATH] not in (None, pages[UNDERNEATH])
        return Outcome(stale, shown[UNTOUCHED] is not None, took)

    def do(self, who: int, what: str, change: Change, seen: AbstractContextManager[None]) -> None:
        flushed = who * PAGE_SIZE, (who + 1) * PAGE_SIZE
        if what == "begin":
            change.__enter__()
        elif what == "before":
            seen.__enter__()
        elif what == "write":
            change.flush(*flushed)
            self.write(who)
            change.flush(*flushed)
        elif what == "after":
            seen.__exit__(None, None, None)
        else:
            change.__exit__()


@pytest.fixture
def file(tmp_path: Path, segment: "_native.Segment") -> Iterator[File]:
    directory = os.open(tmp_path, os.O_RDONLY)
    fine = has_fine_stamps(directory)
    os.close(directory)
    if not fine:
        pytest.skip("the file system gives changes of one moment one time stamp")
    precache = Precache(SegmentPaths.of("default"), "web")
    made = File(tmp_path / "file", precache)
    yield made
    os.close(made.reader)
    precache.close()


@pytest.mark.parametrize("steps", [LOCAL, ELSEWHERE], ids=["local", "elsewhere"])
def test_a_write_underneath_shows_at_the_next_open_unless_it_fell_into_ours(
    file: File, steps: Sequence[str]
) -> None:
    """Into both together, from where the first one looks what the file is to where the last one does."""
    begins, ends = ("before", "after") if "before" in steps else ("begin", "end")
    for order in orders(steps):
        at = times(order)
        for underneath in range(len(order) + 1):
            under_way = any(at[who, "begin"] < underneath <= at[who, "end"] for who in (FIRST, SECOND))
            first = min(at[who, begins] for who in (FIRST, SECOND))
            last = max(at[who, ends] for who in (FIRST, SECOND))
            if not (under_way and first < underneath <= last):
                assert not file.play(order, underneath).stale, (order, underneath)


def test_a_write_underneath_that_is_reported_shows_whenever_it_was(file: File) -> None:
    """The report may be read at any time after it; what tells of it is only there on a local lower."""
    for order in orders(LOCAL):
        for underneath in range(len(order) + 1):
            for reported in range(underneath, len(order) + 1):
                outcome = file.play(order, underneath, reported)
                assert not outcome.stale, (order, underneath, reported)


@pytest.mark.parametrize("steps", [LOCAL, ELSEWHERE], ids=["local", "elsewhere"])
def test_two_writes_at_once_keep_other_pages(file: File, steps: Sequence[str]) -> None:
    """But for the second one's having written before the first one's thread has looked what the file is."""
    for order in orders(steps):
        at = times(order)
        looked = at[FIRST, "before" if "before" in steps else "begin"]
        outcome = file.play(order)
        if outcome.took_seconds < LONG_SECONDS:  # else, elsewhere, it costs all
            assert outcome.kept == (looked < at[SECOND, "write"]), order
