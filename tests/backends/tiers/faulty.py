"""A tier that fails as it is told, around any other one."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmem.backends.tiers.contract import Tier, TierStatistics, Writing
from tmem.errors import TierDownError, TierFullError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass
class Faults:
    """What goes wrong from now on; counts go down with each time."""

    down: int = 0
    """So many calls of write, read, check and retain raise `TierDownError`, before anything is done."""
    full: int = 0
    """So many writes raise `TierFullError`."""
    lost_acknowledgements: int = 0
    """So many writes are done, and raise `TierDownError` nevertheless."""
    missing: int = 0
    """So many records that are read are None."""
    cut: int = 0
    """So many records that are read end after their first half."""
    flipped: int = 0
    """So many records that are read have one bit flipped, somewhere in what was written."""
    swapped: int = 0
    """So many reads of several records return them in another order."""


class FaultyWriting:
    """The second half of a write."""

    def __init__(self, inner: Writing, tier: "FaultyTier") -> None:
        self._inner = inner
        self._tier = tier

    def end(self) -> list[int]:
        locations = self._inner.end()
        if self._tier.faults.lost_acknowledgements:
            self._tier.faults.lost_acknowledgements -= 1
            raise TierDownError("stored, but the answer got lost")
        return locations

    def drop(self) -> None:
        self._inner.drop()


class FaultyTier:
    """Hands on to `inner`, with faults."""

    def __init__(self, inner: Tier, faults: Faults) -> None:
        self._inner = inner
        self.faults = faults

    def _may_be_down(self) -> None:
        if self.faults.down:
            self.faults.down -= 1
            raise TierDownError(f"no answer ({errno.errorcode[errno.ETIMEDOUT]})")

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        return self.begin(records).end()

    def begin(self, records: Sequence["Buffer"]) -> Writing:
        self._may_be_down()
        if self.faults.full:
            self.faults.full -= 1
            raise TierFullError("no room")
        return FaultyWriting(self._inner.begin(records), self)

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        self._may_be_down()
        found = self._inner.read(locations)
        for i, one in enumerate(found):
            if one is None:
                continue
            if self.faults.missing:
                self.faults.missing -= 1
                found[i] = None
            elif self.faults.cut:
                self.faults.cut -= 1
                found[i] = one[: len(one) // 2]
            elif self.faults.flipped:
                self.faults.flipped -= 1
                at = self.faults.flipped * 31 % min(len(one), 17)
                found[i] = one[:at] + bytes([one[at] ^ 4]) + one[at + 1 :]
        if self.faults.swapped and len(found) > 1:
            self.faults.swapped -= 1
            found.reverse()
        return found

    def retain(self, live: Sequence[int]) -> None:
        self._may_be_down()
        self._inner.retain(live)

    def check(self) -> None:
        self._may_be_down()

    def statistics(self) -> TierStatistics:
        return self._inner.statistics()

    def destroy(self) -> None:
        self._inner.destroy()

    def close(self) -> None:
        self._inner.close()
