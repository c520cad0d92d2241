"""Whether caching pays: what the hits of a mount save against what its puts cost.

A mount keeps an account over windows. In one the pool must have turned over once: as many pages were evicted
(or refused) as it holds. Before that nothing speaks against caching, the memory being there; and every page
had its chance to be hit. A window has paid if

    (hit pages - pages read ahead) x (lower's time per page - HIT_NS)
        >= time spent in puts + missed reads x MISS_NS

A page that was read ahead is hit once because it was read ahead: that hit proves nothing. If a window has not
paid, new opens pass by the pool; files that are open stay as they are. After `FIRST_REST_SECONDS` the mount
tries again for a window, and after each that fails rests twice as long, up to `LONGEST_REST_SECONDS`.

Nothing happens by itself: `aside` is asked at each open, and looks at the account once a second. Threading:
the event loop's thread.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

HIT_NS = 2_000
"""What a page costs that is answered from the pool: 0.4 to 0.5 ms a MiB of LZ4."""
MISS_NS = 30_000
"""What a read costs more through the daemon than by the kernel's pass-through, beside the put."""
LOOK_SECONDS = 1.0
LEAST_PAGES = 16_384
"""A window has at least so many evictions: 64 MiB of pages."""
FIRST_REST_SECONDS = 60.0
LONGEST_REST_SECONDS = 3600.0


@dataclass(frozen=True)
class Account:
    """Sums since the mount began, but for `stored_pages`."""

    hit_pages: int = 0
    ahead_pages: int = 0
    """Pages that were read before anybody asked for them."""
    miss_reads: int = 0
    lower_pages: int = 0
    """Pages read from lower files, by whatever kind of read."""
    lower_ns: int = 0
    """Time that took."""
    put_ns: int = 0
    """Time spent in puts."""
    gone_pages: int = 0
    """Pages that were evicted or refused."""
    stored_pages: int = 0
    """Pages in the pool now."""

    def since(self, start: "Account") -> "Account":
        """Return what came after `start`."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(start)
        between = Account(*(a - b for a, b in zip(mine, theirs, strict=True)))
        return dataclasses.replace(between, stored_pages=self.stored_pages)

    @property
    def turned_over(self) -> bool:
        """Whether this is enough to judge by."""
        return self.gone_pages >= max(self.stored_pages, LEAST_PAGES)

    @property
    def saved_ns(self) -> int:
        """What the hits have saved."""
        reused = max(self.hit_pages - self.ahead_pages, 0)
        return reused * max(self.lower_ns // max(self.lower_pages, 1) - HIT_NS, 0)

    @property
    def spent_ns(self) -> int:
        """What caching has cost."""
        return self.put_ns + self.miss_reads * MISS_NS


class Worth:
    """Decides for one mount. `account` tells how it stands, `clock` is a monotonic clock in seconds."""

    def __init__(self, account: Callable[[], Account], clock: Callable[[], float]) -> None:
        self._account = account
        self._clock = clock
        self._start: Account | None = None  # of the window
        self._next_look = float("-inf")
        self._aside_until: float | None = None
        self._rest = FIRST_REST_SECONDS

    def aside(self) -> bool:
        """Say whether what is opened now should pass by the pool."""
        now = self._clock()
        if self._aside_until is not None:
            if now < self._aside_until:
                return True
            self._aside_until = self._start = None
        elif now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        self._look(now)
        return self._aside_until is not None

    @property
    def resting(self) -> bool:
        """Whether the mount has stepped aside and its rest is not over."""
        return self._aside_until is not None and self._clock() < self._aside_until

    def _look(self, now: float) -> None:
        total = self._account()
        if self._start is None or total.gone_pages < self._start.gone_pages:  # a new pool counts from zero
            self._start = total
            return
        window = total.since(self._start)
        if not window.turned_over:
            return
        self._start = total
        if window.saved_ns >= window.spent_ns:
            self._rest = FIRST_REST_SECONDS
            return
        self._aside_until = now + self._rest
        self._rest = min(self._rest * 2, LONGEST_REST_SECONDS)
