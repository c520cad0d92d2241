"""Keeps a segment as large as the machine can spare: looks, lets `sizing` decide, and gives memory back.

A task of the manager. Looks and changes of the limit happen in the event loop, 0.2 ms each, as often as the
decision says; giving back runs in a thread of its own, so a long one does not keep the next look from asking
for more. Not in the data path: without a manager the limits stay where they are.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from tmem.backends import pressure, sizing
from tmem.errors import TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

FIXED_LOOK_S = 1.0
"""How often somebody may have given a segment of fixed size another one."""


@dataclass
class ResizeStatistics:
    """What was seen at the last look, and what has been done."""

    looks: int = 0
    """Times that memory was looked at."""
    spare_bytes: int = 0
    """Memory of the machine, or of the tightest control group, beyond its margin at the last look."""
    margin_bytes: int = 0
    """What is left to others of it."""
    stalled_percent: int = 0
    """Time spent waiting for memory between the last two looks."""
    given_back_bytes: int = 0
    """Memory that was given back because the limit fell."""
    raised: int = 0
    """Times that the limit was raised."""
    lowered: int = 0
    """Times that it was lowered."""


class Resizer:
    """Moves the limits of one segment for as long as `run` runs."""

    def __init__(
        self, segment: "_native.Segment", reserve_bytes: Callable[[], int], local: Callable[[], bool]
    ) -> None:
        """`reserve_bytes` says how much stays backed in any case while `local` says that this machine swaps
        to the segment."""
        self.statistics = ResizeStatistics()
        self._segment = segment
        self._reserve_bytes = reserve_bytes
        self._local = local
        self._rooms = pressure.Rooms(os.getpid())
        self._stalls = pressure.Stalls(pressure.stall_files(os.getpid()))
        self._sizer: sizing.Sizer | None = None
        self._excess = trio.Event()
        self._hard = False

    async def run(self) -> None:
        """Look and decide until cancelled."""
        trigger = pressure.Trigger()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_back)
            while self._segment.alive:
                next_look_s = FIXED_LOOK_S
                try:
                    next_look_s = self._look()
                except (TmemError, OSError, ValueError) as error:
                    _log.warning("cannot see how much memory there is: %s", error)
                if trigger.works and self._sizer is not None and next_look_s > 2 * sizing.LEAST_LOOK_S:
                    await trio.to_thread.run_sync(trigger.wait, next_look_s, abandon_on_cancel=True)
                    await trio.sleep(sizing.LEAST_LOOK_S)  # while there is pressure it ends at once
                else:
                    await trio.sleep(next_look_s)
            nursery.cancel_scope.cancel()

    def _look(self) -> float:
        """Look once and move the limits; return the seconds until the next look."""
        least, most = self._segment.size_range
        if least == most:
            self._sizer = None
            self._move(most, most, hard=False)
            return FIXED_LOOK_S
        if self._sizer is None or self._sizer.range != (least, most):
            self._sizer = sizing.Sizer(least, most)
        now_s, counts = time.monotonic(), self.statistics
        used, reserve, _ = self._segment.occupied
        spare, margin = sizing.spare_of(self._rooms.look(now_s))
        stalled = self._stalls.share(now_s)
        sample = sizing.Sample(now_s, used + reserve, self._segment.limits[0], spare, margin, stalled)
        decision = self._sizer.decide(sample, self._local())
        counts.looks += 1
        counts.spare_bytes, counts.margin_bytes, counts.stalled_percent = spare, margin, round(100 * stalled)
        self._move(decision.limit_bytes, decision.persistent_bytes, decision.hard)
        return decision.next_look_s

    def _move(self, limit_bytes: int, persistent_bytes: int, hard: bool) -> None:
        """Move the limits; have given back what exceeds them."""
        segment, counts = self._segment, self.statistics
        before = segment.limits
        now = before[0]
        if before != (limit_bytes, persistent_bytes):
            now = segment.set_limits(limit_bytes, persistent_bytes)
        counts.raised += now > before[0]
        counts.lowered += now < before[0]
        if now < before[0] and hard:
            _log.info("memory is short: %s of %s", format_size(now), format_size(segment.memory_bytes))
        used, reserve, _ = segment.occupied
        self._hard = hard
        if used + reserve > now:
            self._excess.set()

    async def _give_back(self) -> None:
        while True:
            await self._excess.wait()
            self._excess = trio.Event()
            keep = self._reserve_bytes() if self._local() else 0
            try:
                self.statistics.given_back_bytes += await trio.to_thread.run_sync(
                    self._segment.shrink, keep, self._hard
                )
            except TmemError:
                return  # the segment was destroyed


_log = logging.getLogger(__name__)
