"""When pages of a segment are moved together, so that the memory of what was freed between them goes back.

The core does it (`_native.Segment.compact`). This says when: where it gains an eighth of the memory, for a
tenth of the time that passes between, most of a CPU where half of the memory is holes; whoever asks and
however often. First packs are taken apart that many of their pages have left (`_native.Segment.unpack`): what
they gain is not holes before that.
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
"""Seconds that it may take for each in which it does not run, and where more than half of the memory is
holes; a GiB takes 0.6 s."""
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
        """The chunk with which taking packs apart goes on."""
        self.many_holes = False
        """Whether more than half of the memory was holes at the last step, and some of them went."""
        self._busy = threading.Lock()
        self._saved_ns = MUCH_NS
        self._counted_ns = clock_ns()

    def step(self) -> int:
        """Move pages together if that is worth it and time is left; the bytes of the chunks that came
        free."""
        used, _, holes = self._segment.occupied
        lost = self._segment.pack_losses * LOST_BYTES
        many, self.many_holes = holes + lost > used // 2, False
        worth = max(used // 8, LEAST_HOLES_BYTES)
        unpacks = lost > worth or self._unpacked_to > 0
        if (holes <= worth and not unpacks) or not self._busy.acquire(blocking=False):
            return 0
        try:
            freed = self._step_locked(many, unpacks)
            self.many_holes = (many and freed > 0) or unpacks
            return freed
        finally:
            self._busy.release()

    def _step_locked(self, many: bool, unpacks: bool) -> int:
        earned, most_ns = (MUCH_EARNED, MUCH_NS) if many else (EARNED, MOST_NS)
        began_ns, counts = self._clock_ns(), self.statistics
        saved_ns = min(self._saved_ns + int((began_ns - self._counted_ns) * earned), most_ns)
        if saved_ns < LEAST_NS:
            return 0
        if unpacks:
            freed = 0
            self._unpacked_to, _ = self._segment.unpack(self._unpacked_to, saved_ns)
        else:
            freed = self._segment.compact(WORTH_HOLES, saved_ns)
        self._counted_ns = self._clock_ns()
        took_ns = self._counted_ns - began_ns
        self._saved_ns = saved_ns - took_ns
        counts.compacted_bytes += freed
        counts.compacting_ns += took_ns
        return freed
