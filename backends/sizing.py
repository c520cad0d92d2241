"""Decides when a segment grows, and what it means that programs wait for memory.

A pure function of what was seen, with a memory of when the last look was; no clock, no files, so a machine
can be played to it (`tests/backends/test_sizing.py`). Looking and making room for others are the core's
(native/headroom.c): it lowers the limit within milliseconds to what others leave, a *margin* apart. Here the
limit rises again, slowly, with a dead band of a quarter of the margin, and not for a while after it went
down. While programs wait for memory, others are left four margins, not more: a control group that reclaims
at its own limit makes pressure that more free memory would not end. Any thread, one at a time.
"""

from dataclasses import dataclass

HOLD_S = 10.0
"""How long a limit that was lowered does not rise."""
STALLED = 0.1
"""The share of time in which somebody waits for memory that takes something away."""
GROW_SHARE = 1 / 16
"""Of the way from least to most in a second."""


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
    lowered_s: float = float("-inf")
    """When room was wanted last."""


class Sizer:
    """Moves a limit between `least_bytes` and `most_bytes`."""

    def __init__(self, least_bytes: int, most_bytes: int) -> None:
        self.range = least_bytes, most_bytes
        self._calm_from_s = float("-inf")
        self._last_s: float | None = None

    def decide(self, sample: Sample) -> int:
        """Return the limit of now on."""
        least, most = self.range
        passed_s = 0.0 if self._last_s is None else min(max(sample.now_s - self._last_s, 0.0), 1.0)
        self._last_s = sample.now_s
        band = sample.margin_bytes // 4
        room = sample.used_bytes + sample.spare_bytes
        limit = min(max(sample.limit_bytes, least), most)
        self._calm_from_s = max(self._calm_from_s, sample.lowered_s + HOLD_S)
        if sample.stalled > STALLED:
            # Half of what is used in a second of waiting, until that ends or others have four margins.
            target = room - 3 * sample.margin_bytes
            if target < limit - band:
                used = min(limit, sample.used_bytes)
                limit = min(limit, max(target, used - int(used * passed_s / 2), least))
                self._calm_from_s = sample.now_s + HOLD_S
        elif room > limit + band and sample.now_s >= self._calm_from_s:
            limit = min(limit + int((most - least) * GROW_SHARE * passed_s), room, most)
        return limit
