"""Batches of pages that are under way from memory to a tier: while servers store one the next is collected.

Each batch goes the way of docs/concurrency.md: **collect** (copies), **begin** (the tier has something to
do), **end** (it has acknowledged), **demote** (only now slots name the records, and memory is free). Pages
stay in memory and in use until the last of these; one that was put, flushed or brought back in between stays
as it is, and leaves a record that nobody names.

What is under way no slot names, so `retain` would forget it, and `demote` would then name what is gone.
`tidy` is the only one that calls `retain`, and it lands everything first.

A batch that fails takes those behind it along: they are given up, and their pages stay where they are.

Not for what is collected, nor when (`demotion`). Threading: one thread.
"""

from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmem.backends.tiers.contract import Tier, Writing

if TYPE_CHECKING:
    from tmem.backends import _native

_LEAST_ROOM_BYTES = 8192
"""What `collect` wants to be left, so that a record fits for certain."""


@dataclass(slots=True)
class _Batch:
    """Pages that were collected, and have not landed."""

    writing: Writing
    pages: bytes
    """As `Client.collect` returned them and `Client.demote` wants them."""
    size_bytes: int
    """Of the records."""


class Batches:
    """The batches of `client` that are under way to its tier of `epoch`: `at_once` at most."""

    def __init__(self, client: "_native.Client", epoch: int, batch_bytes: int, at_once: int) -> None:
        self._client = client
        self._epoch = epoch
        self._at_once = at_once
        self._buffer = bytearray(batch_bytes + _LEAST_ROOM_BYTES)
        self._under_way: deque[_Batch] = deque()
        self.demoted_pages = 0
        """That have left memory, since this was made."""
        self.acknowledged = 0
        """Batches that have landed."""

    @property
    def under_way_bytes(self) -> int:
        """Bytes of records that will leave memory once they have landed, if their pages stay as they are."""
        return sum(batch.size_bytes for batch in self._under_way)

    def start(self, tier: Tier, hand: int, most: int, any_page: bool) -> tuple[int, int]:
        """Collect pages from the hand on and begin to store them: where the hand is then, and how many.

        Lands the oldest batch before that if as many are under way as may be. Raises as `Tier.begin` and
        `Writing.end`; the hand has not moved then.
        """
        while len(self._under_way) >= self._at_once:
            self.land()
        hand, places, pages = self._client.collect(hand, self._buffer, most, any_page, self._epoch)
        if not places:
            return hand, 0
        view = memoryview(self._buffer)
        writing = tier.begin([view[at : at + length] for at, length in places])
        self._under_way.append(_Batch(writing, pages, sum(length for _at, length in places)))
        if self._at_once == 1:
            self.land()
        return hand, len(places)

    def land(self) -> None:
        """Wait until the tier has the oldest batch, and let go of its memory; nothing if none is under way.

        Raises as `Writing.end`; then no batch is under way any more.
        """
        if not self._under_way:
            return
        batch = self._under_way.popleft()
        try:
            locations = batch.writing.end()
            self.acknowledged += 1
            self.demoted_pages += self._client.demote(batch.pages, array("Q", locations))
        except BaseException:
            self.drop()
            raise

    def land_all(self) -> None:
        """`land` as long as batches are under way."""
        while self._under_way:
            self.land()

    def drop(self) -> None:
        """Give up what is under way: its pages stay in memory."""
        while self._under_way:
            self._under_way.popleft().writing.drop()

    def tidy(self, tier: Tier, grace_ms: int) -> bool:
        """Tell the tier what lives, once all has landed; False while somebody may still read something else.

        Raises as `land` and `Tier.retain`.
        """
        self.land_all()
        live = self._client.live(grace_ms)
        if live is None:
            return False
        tier.retain(memoryview(live).cast("Q"))
        return True
