"""A pool that errs on purpose, and one that only notes its calls: proof that the endurance run can fail.

Each fault is one that a store could really have. Not for threads.
"""

from collections.abc import Sequence

from tmem.backends._native import Pool
from tmem.types import PAGE_SIZE

FAULTS: dict[str, tuple[bool, bool | None, int]] = {
    "loses a put": (True, None, 10_000),
    "stores to the neighbour": (True, None, 10_000),
    "swaps two bytes": (False, False, 10_000),
    "serves the page before": (True, None, 10_000),
    "misses once": (False, False, 1000),
    "loses a page": (True, None, 10_000),
    "keeps a page that was got": (False, None, 1000),
    "keeps the old page": (True, None, 100),
    "flushes nothing": (False, False, 1000),
    "miscounts a flush": (True, None, 1000),
    "counts a put twice": (False, None, 10_000),
}
"""For each fault the pool that shows it (persistent, exclusive), and how many operations there are to one."""


class Faulty:
    """Passes calls on to `pool` and notes them in `trace`; every so many calls `fault` happens."""

    def __init__(self, pool: Pool, fault: str | None, trace: list[object], every: int = 1) -> None:
        self.pool = pool
        self.fault = fault
        self.trace = trace
        self.every = every
        self.calls = self.faults = 0
        self.last: bytes | None = None

    def _now(self, fault: str) -> bool:
        """Say whether the fault happens in this call; one that could not have an effect is put off."""
        if fault != self.fault or self.calls < self.every:
            return False
        self.calls = 0
        self.faults += 1
        return True

    def put(self, oid: bytes, index: int, data: bytes | memoryview, keep_old: bool) -> int:
        self.calls += 1
        if not self.fault:
            self.trace.append(("put", oid, index, bytes(data), bool(keep_old)))
        npages = len(data) // PAGE_SIZE
        if self._now("loses a put"):
            return npages
        if index < 2**32 - npages and self._now("stores to the neighbour"):
            return self.pool.put(oid, index + 1, data, keep_old)
        if self._now("counts a put twice"):
            self.pool.put(oid, index, data, keep_old)
        if (
            npages == 1
            and not keep_old
            and self.pool.present(oid, index, 1)
            and self.fault == "keeps the old page"
        ):
            stored = self.pool.put(oid, index, data, True)
            if not stored and not self._now("keeps the old page"):
                self.pool.flush(oid, index, 1)
            return stored
        return self.pool.put(oid, index, data, keep_old)

    def get(self, oid: bytes, index: int, buffer: bytearray | memoryview) -> int:
        self.calls += 1
        if not self.fault:
            self.trace.append(("get", oid, index, len(buffer)))
        there = self.pool.present(oid, index, 1)
        if there and self._now("misses once"):
            return 0
        if there and self._now("loses a page"):
            self.pool.flush(oid, index, 1)
        filled = self.pool.get(oid, index, buffer)
        if filled and self._now("swaps two bytes"):
            buffer[1000], buffer[2000] = buffer[2000] ^ 1, buffer[1000]
        if filled == 1 and self.fault == "serves the page before":
            now, before = bytes(buffer), self.last
            if before and before != now and self._now("serves the page before"):
                buffer[:PAGE_SIZE] = before
            self.last = now
        if filled and self._now("keeps a page that was got"):
            self.pool.put(oid, index, bytes(buffer[: filled * PAGE_SIZE]))
        return filled

    def flush(self, oid: bytes, index: int, npages: int) -> int:
        self.calls += 1
        if not self.fault:
            self.trace.append(("flush", oid, index, npages))
        runs = self.pool.present(oid, index, npages)
        if runs and self._now("flushes nothing"):
            return sum(n for _, n in runs)
        found = self.pool.flush(oid, index, npages)
        return found - 1 if found and self._now("miscounts a flush") else found

    def flush_object(self, oid: bytes) -> int:
        self.calls += 1
        if not self.fault:
            self.trace.append(("flush_object", oid))
        return self.pool.flush_object(oid)

    def present(self, oid: bytes, index: int, npages: int) -> Sequence[tuple[int, int]]:
        return self.pool.present(oid, index, npages)
