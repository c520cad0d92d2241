"""Decides when pages that this machine has swapped out are worth bringing back, and when to stop.

A pure function of what was seen, with a memory of how it went; no clock, no files, so a machine can be played
to it (`tests/backends/test_repatriating.py`). The kernel leaves a page on its swap device until somebody
touches it, and tells late or never that it has freed one, so a pool keeps what nobody needs. Bringing it all
back is worth it where memory is in plenty and has been for long: nobody waits for memory, nothing is swapped
out, and what is available is twice what would come back and an eighth of the machine.

It must not take turns with the kernel. A pass that had to stop, or after which a quarter of what came back
was swapped out again, doubles the time that everything must have been calm, up to `MOST_WAITS` times what was
asked for; one that was not regretted in all that time halves it again.

Not for pages in a tier (`prefetching`). Doing it is `repatriator`'s and `tmem.nbd.repatriate`'s. Any thread,
one at a time.
"""

from dataclasses import dataclass

CALM, STALLED = 0.01, 0.1
"""The share of time in which somebody may wait for memory: before a pass, and during one, in which whoever
touches a page that is still away waits as ever."""
OUT_PAGES_PER_S, OUT_PAGES = 16, 256
"""What may be swapped out all the same, in a second and at once: one group at its limit swaps a page now and
then for ever, and says nothing of the machine."""
LEAST_BYTES = 1 << 20
"""Pages of less are not worth a pass."""
BEGIN_SHARE, STOP_SHARE = 8, 16
"""These parts of RAM are left to others: to begin, and to go on."""
REGRET_SHARE = 4
"""A pass after which this part of what came back goes out again was a mistake."""
MOST_WAITS = 64
"""How many times the time that was asked for it must be calm at most."""
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Sample:
    """What was seen."""

    now_s: float
    kept_bytes: int
    """Pages in persistent pools, as they are without compression."""
    missing_bytes: int
    """What is swapped out and not in RAM as well."""
    available_bytes: int
    total_bytes: int
    stalled: float
    """Share of the time since the last look in which somebody waited for memory."""
    swapped_out_pages: int
    """What the kernel has swapped out since it runs."""


def swapped_out_since(seen: Sample, then_s: float, then_pages: int) -> float:
    """Return how many pages were swapped out since, beyond what is next to nothing."""
    return seen.swapped_out_pages - then_pages - OUT_PAGES_PER_S * (seen.now_s - then_s)


def objection(seen: Sample, began: Sample) -> str:
    """Return why a pass that began at that sample must stop, ``""`` if it may go on."""
    if swapped_out_since(seen, began.now_s, began.swapped_out_pages) > OUT_PAGES:
        return "the kernel swaps out"
    if seen.available_bytes < seen.missing_bytes + seen.total_bytes // STOP_SHARE:
        return "too little memory is available"
    return "somebody waits for memory" if seen.stalled > STALLED else ""


class Repatriation:
    """Says when a pass is due if it must have been calm for `idle_s`."""

    def __init__(self, idle_s: float) -> None:
        self.wait_s = self._idle_s = idle_s
        """How long it must have been calm now."""
        self._calm_from_s: float | None = None
        self._last: tuple[float, int] = (0.0, 0)
        """When it looked last, and the count of swapped-out pages then."""
        self._on_trial: tuple[float, int, int] | None = None
        """When the last pass ended, the count of swapped-out pages then, and the pages that came back."""

    def due(self, seen: Sample) -> bool:
        """Look; return whether a pass may begin now."""
        plenty = seen.available_bytes >= 2 * seen.missing_bytes + seen.total_bytes // BEGIN_SHARE
        calm = seen.stalled <= CALM and swapped_out_since(seen, *self._last) <= 0
        self._last = seen.now_s, seen.swapped_out_pages
        self._try(seen)
        if not (plenty and calm) or self._calm_from_s is None:
            self._calm_from_s = seen.now_s
        return seen.kept_bytes >= LEAST_BYTES and seen.now_s - self._calm_from_s >= self.wait_s

    def ended(self, seen: Sample, returned_bytes: int, stopped: bool) -> None:
        """A pass has ended that brought so much back; `stopped`: before it was done."""
        self._calm_from_s = seen.now_s
        self._last = seen.now_s, seen.swapped_out_pages
        self._on_trial = None
        if stopped:
            self._wait_longer()
        elif returned_bytes:
            self._on_trial = seen.now_s, seen.swapped_out_pages, returned_bytes // _PAGE_BYTES

    def _try(self, seen: Sample) -> None:
        if self._on_trial is None:
            return
        ended_s, before, returned = self._on_trial
        if swapped_out_since(seen, ended_s, before) * REGRET_SHARE >= max(returned, 1):
            self._wait_longer()
            self._on_trial = None
        elif seen.now_s - ended_s >= self.wait_s:
            self.wait_s = max(self.wait_s / 2, self._idle_s)
            self._on_trial = None

    def _wait_longer(self) -> None:
        self.wait_s = min(self.wait_s * 2, self._idle_s * MOST_WAITS)
