"""A tier in this process's memory: the simplest thing that keeps the contract, and the oracle's stand-in.

What is forgotten is overwritten with other bytes rather than removed, as on a disk that is used again, so
that a reader who believes a location that nobody names any more is found out.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tmem.backends.tiers.contract import Tier, TierIdentity, TierStatistics, Written
from tmem.errors import TierFullError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Shelf:
    """What one identity has stored."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}
        self.stale: dict[int, bytes] = {}
        self.lock = threading.Lock()


class MemoryTier:
    """One opening of a shelf."""

    def __init__(self, shelf: Shelf, capacity: int) -> None:
        self._shelf = shelf
        self._capacity = capacity
        self._written = self._written_bytes = self._read = self._read_bytes = 0
        self._refused = self._missing = 0

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        with self._shelf.lock:
            kept = self._shelf.records
            if len(kept) + len(records) > self._capacity:
                self._refused += 1
                raise TierFullError("the shelf is full")
            locations: list[int] = []
            location = 0
            for one in map(bytes, records):
                location += 1
                while location in kept:
                    location += 1
                kept[location] = one
                locations.append(location)
                self._written_bytes += len(one)
            self._written += len(locations)
            return locations

    def begin(self, records: Sequence["Buffer"]) -> Written:
        return Written(self.write(records))

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        with self._shelf.lock:
            found = [self._shelf.records.get(at, self._shelf.stale.get(at)) for at in locations]
        self._read += len(found)
        self._read_bytes += sum(len(one) for one in found if one is not None)
        self._missing += found.count(None)
        return found

    def retain(self, live: Sequence[int]) -> None:
        with self._shelf.lock:
            for location in self._shelf.records.keys() - set(live):
                self._shelf.stale[location] = self._shelf.records.pop(location)[::-1]

    def check(self) -> None:
        pass

    def statistics(self) -> TierStatistics:
        with self._shelf.lock:
            return TierStatistics(
                records=len(self._shelf.records),
                used_bytes=sum(map(len, self._shelf.records.values())),
                written_records=self._written,
                written_bytes=self._written_bytes,
                read_records=self._read,
                read_bytes=self._read_bytes,
                refused=self._refused,
                missing=self._missing,
            )

    def destroy(self) -> None:
        with self._shelf.lock:
            self._shelf.records.clear()
            self._shelf.stale.clear()
        self.close()

    def close(self) -> None:
        pass


class MemoryWorld:
    """Shelves of one process."""

    def __init__(self, capacity_records: int = 512) -> None:
        self.capacity_records = capacity_records
        self._shelves: dict[TierIdentity, Shelf] = {}

    def open(self, identity: TierIdentity, writer: bool) -> Tier:
        return MemoryTier(self._shelves.setdefault(identity, Shelf()), self.capacity_records)
