"""Prefetch: pages come back from their client's tier to memory, in the background, while there is plenty.

What went when memory was short would cost a read of a disk or a server for as long as it stays away. So
once that is over for `QUIET_S`, pages come back: first those that lie beside pages which were read lately,
then all in the order of their slots. With `tier_cold_s` set only the first, for the others may have gone
because nobody uses them, and would go again.

It disturbs nobody. The core takes only memory that is free, below the limit, caps and promises, and stops
where a quarter is left, twice what demotion begins at; it begins where three eighths are. `Room` says what
the machine can spare. It reads for a fifth of the time at most, and a tier that fails is left alone.

Not for bringing everything back because a tier is taken away (`tiering.withdraw`). Threading: a `Prefetch`
belongs to the thread of its client's tier, a `Room` to one thread at a time.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import pressure, resizing, sizing
from tmem.backends.segment import core

if TYPE_CHECKING:
    from tmem.backends import _native

KEEP_SIXTEENTHS = 4
"""How much of the limit and of a client's cap stays free in any case."""
BEGIN_SIXTEENTHS = 6
"""How much must be free for pages to begin to come back, so that this and demotion do not take turns."""
QUIET_S = 10.0
"""How long memory must not have been short."""
BATCH_PAGES = 256
ROUND_S = 0.25
"""How long a round goes on, at most."""
REST_S = 10.0
"""How long to leave it after there was no room, the tier failed, or everything was looked at."""


class Room:
    """How much memory the machine, and the control groups that pay for the segment, can spare."""

    def __init__(self, segment: "_native.Segment", proc: Path = Path("/proc")) -> None:
        groups = resizing.files_of_groups(proc)
        self._headroom: _native.Headroom = core().Headroom(segment, str(proc / "meminfo"), groups)
        self._stalls = pressure.Stalls(pressure.stall_files("self", proc))

    def __call__(self) -> int:
        """Return how many bytes may be taken: what is there beyond two margins, nothing while somebody
        waits for memory."""
        _, _, spare_bytes, margin_bytes = self._headroom.look()
        calm = self._stalls.share(time.monotonic()) <= sizing.STALLED
        return max(spare_bytes - margin_bytes, 0) if calm and margin_bytes else 0


class Prefetch:
    """One client's pages on their way back."""

    def __init__(
        self, segment: "_native.Segment", client: "_native.Client", clock: Callable[[], float]
    ) -> None:
        self.pages = 0
        """That came back."""
        self.spent_ns = 0
        """How long that took, mostly reading."""
        self._segment = segment
        self._client = client
        self._clock = clock
        self._rest_until_s = float("-inf")
        self._going = False
        self._hand = 0

    def round(self, most_pages: int, near_only: bool, undisturbed: Callable[[], bool]) -> None:
        """Bring back up to `most_pages`, or a few more, while that is so. Raises `TmemError` if the client
        ends."""
        now_s = self._clock()
        if now_s < self._rest_until_s or most_pages <= 0 or not self._is_plenty():
            return
        began_ns = time.monotonic_ns()
        try:
            for near in (True, False)[: 1 if near_only else 2]:
                most_pages -= self._lap(near, most_pages, now_s + ROUND_S, undisturbed)
        finally:
            self.spent_ns += time.monotonic_ns() - began_ns

    def stop(self) -> None:
        """Memory is short: there must be plenty again before it goes on."""
        self._going = False

    def _is_plenty(self) -> bool:
        if not self._client.statistics()["tier_pages"]:
            return False
        share = 1 - BEGIN_SIXTEENTHS / 16
        self._going = self._going or self._segment.occupied[0] <= self._segment.limits[0] * share
        return self._going

    def _lap(self, near: bool, most_pages: int, until_s: float, undisturbed: Callable[[], bool]) -> int:
        """Go around, or on with it: near pages from the beginning, all from where the last round ended."""
        hand, pages = 0 if near else self._hand, 0
        while pages < most_pages and self._rest_until_s < until_s and undisturbed():
            batch = min(BATCH_PAGES, most_pages - pages)
            hand, came, why = self._client.prefetch(hand, batch, near, KEEP_SIXTEENTHS)
            pages += came
            self.pages += came
            if why:
                self._going = self._going and why != "room"
            if why or not (hand or near):
                self._rest_until_s = self._clock() + REST_S
            if not hand or self._clock() >= until_s:
                break
        if not near:
            self._hand = hand
        return pages
