"""A tier whose batches are on their way for as long as the test likes, as with servers.

What a batch brings is stored at some time between `begin` and its end, or long after it was given up, or
never. What is forgotten is overwritten, as in `tiers.memory`. A `retain` while a batch is on its way is the
caller's mistake, and found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tmem.backends.tiers.contract import MAX_BEGUN, TierStatistics
from tmem.errors import TierDownError, TierError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass
class Servers:
    """What all who opened the tier have stored, and what goes wrong."""

    records: dict[int, bytes] = field(default_factory=dict)
    numbered: int = 0
    """Locations that were given out."""
    forgotten: set[int] = field(default_factory=set)
    """Of those that have come, the ones that the last `retain` did not name."""
    refuse: list[TierError] = field(default_factory=list)
    """What the next `begin`s raise."""
    fail: list[TierError] = field(default_factory=list)
    """What the next `end`s raise, though the servers may have it all."""
    late: "list[OverlappingWriting]" = field(default_factory=list)
    """Batches that nobody waits for any more, of which the servers may yet carry out all."""


class OverlappingWriting:
    """A batch on its way."""

    def __init__(self, tier: "OverlappingTier", records: Sequence["Buffer"]) -> None:
        self._tier = tier
        self._records = [bytes(one) for one in records]
        self.locations = [tier.servers.numbered + n + 1 for n in range(len(records))]
        tier.servers.numbered += len(records)
        self._arrived = False

    def arrive(self) -> None:
        """Have the servers store it, unless they have."""
        if not self._arrived:
            self._arrived = True
            self._tier.servers.records.update(zip(self.locations, self._records, strict=True))

    def end(self) -> list[int]:
        self._tier.begun.remove(self)
        if self._tier.servers.fail:
            self._tier.servers.late.append(self)
            raise self._tier.servers.fail.pop(0)
        self.arrive()
        return self.locations

    def drop(self) -> None:
        self._tier.begun.remove(self)
        self._tier.servers.late.append(self)


class OverlappingTier:
    """One opening of it, by a writer or a reader."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.begun: list[OverlappingWriting] = []
        self._told = False

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        return self.begin(records).end()

    def begin(self, records: Sequence["Buffer"]) -> OverlappingWriting:
        assert self._told, "retain comes before the first write"
        assert len(self.begun) < MAX_BEGUN
        if self.servers.refuse:
            raise self.servers.refuse.pop(0)
        self.begun.append(OverlappingWriting(self, records))
        return self.begun[-1]

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        return [self.servers.records.get(at) for at in locations]

    def retain(self, live: Sequence[int]) -> None:
        assert not self.begun, "a batch is on its way, which nobody names yet"
        if self.servers.refuse:
            raise self.servers.refuse.pop(0)
        self.servers.forgotten = self.servers.records.keys() - set(live)
        for location in self.servers.forgotten:
            self.servers.records[location] = self.servers.records[location][::-1]
        self._told = True

    def check(self) -> None:
        pass

    def statistics(self) -> TierStatistics:
        return TierStatistics()

    def destroy(self) -> None:
        self.servers.records.clear()

    def close(self) -> None:
        pass


def no_answer() -> TierDownError:
    return TierDownError("no answer")
