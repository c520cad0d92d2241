"""Keeps a segment as large as the machine can spare: looks, lets `sizing` decide, and gives memory back.

A task of the manager. Looks and changes of the limit happen in the event loop, 0.2 ms each, as often as the
decision says. Two threads wait beside it, both there from the start, since none can be started once memory is
out: one gives back, in slices, so that a long one hears when it has become urgent; one waits for the kernel
to report pressure. Not in the data path: without a manager the limits stay where they are.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from tmem.backends import pressure, sizing
from tmem.backends.compacting import Compactor
from tmem.errors import TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

FIXED_LOOK_S = 1.0
"""How often somebody may have given a segment of fixed size another one."""
_WATCH_S = 1.0
SLICE_BYTES = 16 << 20
"""How much is given back between two looks at how urgent it is."""
_TROUBLES = (TmemError, OSError, ValueError, MemoryError)


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
        self,
        segment: "_native.Segment",
        compactor: Compactor,
        reserve_bytes: Callable[[], int],
        local: Callable[[], bool],
        look: Callable[[float], Sequence[pressure.Room]] | None = None,
    ) -> None:
        """`reserve_bytes` says how much stays backed in any case while `local` says that this machine swaps
        to the segment. `look` says what memory there is, if not this machine's."""
        self.statistics = ResizeStatistics()
        self._segment = segment
        self._compactor = compactor
        self._reserve_bytes = reserve_bytes
        self._local = local
        self._rooms = look or pressure.Rooms(os.getpid()).look
        self._stalls = pressure.Stalls(pressure.stall_files(os.getpid()))
        self._sizer: sizing.Sizer | None = None
        self._excess = threading.Event()
        self._keep_bytes = 0
        self._hard = self._short = self._in_vain = self._ending = False
        self._vain_s = sizing.LEAST_LOOK_S
        self._complaints: dict[str, str] = {}

    async def run(self) -> None:
        """Look and decide until cancelled."""
        pressed = _Pressed()
        giver = threading.Thread(target=self._give_back, name="tmem-shrink", daemon=True)
        giver.start()
        try:
            while self._segment.alive:
                next_look_s = FIXED_LOOK_S
                try:
                    next_look_s = self._look()
                    self._complaints.pop("look", None)
                except _TROUBLES as error:
                    self._complain("look", "cannot see how much memory there is", error)
                if self._sizer is not None and next_look_s > 2 * sizing.LEAST_LOOK_S:
                    await pressed.wait(next_look_s)
                    await trio.sleep(sizing.LEAST_LOOK_S)
                else:
                    await trio.sleep(next_look_s)
        finally:
            self._ending = True
            self._excess.set()
            giver.join()  # it ends with its slice, in less than half a second

    def _look(self) -> float:
        """Look once and move the limits; return the seconds until the next look."""
        least, most = self._segment.size_range
        self._keep_bytes = self._reserve_bytes() if self._local() else 0
        if least == most:
            self._sizer = None
            self._move(most, most, hard=False)
            return FIXED_LOOK_S
        if self._sizer is None or self._sizer.range != (least, most):
            self._sizer = sizing.Sizer(least, most)
        now_s, counts = time.monotonic(), self.statistics
        used, reserve, _ = self._segment.occupied
        spare, margin = sizing.spare_of(self._rooms(now_s))
        stalled = self._stalls.share(now_s)
        sample = sizing.Sample(now_s, used + reserve, self._segment.limits[0], spare, margin, stalled)
        decision = self._sizer.decide(sample, self._local())
        counts.looks += 1
        counts.spare_bytes, counts.margin_bytes, counts.stalled_percent = spare, margin, round(100 * stalled)
        more = self._move(decision.limit_bytes, decision.persistent_bytes, decision.hard)
        self._vain_s = sizing.LEAST_LOOK_S if more else min(2 * self._vain_s, sizing.MOST_LOOK_S)
        return max(decision.next_look_s, self._vain_s)

    def _move(self, limit_bytes: int, persistent_bytes: int, hard: bool) -> bool:
        """Move the limits; have given back what exceeds them. False if there is no more to give: persistent
        pages and floors hold the limit up, or giving back has just been in vain."""
        segment, counts = self._segment, self.statistics
        before = segment.limits
        now = before[0]
        if before != (limit_bytes, persistent_bytes):
            now = segment.set_limits(limit_bytes, persistent_bytes)
        counts.raised += now > before[0]
        counts.lowered += now < before[0]
        if now < before[0] and hard and not self._short:  # once, not a hundred times a second
            _log.info("memory is short: %s of %s", format_size(now), format_size(segment.memory_bytes))
        self._short = (self._short or (now < before[0] and hard)) and now <= before[0]
        used, reserve, _ = segment.occupied
        self._hard = hard
        if used <= now and used + reserve <= now + self._keep_bytes:
            self._in_vain = False
            return now <= limit_bytes
        if now < before[0]:
            self._in_vain = False
        self._excess.set()
        return not self._in_vain

    def _give_back(self) -> None:
        """The thread that does."""
        while True:
            self._excess.wait()
            self._excess.clear()
            if self._ending or not self._segment.alive:
                return
            try:
                self._in_vain = not self._shrink()
                self._complaints.pop("shrink", None)
            except _TROUBLES as error:
                self._in_vain = True
                self._complain("shrink", "cannot give memory back", error)

    def _shrink(self) -> int:
        """Give back what exceeds the limit; the bytes."""
        total, counts = 0, self.statistics
        while not self._ending:
            some = self._segment.shrink(self._keep_bytes, self._hard, SLICE_BYTES)
            total += some
            counts.given_back_bytes += some
            if not some and (
                self._segment.occupied[0] <= self._segment.limits[0] or not self._compactor.step()
            ):
                break
        return total

    def _complain(self, what: str, words: str, error: Exception) -> None:
        """Log what is wrong, once."""
        if self._complaints.get(what) != str(error):
            _log.warning("%s: %s", words, error)
        self._complaints[what] = str(error)


class _Pressed:
    """Waits for pressure, in a thread that is there already. Belongs to the trio run in which it is made."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._trigger = pressure.Trigger()
        if self._trigger.works:
            threading.Thread(target=self._watch, name="tmem-pressure", daemon=True).start()

    async def wait(self, timeout_s: float) -> None:
        """Return when somebody waits for memory, or after `timeout_s`."""
        self._event = trio.Event()
        with trio.move_on_after(timeout_s):
            await self._event.wait()

    def _watch(self) -> None:
        with suppress(trio.RunFinishedError):
            while self._trigger.works:
                pressed = self._trigger.wait(_WATCH_S)
                self._token.run_sync_soon(self._tell if pressed else _nothing)  # raises once the run is over

    def _tell(self) -> None:
        self._event.set()


def _nothing() -> None: ...


_log = logging.getLogger(__name__)
