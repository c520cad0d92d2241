"""When pages of a segment are moved together, so that the memory of what was freed between them goes back.

The core does it (`_native.Segment.compact`). This says when: where it gains an eighth of the memory, for a
tenth of the time that passes between, and for most of a CPU, until it is done, once half of the memory is
holes; whoever asks and however often. A pack that most of its pages have left is taken apart when its chunk
is emptied. What pages have left in packs elsewhere is no hole: those are looked for
(`_native.Segment.unpack`) in what time is left.
Not for a put that waits for memory: the core helps itself.

Threading: any thread; `step` blocks while it works, half a second at most, and a second one at the same time
does nothing.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmem.backends import _native

LEAST_HOLES_BYTES = 4 << 20
WORTH_HOLES = 8
"""Sixteenths of a chunk that must be free for its pages to be moved: a byte moved gains at least a byte."""
EARNED, MUCH_EARNED = 0.1, 5.0
"""Seconds that it may take for each in which it does not run, and once more than half of the memory is holes;
a GiB takes 0.6 s, of packs 4 s."""
MOST_NS, MUCH_NS = 100_000_000, 500_000_000
"""How much of that is saved up, and how long a step takes at most."""
LOST_BYTES = 1024
"""About what a page takes in a pack, and after it has left that."""
LEAST_NS = 5_000_000
"""Less is saved up first: every call may look at all chunks."""


@dataclass
class CompactStatistics:
    """What moving pages together in the background has done."""

    compacted_bytes: int = 0
    """Memory of chunks that it freed by moving their pages together."""
    compacting_ns: int = 0
    """What that took."""

    def __add__(self, other: "CompactStatistics") -> "CompactStatistics":
        return CompactStatistics(
            self.compacted_bytes + other.compacted_bytes, self.compacting_ns + other.compacting_ns
        )


class Compactor:
    """Spends the time there is for moving the pages of one segment."""

    def __init__(self, segment: "_native.Segment", clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.statistics = CompactStatistics()
        self._segment = segment
        self._clock_ns = clock_ns
        self._unpacked_to = 0
        """Where looking for packs goes on."""
        self._kept = 0
        """Pages that have left packs which are worth more as they are: as many as the last look left."""
        self.many_holes = False
        """Whether more than half of the memory was holes at the last step, and some of them went."""
        self._much = False
        """Whether more than half of the memory was holes, and what is left of them is still worth it."""
        self._busy = threading.Lock()
        self._saved_ns = MUCH_NS
        self._counted_ns = clock_ns()

    def step(self) -> int:
        """Move pages together if that is worth it and time is left; the bytes of the chunks that came
        free."""
        used, _, holes = self._segment.occupied
        losses = self._segment.pack_losses
        self._kept = min(self._kept, losses)
        lost = (losses - self._kept) * LOST_BYTES
        self.many_holes = False
        worth = max(used // 8, LEAST_HOLES_BYTES)
        self._much = holes + lost > used // 2 or (self._much and holes + lost > worth)
        unpacks = lost > worth or self._unpacked_to > 0
        if (holes <= worth and not unpacks) or not self._busy.acquire(blocking=False):
            return 0
        try:
            freed = self._step_locked(self._much, holes > worth, unpacks)
            self._much &= freed != 0 or unpacks
            self.many_holes = self._much or unpacks
            return freed or 0
        finally:
            self._busy.release()

    def _step_locked(self, many: bool, compacts: bool, unpacks: bool) -> int | None:
        earned, most_ns = (MUCH_EARNED, MUCH_NS) if many else (EARNED, MOST_NS)
        began_ns, counts = self._clock_ns(), self.statistics
        saved_ns = min(self._saved_ns + int((began_ns - self._counted_ns) * earned), most_ns)
        if saved_ns < LEAST_NS:
            return None
        freed = self._segment.compact(WORTH_HOLES, saved_ns) if compacts else 0
        left_ns = saved_ns - (self._clock_ns() - began_ns)
        if unpacks and left_ns >= LEAST_NS:
            self._unpacked_to, _ = self._segment.unpack(self._unpacked_to, left_ns)
            if not self._unpacked_to:
                self._kept = self._segment.pack_losses
        self._counted_ns = self._clock_ns()
        took_ns = self._counted_ns - began_ns
        self._saved_ns = saved_ns - took_ns
        counts.compacted_bytes += freed
        counts.compacting_ns += took_ns
        return freed
