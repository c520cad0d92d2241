"""A client that works at random on its handles and verifies everything, wherever its pages live.

`wander` runs in a worker process. When its client departs, it waits until that is gone, goes on in the other
segment, and repeats the one operation that was refused: nothing else may be lost or come back. A put that is
refused while the client is frozen leaves a miss, as always.
"""

import random
import time
from pathlib import Path

from tmem.backends import _native
from tmem.backends.clients import clients_by_name
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from .pages import KINDS, oid, page

OBJECTS, INDEXES = 6, (0, 1, 2, 15, 16, 63, 64, 100, 511, 512, 600, 4095, 4096, 2**20, 2**32 - 1)
_DEADLINE_S = 60.0


class _Wanderer:
    """One pool of the client, its model, and the operations."""

    def __init__(self, pool: _native.Pool, rng: random.Random) -> None:
        self.pool = pool
        self.exclusive = pool.exclusive
        self.rng = rng
        self.model: dict[tuple[bytes, int], bytes] = {}
        self.refused = 0

    def operation(self) -> None:
        """Do one operation and compare. PoolError if it was not done, or perhaps in part."""
        rng = self.rng
        state = rng.getstate()
        try:
            handle = oid(rng.randrange(OBJECTS)), rng.choice(INDEXES)
            choice = rng.random()
            if choice < 0.45:
                self._put(handle, page(rng.choice(KINDS), rng.randrange(500)))
            elif choice < 0.8:
                self.get(handle)
            elif choice < 0.97:
                self._flush(handle)
            elif choice < 0.985:
                self._flush_object(handle[0])
            else:
                self._look(handle[0])
        except PoolError:
            rng.setstate(state)  # the same again, elsewhere
            raise

    def _put(self, handle: tuple[bytes, int], data: bytes) -> None:
        if self.pool.put(*handle, data):
            self.model[handle] = data
        else:
            self.model.pop(handle, None)
            self.refused += 1

    def get(self, handle: tuple[bytes, int]) -> None:
        buffer = bytearray(PAGE_SIZE)
        found = bytes(buffer) if self.pool.get(*handle, buffer) else None
        wanted = self.model.get(handle)
        assert found == wanted, f"{handle}: {_say(found)} instead of {_say(wanted)}"
        if self.exclusive:
            self.model.pop(handle, None)

    def _flush(self, handle: tuple[bytes, int]) -> None:
        assert self.pool.flush(*handle) == (handle in self.model)
        self.model.pop(handle, None)

    def _flush_object(self, object_id: bytes) -> None:
        self.pool.flush_object(object_id)
        self.model = {handle: data for handle, data in self.model.items() if handle[0] != object_id}

    def _look(self, object_id: bytes) -> None:
        there = [index for index in INDEXES if self.pool.present(object_id, index, 1)]
        assert there == [index for index in INDEXES if (object_id, index) in self.model]


def _say(data: bytes | None) -> str:
    return "a miss" if data is None else f"{data[:8].hex()}..."


def wander(segment: _native.Segment, other: Path, seed: int, more: int) -> tuple[int, int, int]:
    """Work until the client lives in the segment at `other`, and `more` operations there.

    Returns the operations done here and there, and the puts that were refused on the way.
    """
    rng = random.Random(seed)
    pools = sorted(segment.client("one", create=False).pools(), key=lambda pool: pool.id)
    numbers = [pool.id for pool in pools]
    wanderers = [_Wanderer(pool, rng) for pool in pools]
    here = 0
    try:
        while True:
            rng.choice(wanderers).operation()
            here += 1
    except PoolError:
        pass
    there = _arrive(segment, other)
    client = there.client("one", create=False)
    for number, wanderer in zip(numbers, wanderers, strict=True):
        wanderer.pool = client.pool(number)
    for _ in range(more):
        rng.choice(wanderers).operation()
    for wanderer in wanderers:
        for handle in [(oid(number), index) for number in range(OBJECTS) for index in INDEXES]:
            wanderer.get(handle)
    refused = sum(wanderer.refused for wanderer in wanderers)
    there.close()
    return here, more, refused


def _arrive(segment: _native.Segment, other: Path) -> _native.Segment:
    """Wait until the client is gone here, then attach the segment where it is."""
    deadline = time.monotonic() + _DEADLINE_S
    while "one" in clients_by_name(segment):
        assert time.monotonic() < deadline, "the client stays"
        time.sleep(0.001)
    return _native.attach(str(other))
