"""Random operations on one pool at the speed of the core, compared with a lean form of `model.PoolModel`.

Handles are positions in a list and pages are numbers (0: nothing), so that the model costs less than the
operations and travels to another process in a few kilobytes. `test_endurance` shows that it accepts and
refuses exactly what `PoolModel` does. The operations follow from the seed alone, never from what came of
them. One thread for one `Lean`; different ones are independent.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tmem.types import MAX_INDEX, PAGE_SIZE

from .model import PoolModel, Runs, Violation, demand, indexes
from .operations import Where
from .pages import KINDS, oid, page

PAGES = (b"", *(page("text" if n % 9 == 0 else KINDS[n % 9], 7000 + n) for n in range(1, 512)))
"""The page of each number: all kinds, none twice."""
NUMBERS = {data: number for number, data in enumerate(PAGES)}
OBJECTS = tuple(oid(number) for number in (0, 1, 2, 7))
_RUNS = ((0, 80), (500, 40), (1010, 24), (4080, 48), (2**19 - 8, 24), (2**29 - 8, 24), (MAX_INDEX - 15, 16))
INDEXES = tuple(first + i for first, npages in _RUNS for i in range(npages))
"""The index of each position: around the edges of the index's leaves and nodes, as many as a byte counts."""
MOST = 16
"""Pages of the longest call."""
ROOM = tuple(min(MOST, npages - i) for _, npages in _RUNS for i in range(npages))
"""How many positions from here on have consecutive indexes."""
SPAN = len(INDEXES)
ALL = b"".join((*PAGES, *PAGES[1:MOST]))
"""The pages in the order of their numbers, so that several are one buffer."""
assert (SPAN, len(NUMBERS)) == (256, 512)
GHOST = 512
"""Added to a page's number: it was missed, but is there. See `Lean.ghosts`."""


class Calls(Protocol):
    """What of `_native.Pool` is called: also a pool that errs on purpose has it."""

    @property
    def put(self) -> Callable[[bytes, int, bytes | memoryview, bool], int]: ...
    @property
    def get(self) -> Callable[[bytes, int, bytearray | memoryview], int]: ...
    @property
    def flush(self) -> Callable[[bytes, int, int], int]: ...
    @property
    def flush_object(self) -> Callable[[bytes], int]: ...
    @property
    def present(self) -> Callable[[bytes, int, int], Runs]: ...


@dataclass
class Lean:
    """One pool and what it must hold, or if it is ephemeral may hold."""

    where: Where
    persistent: bool
    exclusive: bool
    seed: str
    held: list[int] = field(default_factory=lambda: [0] * (len(OBJECTS) * SPAN))
    counts: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    ghosts: int = 0
    """Pages that a get missed, but that were there: a client that is turned off misses its pages before they
    are dropped, so a flush may yet find them. To get one is a violation as ever."""

    def model(self) -> PoolModel:
        """Return the same as a `PoolModel`."""
        pages = {
            (o, index): PAGES[self.held[i * SPAN + p]]
            for i, o in enumerate(OBJECTS)
            for p, index in enumerate(INDEXES)
            if 0 < self.held[i * SPAN + p] < GHOST
        }
        return PoolModel(self.persistent, self.exclusive, pages, Counter(self.counts))

    def compare(self, statistics: Mapping[str, int]) -> None:
        """As `PoolModel.compare`; but for the most pages that there were, of which no note is taken."""
        model = self.model()
        model.most = statistics["pages_max"]
        demand(model.most >= statistics["pages"], f"{statistics['pages']} pages, at most {model.most} ever")
        model.compare(statistics)

    def run(self, pool: Calls, steps: int) -> None:
        """Do the next `steps` operations on `pool`; `Violation` at the first outcome that is wrong."""
        rng = random.Random(f"{self.seed} {self.operations}")
        try:
            self._run(pool, steps, rng.getrandbits)
        except Violation as error:
            raise Violation(f"{self.where} of seed {self.seed!r}, burst {self.operations}: {error}") from None
        self.operations += steps

    def _run(self, pool: Calls, steps: int, getrandbits: Callable[[int], int]) -> None:
        held, exclusive = self.held, self.exclusive
        pages, all_indexes, objects = PAGES + (b"",) * GHOST, INDEXES, OBJECTS
        put, get = pool.put, pool.get
        page_buffer = bytearray(PAGE_SIZE)
        stored = replaced = flushed = refused = hits = misses = 0
        for _ in range(steps):
            bits = getrandbits(30)
            at = bits & 1023
            o, index = objects[at >> 8], all_indexes[at & 255]
            kind = bits >> 19 & 127
            if kind < 56:
                number = (bits >> 10 & 511) or 1
                keep = bits >> 29 == 1
                if (result := put(o, index, pages[number], keep)) == 1:
                    stored += 1
                    if held[at]:
                        replaced += 1
                    held[at] = number
                else:
                    demand(result == 0, f"{result} of 1 page stored")
                    if keep or not held[at]:
                        refused += 1
                    else:
                        flushed += 1
                        held[at] = 0
            elif kind < 102:
                if get(o, index, page_buffer):
                    if page_buffer != pages[held[at]]:
                        self._wrong(at, page_buffer)
                    hits += 1
                    if exclusive:
                        held[at] = 0
                else:
                    misses += 1
                    if held[at]:
                        self._missed(pool, at)
            else:
                self._seldom(pool, kind - 102, at, bits)
        counts = self.counts
        counts["puts"] += stored + refused + flushed
        counts["puts_stored"] += stored
        counts["puts_replaced"] += replaced
        counts["puts_flushed"] += flushed
        counts["gets"] += hits + misses
        counts["gets_hit"] += hits
        counts["gets_taken"] += hits * exclusive

    def _wrong(self, at: int, got: bytearray) -> None:
        index, wanted = INDEXES[at % SPAN], self.held[at]
        found = NUMBERS.get(bytes(got))
        demand(0 < wanted < GHOST, f"index {index} came back without a put, as page {found}")
        raise Violation(f"index {index} has page {found} where {wanted} was put last")

    def _missed(self, pool: Calls, at: int) -> None:
        """A page that may be there was missed."""
        o, index = OBJECTS[at // SPAN], INDEXES[at % SPAN]
        demand(not self.persistent, f"index {index} of a persistent pool is lost")
        if not pool.present(o, index, 1):
            self.held[at] = 0
        elif self.held[at] < GHOST:
            self.held[at] += GHOST
            self.ghosts += 1

    def _seldom(self, pool: Calls, kind: int, at: int, bits: int) -> None:
        """Flush a page, or put, get and flush several; once in a while flush an object."""
        o, index = OBJECTS[at >> 8], INDEXES[at & 255]
        number, npages = (bits >> 10 & 511) or 1, min((bits >> 26 & 7) * 2 + 2, ROOM[at & 255])
        if kind < 13:
            self._flush(pool, o, index, at, 1)
        elif kind < 18:
            self._put(pool, o, index, at, number, npages, keep=bool(bits >> 29))
        elif kind < 22:
            self._get(pool, o, index, at, npages)
        elif kind < 25 or number > 60:
            self._flush(pool, o, index, at, npages)
        else:
            self._flush_object(pool, o, at)

    def _put(self, pool: Calls, o: bytes, index: int, at: int, number: int, npages: int, keep: bool) -> None:
        data = memoryview(ALL)[(number - 1) * PAGE_SIZE :][: npages * PAGE_SIZE]
        stored = pool.put(o, index, data, keep)
        demand(0 <= stored <= npages, f"{stored} of {npages} pages stored")
        taken = {index + i for i in range(stored)}
        if stored < npages and not keep:
            taken = indexes(pool.present(o, index, npages))
            demand(len(taken) <= stored, f"{len(taken)} pages are there after a put that stored {stored}")
            demand(
                not self.persistent or len(taken) == stored,
                f"{len(taken)} pages are there after a put that stored {stored}",
            )
        held, counts = self.held, self.counts
        offered = min(stored + 1, npages) if keep else npages
        for i in range(offered):
            new = number + i
            if index + i in taken:
                counts["puts_replaced"] += held[at + i] > 0
                held[at + i] = new if new < 512 else new - 511
            elif not keep:
                counts["puts_flushed"] += held[at + i] > 0
                held[at + i] = 0
        counts["puts"] += offered
        counts["puts_stored"] += stored

    def _get(self, pool: Calls, o: bytes, index: int, at: int, npages: int) -> None:
        held, counts = self.held, self.counts
        buffer = bytearray(npages * PAGE_SIZE)
        filled = pool.get(o, index, buffer)
        demand(0 <= filled <= npages, f"{filled} pages came of {npages}")
        for i in range(filled):
            got = buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            if held[at + i] >= GHOST or got != PAGES[held[at + i]]:
                self._wrong(at + i, got)
            if self.exclusive:
                held[at + i] = 0
        if filled < npages and held[at + filled]:
            self._missed(pool, at + filled)
        counts["gets"] += min(filled + 1, npages)
        counts["gets_hit"] += filled
        counts["gets_taken"] += filled * self.exclusive

    def _flush(self, pool: Calls, o: bytes, index: int, at: int, npages: int) -> None:
        self._flushed(at, npages, pool.flush(o, index, npages))
        self.counts["flushes"] += npages

    def _flush_object(self, pool: Calls, o: bytes, at: int) -> None:
        found = pool.flush_object(o)
        self._flushed(at - at % SPAN, SPAN, found)
        self.counts["object_flushes"] += 1
        self.counts["object_flushes_found"] += found > 0

    def _flushed(self, at: int, npages: int, found: int) -> None:
        most = npages - self.held[at : at + npages].count(0)
        demand(found <= most, f"flushed {found} pages where at most {most} were")
        demand(not self.persistent or found == most, f"flushed {found} pages where {most} were")
        self.held[at : at + npages] = [0] * npages
        self.counts["flushes_found"] += found
