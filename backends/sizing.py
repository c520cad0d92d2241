"""Decides how large a segment should be: as large as the machine can spare, between a least and a most size.

A pure function of what was seen, with a memory of when it last took something away; no clock, no files, so
a machine can be played to it (`tests/backends/test_sizing.py`). Looking is `tmem.backends.pressure`'s, doing
it `tmem.backends.resizing`'s. Any thread, one at a time.

What others do not need is what the segment uses and what is available beyond a *margin*. That sum does
not change when the segment itself grows or shrinks, so the rule does not feed back on itself. The limit
follows it down at once and up slowly, with a dead band of a quarter of the margin on both sides, and not up
for a while after it went down. While programs wait for memory, others are left four margins, not more: a
control group that reclaims at its own limit makes pressure that more free memory would not end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tmem.backends.pressure import Room

HOLD_S = 10.0
"""How long a limit that was lowered does not rise."""
STALLED = 0.1
"""The share of time in which somebody waits for memory that takes something away."""
GROW_SHARE = 1 / 16
"""Of the way from least to most in a second."""
FASTEST_BYTES_S = 4 << 30
"""How fast a program may take memory: looks are so close that half a margin lasts until the next."""
LEAST_LOOK_S, MOST_LOOK_S = 0.01, 1.0
LEAD_S = 0.1
"""How far ahead of a program that takes memory to be: giving it back takes that long."""


@dataclass(frozen=True)
class Sample:
    """What was seen."""

    now_s: float
    used_bytes: int
    """Memory of the segment, its reserve included."""
    limit_bytes: int
    """The limit that is in force."""
    spare_bytes: int
    """What is available beyond the margin; negative if less."""
    margin_bytes: int
    """What must stay available for others."""
    stalled: float
    """Share of the time since the last look in which somebody waited for memory."""


@dataclass(frozen=True)
class Decision:
    """What to do."""

    limit_bytes: int
    persistent_bytes: int
    """How far persistent pages may go: to a quarter of the margin."""
    hard: bool
    """Whether memory is needed so soon that pages which were hit are not spared."""
    next_look_s: float
    """When to look again."""


def margin_of(total_bytes: int) -> int:
    """Return how much of the memory of a machine or a group stays available: a 16th, and at least 128 MiB or
    an eighth. A control group kills as soon as it is full, and a program takes 1.4 GB/s."""
    return max(total_bytes // 16, min(128 << 20, total_bytes // 8))


def spare_of(rooms: Sequence[Room]) -> tuple[int, int]:
    """Return what the tightest of `rooms` has beyond its margin, and that margin."""
    return min(
        (room.available_bytes - margin_of(room.total_bytes), margin_of(room.total_bytes)) for room in rooms
    )


class Sizer:
    """Moves a limit between `least_bytes` and `most_bytes`."""

    def __init__(self, least_bytes: int, most_bytes: int) -> None:
        self.range = least_bytes, most_bytes
        self._calm_from_s = float("-inf")
        self._last_s: float | None = None
        self._last_room = 0
        self._last_used = 0
        self._vain_s = LEAST_LOOK_S

    def decide(self, sample: Sample, local: bool = False) -> Decision:
        """Return what to do now. `local`: this machine swaps to the segment, so a page put frees memory."""
        least, most = self.range
        passed_s = 0.0 if self._last_s is None else max(sample.now_s - self._last_s, 0.0)
        self._last_s = sample.now_s
        band = sample.margin_bytes // 4
        room = sample.used_bytes + sample.spare_bytes
        falling = max(self._last_room - room, 0) / passed_s if passed_s > 0 else 0.0  # bytes a second
        self._last_room = room
        ahead = min(int(falling * LEAD_S), 2 * sample.margin_bytes)
        limit = min(max(sample.limit_bytes, least), most)
        target = room - 3 * sample.margin_bytes if sample.stalled > STALLED else room
        if target < limit - band:
            if target == room:
                target -= ahead
            else:  # half of what is used in a second of waiting, until that ends
                used = min(limit, sample.used_bytes)
                target = min(max(target, used - int(used * min(passed_s, 1.0) / 2)), max(room - ahead, least))
            limit = min(limit, max(target, least))
            self._calm_from_s = sample.now_s + HOLD_S
        elif target > limit + band and sample.now_s >= self._calm_from_s:
            limit = min(limit + int((most - least) * GROW_SHARE * min(passed_s, 1.0)), target, most)
        persistent = most if local else min(max(room + 3 * band, limit), most)
        hard = sample.spare_bytes - ahead < -2 * band
        return Decision(limit, persistent, hard, self._next_look_s(sample, limit))

    def _next_look_s(self, sample: Sample, limit: int) -> float:
        soonest_s = (sample.spare_bytes + sample.margin_bytes / 2) / FASTEST_BYTES_S
        # At its least, and nothing more comes back: persistent pages stay. While something does, giving it
        # back may have to be asked for again.
        vain = limit <= self.range[0] and sample.used_bytes >= self._last_used
        self._vain_s = self._vain_s * 2 if vain else LEAST_LOOK_S
        self._last_used = sample.used_bytes
        return min(max(soonest_s, self._vain_s), MOST_LOOK_S)
