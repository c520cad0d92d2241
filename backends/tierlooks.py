"""What is known of one client's tier: whether it answers, how full it is, what it refused.

Figures are what the client's demotion saw when it looked last, in its own thread, and say how old that is:
who asks for them waits for no tier, and one that hangs shows by their age. For `tmem list` and Prometheus,
which get them from the manager. Not for what the core counts of pages in tiers (`statistics`), nor for where
a tier lies (`tierchecks`). Threading: a `TierLook` never changes, so any thread may have it.
"""

from dataclasses import dataclass

from tmem.backends.tiers.contract import TierStatistics

LOOK_S = 10.0
"""How often a tier is looked at, also while nothing goes there."""
LATE_S = 30.0
"""What has not been seen for so long counts as down: it hangs."""


@dataclass(frozen=True)
class TierFigures:
    """A client's tier. What is None is not known: of a tier that could not be opened, all but the first
    three."""

    tier_up: bool
    """Whether the tier answered when it was looked at last, and may be trusted with pages."""
    tier_down: str
    """Why not; empty if it did."""
    tier_age_ns: int
    """How long ago that was; every ten seconds if nothing hangs."""
    tier_used_bytes: int | None = None
    """Room that the client's records take up there, those among them that are of no use any more."""
    tier_capacity_bytes: int | None = None
    """Room that there is in all; of servers, the memory that all who use them share."""
    tier_free_bytes: int | None = None
    """What is left of that."""
    tier_records: int | None = None
    """Records that are kept there, those among them that are of no use any more."""
    tier_written_records: int | None = None
    """Records that were written since the manager opened the tier."""
    tier_written_bytes: int | None = None
    """Bytes of those."""
    tier_refused_batches: int | None = None
    """Batches that found the tier full, since then."""
    tier_failures: int | None = None
    """Writes, reads and looks that it did not answer, since then."""


@dataclass(frozen=True)
class TierLook:
    """A tier as it was seen at one moment."""

    at_s: float
    """When, by the clock of who looked."""
    down: str
    """Why it did not answer or may not be trusted; empty if it did."""
    statistics: TierStatistics | None
    """None: it could not be opened."""

    def figures(self, now_s: float) -> TierFigures:
        """Return what is to be told of it now."""
        age_s = max(now_s - self.at_s, 0.0)
        down = self.down
        if not down and age_s > LATE_S:
            down = f"it has not answered for {age_s:.0f} s"
        up, age_ns, known = not down, int(age_s * 1e9), self.statistics
        if known is None:
            return TierFigures(up, down, age_ns)
        return TierFigures(
            up,
            down,
            age_ns,
            tier_used_bytes=known.used_bytes,
            tier_capacity_bytes=known.capacity_bytes,
            tier_free_bytes=known.free_bytes,
            tier_records=known.records,
            tier_written_records=known.written_records,
            tier_written_bytes=known.written_bytes,
            tier_refused_batches=known.refused,
            tier_failures=known.failures,
        )
