"""A process that puts, gets and flushes until it is killed, and the witness who knows what must be left.

The operations follow from a seed, so the storm only acknowledges each with one byte (the pages that it
stored, got or dropped), and the witness, in another process, replays as many as were acknowledged. The one
after those may have happened, not happened, or happened to some of its pages. Not for threads.
"""

import os
import random
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from tmem.backends._native import Segment
from tmem.types import PAGE_SIZE

from . import operations as op
from .model import Handle, demand
from .operations import Where
from .pages import oid, pages

SPAN = 400
"""Indexes that the storm uses in each object of a persistent pool; four times as many in an ephemeral one."""
MOST = 40
PUT, GET, FLUSH, FLUSH_OBJECT = range(4)


class Step(NamedTuple):
    """One operation; `pool` counts the pools given."""

    kind: int
    pool: int
    object: int
    first: int
    npages: int
    seed: int
    keep_old: bool

    def data(self) -> list[bytes]:
        return pages("mixed", self.seed, self.npages)


def steps(seed: int) -> Iterator[Step]:
    """Yield the operations of storm `seed`, without end. Pool 2 is ephemeral and gets most of the pages."""
    rng = random.Random(f"storm {seed}")
    for number in count():
        pool = rng.choice((0, 0, 1, 2, 2, 2))
        npages = rng.choice((1, 1, 1, 3, 17, MOST))
        index = rng.randrange(4 * SPAN if pool == 2 else SPAN)
        kind = rng.choice((PUT, PUT, PUT, GET, FLUSH, FLUSH_OBJECT if number % 40 == 0 else PUT))
        # Which pages of a range were refused only a put that keeps the old ones tells.
        keep_old = npages > 1 or rng.random() < 0.5
        yield Step(kind, pool, rng.randrange(2), index, npages, seed * 10007 + number, keep_old)


def run(segment: Segment, wheres: list[Where], seed: int, acknowledge: int) -> None:
    """Do the operations of storm `seed` and write one byte for each to `acknowledge`, until killed."""
    handles = [op.find(segment, where) for where in wheres]
    buffer = bytearray(MOST * PAGE_SIZE)
    for step in steps(seed):
        pool, o = handles[step.pool], oid(step.object)
        match step.kind:
            case 0:
                result = pool.put(o, step.first, b"".join(step.data()), keep_old=step.keep_old)
            case 1:
                result = pool.get(o, step.first, memoryview(buffer)[: step.npages * PAGE_SIZE])
            case 2:
                result = pool.flush(o, step.first, step.npages)
            case _:
                result = min(pool.flush_object(o), 255)
        os.write(acknowledge, bytes([result]))


def fork(segment: Segment, wheres: list[Where], seed: int, fifo: str) -> int:
    """Begin storm `seed` in a child of this process, which acknowledges to `fifo`; its pid."""
    child = os.fork()
    if child == 0:
        try:
            run(segment, wheres, seed, os.open(fifo, os.O_WRONLY))
        finally:
            os._exit(1)
    return child


def wait(_: Segment, child: int) -> int:
    """Wait for a child to end; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Witness:
    """What each handle may hold, by all that was acknowledged. None is: nothing."""

    def __init__(self, persistent: list[bool], exclusive: list[bool]) -> None:
        self.persistent = persistent
        self.exclusive = exclusive
        self.allowed: list[dict[Handle, set[bytes | None]]] = [{} for _ in persistent]

    def replay(self, seed: int, acknowledged: bytes) -> None:
        """Take in storm `seed`, of which these bytes arrived before it was killed."""
        rest = steps(seed)
        for result, step in zip(acknowledged, rest, strict=False):
            self._done(step, result)
        # zip asks for a byte first, so the step after the last acknowledged one is still there.
        self._under_way(next(rest))

    def _done(self, step: Step, result: int) -> None:
        allowed, o = self.allowed[step.pool], oid(step.object)
        match step.kind:
            case 0:
                for i, page in enumerate(step.data()[:result]):
                    allowed[o, step.first + i] = {page}
                if not step.keep_old and result == 0:
                    allowed[o, step.first] = {None}
            case 1:
                if self.exclusive[step.pool]:
                    for i in range(result):
                        allowed[o, step.first + i] = {None}
            case 2:
                for i in range(step.npages):
                    allowed[o, step.first + i] = {None}
            case _:
                for handle in allowed:
                    if handle[0] == o:
                        allowed[handle] = {None}

    def _under_way(self, step: Step) -> None:
        allowed, o = self.allowed[step.pool], oid(step.object)
        handles = [(o, step.first + i) for i in range(step.npages)]
        match step.kind:
            case 0:
                for handle, page in zip(handles, step.data(), strict=True):
                    lost: set[bytes | None] = set() if step.keep_old else {None}
                    allowed[handle] = allowed.get(handle, {None}) | {page} | lost
            case 1:
                if self.exclusive[step.pool]:
                    for handle in handles:
                        allowed[handle] = allowed.get(handle, {None}) | {None}
            case 2:
                for handle in handles:
                    allowed[handle] = allowed.get(handle, {None}) | {None}
            case _:
                for handle in allowed:
                    if handle[0] == o:
                        allowed[handle] |= {None}

    def verify(self, segment: Segment, wheres: list[Where]) -> None:
        """Get every page, compare, and remember what is there now."""
        for where, persistent, allowed in zip(wheres, self.persistent, self.allowed, strict=True):
            for handle, values in allowed.items():
                got = op.get(segment, where, *handle)
                value = got[0] if got else None
                excused = value is None and not persistent
                demand(excused or value in values, f"{where} {handle} holds something else than it must")
                allowed[handle] = {value}
        for where, exclusive, allowed in zip(wheres, self.exclusive, self.allowed, strict=True):
            if exclusive:
                allowed.clear()
            unknown = {h for o in (oid(0), oid(1)) for h in self._there(segment, where, o)} - allowed.keys()
            demand(not unknown, f"{where} holds pages that were never put: {sorted(unknown)[:5]}")

    @staticmethod
    def _there(segment: Segment, where: Where, o: bytes) -> Iterator[Handle]:
        for first, npages in op.present(segment, where, o, 0, 5 * SPAN):
            yield from ((o, index) for index in range(first, first + npages))
