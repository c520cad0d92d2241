"""A store that is not there: it invents outcomes, mostly legal ones, and asks `PoolModel` about each.

For the proof that the lean model objects to what the model objects to. Not for threads.
"""

import random
from collections.abc import Callable

from tmem.types import PAGE_SIZE

from .lean import PAGES
from .model import PoolModel, Runs, Violation


def runs_of(indexes: set[int]) -> list[tuple[int, int]]:
    """Return the runs (first index, pages) of these indexes."""
    firsts = sorted(index for index in indexes if index - 1 not in indexes)
    lasts = sorted(index for index in indexes if index + 1 not in indexes)
    return [(first, last - first + 1) for first, last in zip(firsts, lasts, strict=True)]


class Liar:
    """`objection` is what the model said to the last outcome, if it was illegal."""

    def __init__(self, persistent: bool, exclusive: bool, rng: random.Random) -> None:
        self.model = PoolModel(persistent, exclusive)
        self.rng = rng
        self.objection: Violation | None = None
        self.there: Runs = []

    def _lies(self) -> bool:
        return self.rng.random() < 0.01

    def put(self, oid: bytes, index: int, data: bytes | memoryview, keep_old: bool) -> int:
        wanted = [bytes(data[i : i + PAGE_SIZE]) for i in range(0, len(data), PAGE_SIZE)]
        npages = len(wanted)
        taken = [self.rng.random() < 0.8 for _ in wanted]
        if self.rng.random() < 0.5:
            taken = [True] * npages
        if keep_old:
            taken = taken[: [*taken, False].index(False)]
        stored = sum(taken)
        there = {index + i for i, is_taken in enumerate(taken) if is_taken}
        if self._lies():
            stored = self.rng.choice((stored + 1, stored - 1, npages + 1, -1))
        elif not keep_old and 0 < stored < npages and self.rng.random() < 0.2:
            there.discard(self.rng.choice(sorted(there)))  # evicted at once: a lie of a persistent pool
        if keep_old or npages == 1 or stored >= npages:
            there = {index + i for i in range(min(max(stored, 0), npages))}
        self.there = runs_of(there)
        self._judge(lambda: self.model.put(oid, index, wanted, stored, keep_old, self.there))
        return stored

    def present(self, oid: bytes, index: int, npages: int) -> Runs:
        return self.there

    def get(self, oid: bytes, index: int, buffer: bytearray | memoryview) -> int:
        npages = len(buffer) // PAGE_SIZE
        self.there = []
        got: list[bytes] = []
        while len(got) < npages and (page := self.model.pages.get((oid, index + len(got)))):
            if not self.model.persistent and self.rng.random() < 0.1:
                break
            got.append(page)
        if self._lies():
            got = self.rng.choice((got[:-1], [*got[:-1], self.rng.choice(PAGES[1:])]))
        for i, page in enumerate(got):
            buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = page
        self._judge(lambda: self.model.get(oid, index, npages, got))
        return len(got)

    def flush(self, oid: bytes, index: int, npages: int) -> int:
        there = sum(o == oid and index <= i < index + npages for o, i in self.model.pages)
        found = self._found(there)
        self._judge(lambda: self.model.flush(oid, index, npages, found))
        return found

    def flush_object(self, oid: bytes) -> int:
        found = self._found(sum(o == oid for o, _ in self.model.pages))
        self._judge(lambda: self.model.flush_object(oid, found))
        return found

    def _found(self, there: int) -> int:
        if not self.model.persistent:
            there = self.rng.randint(0, there)
        return there + self.rng.choice((-1, 1)) if self._lies() else there

    def _judge(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except Violation as error:
            self.objection = error
