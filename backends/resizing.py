"""Keeps a segment as large as the machine can spare.

Two hands. A thread of the core (native/headroom.c) makes room for others: it looks every few milliseconds
when memory is short, lowers the limit and gives back, without the interpreter. A task of the manager looks
once a second, and as soon as the kernel reports that somebody waits for memory, lets `sizing` decide whether
the segment may grow or pressure takes something away, and tells the thread. Both threads that this needs are
there from the start, since none can be started once memory is out. Not in the data path: without a manager
the limits stay where they are.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tmem.backends import cgroup, pressure, sizing
from tmem.backends.segment import core
from tmem.errors import TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

LOOK_S = 1.0
PRESSED_LOOK_S = 0.05
"""The soonest look after one that pressure has brought about."""
_WATCH_S = 1.0
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
    """Time spent waiting for memory between the last two looks of the manager."""
    given_back_bytes: int = 0
    """Memory that was given back because the limit fell."""
    raised: int = 0
    """Times that the limit was raised."""
    lowered: int = 0
    """Times that it was lowered."""
    urgency: int = 0
    """How what gives back is scheduled: 2 realtime, 1 before most programs, 0 as any other."""


class Resizer:
    """Moves the limits of one segment for as long as `run` runs."""

    def __init__(
        self,
        segment: "_native.Segment",
        reserve_bytes: Callable[[], int],
        local: Callable[[], bool],
        proc: Path = Path("/proc"),
    ) -> None:
        """`reserve_bytes` says how much stays backed in any case while `local` says that this machine swaps
        to the segment."""
        self._counts = ResizeStatistics()
        self._segment = segment
        self._reserve_bytes = reserve_bytes
        self._local = local
        self._headroom: _native.Headroom = core().Headroom(
            segment, str(proc / "meminfo"), files_of_groups(proc)
        )
        self._stalls = pressure.Stalls(pressure.stall_files("self", proc))
        self._sizer: sizing.Sizer | None = None
        self._lowered = 0
        self._short = self._news = False
        self._complaint = ""
        self._ending = threading.Event()

    @property
    def statistics(self) -> ResizeStatistics:
        """What the core has seen and done up to now."""
        self._see()
        return self._counts

    async def run(self) -> None:
        """Look and decide until cancelled."""
        pressed = _Pressed()
        giver = threading.Thread(target=self._make_room, name="tmem-room", daemon=True)
        giver.start()
        try:
            while self._segment.alive:
                try:
                    self._look()
                    self._complaint = ""
                except _TROUBLES as error:
                    if self._complaint != str(error):  # once
                        _log.warning("cannot follow how much memory there is: %s", error)
                    self._complaint = str(error)
                await pressed.wait(LOOK_S)
                await trio.sleep(PRESSED_LOOK_S)
        finally:
            self._ending.set()
            self._headroom.end()
            giver.join()  # it ends with its slice, in some ten milliseconds

    def _see(self) -> dict[str, int]:
        """Return the core's statistics."""
        seen, counts = self._headroom.statistics(), self._counts
        counts.looks, counts.given_back_bytes = seen["looks"], seen["given_back_bytes"]
        counts.spare_bytes, counts.margin_bytes = seen["spare_bytes"], seen["margin_bytes"]
        counts.urgency, counts.lowered = seen["urgency"], self._lowered + seen["lowered"]
        self._news = self._news or bool(seen["short"])
        return seen

    def _look(self) -> None:
        """Look once; move the limit where it is not the core that does."""
        segment, counts = self._segment, self._counts
        local, seen = self._local(), self._see()
        stalled = self._stalls.share(now_s := time.monotonic())
        counts.stalled_percent = round(100 * stalled)
        least, most = segment.size_range
        known = bool(seen["margin_bytes"])
        if least < most and seen["looks"] and known:
            if self._sizer is None or self._sizer.range != (least, most):
                self._sizer = sizing.Sizer(least, most)
            self._move(seen, stalled, now_s)
        if self._news and not self._short:  # once, not at each look
            _log.info(
                "memory is short: %s of %s", format_size(segment.limits[0]), format_size(segment.memory_bytes)
            )
        self._short = bool(seen["short"]) or (
            self._short and now_s < self._headroom.lowered_s + sizing.HOLD_S
        )
        self._headroom.give_back(self._reserve_bytes() if local else 0, local)
        if seen["looks"] and not known:
            raise OSError(errno.EIO, "/proc/meminfo cannot be read, so the size stays as it is")

    def _move(self, seen: dict[str, int], stalled: float, now_s: float) -> None:
        assert self._sizer is not None
        limit, persistent = self._segment.limits
        sample = sizing.Sample(
            now_s,
            seen["used_bytes"],
            limit,
            seen["spare_bytes"],
            seen["margin_bytes"],
            stalled,
            self._headroom.lowered_s or float("-inf"),
        )
        wanted = self._sizer.decide(sample)
        if wanted != limit:
            # How far persistent pages may go is the core's: it knows what there is now.
            now = self._segment.set_limits(wanted, persistent)
            self._counts.raised += now > limit
            self._lowered += now < limit

    def _make_room(self) -> None:
        """The thread that does. It goes on after troubles: without it others would get nothing back."""
        complaint = ""
        while self._segment.alive and not self._ending.is_set():
            try:
                self._headroom.run()
            except _TROUBLES as error:
                if complaint != str(error):  # once
                    _log.warning("memory is not given back: %s", error)
                complaint = str(error)
                self._ending.wait(LOOK_S)


def files_of_groups(proc: Path) -> list[tuple[str, str, str]]:
    """Return the files of the control groups that this process is charged to."""
    found = []
    for group in cgroup.groups_of("self", proc):
        for limit, usage in zip(cgroup.LIMIT_FILES.values(), cgroup.USAGE_FILES, strict=True):
            files = group / limit, group / usage, group / "memory.stat"
            if all(file.exists() for file in files):
                found.append((str(files[0]), str(files[1]), str(files[2])))
    return found


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
