"""When the manager stores cold pages smaller, or equal ones once, and how much CPU time that may take.

The core does it (`_native.Segment.condense`, native/dense.c): it goes over the chunks, and pages that were
neither put nor got between two visits of their chunk are compressed again with zstd, at the segment's level.
This says how often: a round begins `ROUND_S` after the last one at the earliest, so a page is cold after that
time, and takes no more than the segment's share of one CPU. Ephemeral pages are left alone while memory is in
plenty, and everything while the CPUs are wanted: what programs wait for comes first. A round ends with the
equal pages of clients that allow it (`_native.Segment.dedup`, native/pair.c), and with packing cold
neighbours together (`_native.Segment.pack`, native/packing.c), from the same share.

Threading: `step` blocks while it works, the segment's share of two seconds at most; the manager calls it from
a worker thread, one call at a time.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends.compacting import CompactStatistics
from tmem.backends.pressure import figures

if TYPE_CHECKING:
    from tmem.backends import _native

ROUND_S = 30.0
"""A condensed page costs four times as much to read: what is asked for twice a minute stays as it is."""
MOST_PRESSURE = 30.0
"""Per cent of the time that somebody waited for a CPU, in the last ten seconds."""
_SLICE_NS = 20_000_000
_MOST_SAVED_UP_S = 2.0
_HOLES = 8
"""Sixteenths of a chunk that must be free before what is left in it is moved."""


def cpu_pressure(proc: Path = Path("/proc")) -> float:
    """Return what part of the last ten seconds some task waited for a CPU, in per cent; 0 if unknown."""
    return figures(proc / "pressure" / "cpu").get("some", {}).get("avg10", 0.0)


@dataclass(frozen=True)
class Condensed:
    """What a round has found when it came by."""

    pages: int
    """Pages that are condensed."""
    saved_bytes: int
    """Memory that this saves, to what they took before."""
    packed_pages: int
    """Those of them that are in packs."""
    packed_saved_bytes: int
    """Memory that this saves beyond it."""
    at_s: float
    """When the round ended, by the clock of the condenser."""

    def figures(self, now_s: float) -> dict[str, int]:
        """Return what statistics have of it."""
        return {
            "condensed_now_pages": self.pages,
            "condensed_now_bytes": self.saved_bytes,
            "packed_now_pages": self.packed_pages,
            "packed_now_bytes": self.packed_saved_bytes,
            "condensed_now_age_ns": int((now_s - self.at_s) * 1e9),
        }


class Condenser:
    """Spends the segment's share of CPU time; see the module."""

    def __init__(
        self,
        segment: "_native.Segment",
        pressure: Callable[[], float] = cpu_pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.statistics = CompactStatistics()
        """What moving pages together after rounds has done."""
        self._found: Condensed | None = None
        self._seen = [0, 0, 0, 0]  # what this round has found so far
        self._segment = segment
        self._pressure = pressure
        self._clock = clock
        self._last = self._round = clock()
        self._place = 0  # where the core goes on
        self._waiting = True
        self._part = 0
        """Of a round: cold pages, equal pages, neighbours."""
        self._budget_ns = 0

    def figures(self) -> dict[str, int]:
        """Return what is condensed now, as the last whole round found it and not before the first, and the
        memory that zstd has for it in this process."""
        found, own = self._found, {"condenser_bytes": self._segment.condenser_bytes}
        return own if found is None else own | found.figures(self._clock())

    def step(self) -> int:
        """Spend what has been saved up since the last step; the CPU time spent, in nanoseconds."""
        now = self._clock()
        share = self._segment.condense_percent / 100
        earned = min(now - self._last, _MOST_SAVED_UP_S) * share * 1e9
        self._last = now
        if self._waiting and now - self._round < ROUND_S:
            return 0
        if share == 0 or self._pressure() > MOST_PRESSURE:
            return 0
        if self._waiting:
            self._waiting, self._round = False, now
        # What the last page took beyond the budget is owed.
        self._budget_ns = min(self._budget_ns, 0) + int(earned)
        spent = 0
        with _ordinary():
            while spent < self._budget_ns and not self._waiting:
                most_ns = min(self._budget_ns - spent, _SLICE_NS)
                spent += (self._condense, self._dedup, self._pack)[self._part](most_ns)
                if not self._place:
                    self._part = (self._part + 1) % 3
                    self._waiting = self._part == 0
                    spent += 0 if self._part == 2 else self._compact()
        self._budget_ns -= spent
        return spent

    def _condense(self, most_ns: int) -> int:
        if not self._place:
            self._seen = [0, 0, 0, 0]
        self._place, ns, *found = self._segment.condense(self._place, most_ns, **self._what())
        self._seen = [sum(both) for both in zip(self._seen, found, strict=True)]
        if not self._place:
            pages, saved_bytes, packed, packed_saved_bytes = self._seen
            self._found = Condensed(pages, saved_bytes, packed, packed_saved_bytes, self._clock())
        return ns

    def _dedup(self, most_ns: int) -> int:
        self._place, ns = self._segment.dedup(self._place, most_ns)
        return ns

    def _pack(self, most_ns: int) -> int:
        self._place, ns = self._segment.pack(self._place, most_ns)
        return ns

    def _compact(self) -> int:
        """Move together what is left in chunks from which pages went; the CPU time spent, in nanoseconds."""
        began_ns, began_cpu_ns, counts = time.monotonic_ns(), time.thread_time_ns(), self.statistics
        counts.compacted_bytes += self._segment.compact(_HOLES, _SLICE_NS)
        counts.compacting_ns += time.monotonic_ns() - began_ns
        return time.thread_time_ns() - began_cpu_ns

    def _what(self) -> dict[str, bool]:
        """Return which pages are to be stored smaller: ephemeral ones while memory is short."""
        used, limit = self._segment.occupied[0], self._segment.limits[0]
        return {"persistent": True, "ephemeral": used * 2 > limit, "loose": used * 4 > limit * 3}


@contextmanager
def _ordinary() -> Iterator[None]:
    """Have the calling thread scheduled as any other: a realtime manager's background work is not urgent."""
    policy = os.sched_getscheduler(0)
    if policy == os.SCHED_OTHER:
        yield
        return
    parameters = os.sched_getparam(0)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameters)
