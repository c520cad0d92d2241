"""What a tier beyond RAM is: a place for batches of opaque records, each found again by a number.

A persistent page that was demoted lives in its client's tier. The page's slot in the segment keeps the
record's *location*, a number of 36 bits that means something to the tier alone, and **stays the only truth**:
a record lives as long as some slot names its location, and a tier keeps no list of its own that could
disagree. So a tier needs no recovery: the segment ends with a reboot, and what was spilled with it.

How the store uses a tier (docs/concurrency.md has the whole protocol):

- **Demotion**, in the manager, never inside a put: pages are collected as they are stored (16 bytes of
  header and up to 4096 of payload), `write` stores them and returns when they are as safe as the tier
  promises, and only then do slots name the locations and blocks in RAM go. A page that changed meanwhile
  leaves its record unnamed: garbage that the next `retain` tells.
- **A get** of such a page reads the record in the process that serves it, outside of every operation and
  lock of the segment, and looks at the slot again before it believes the bytes. Records carry a checksum
  over the segment, the slot and its generation, so a wrong, torn, stale or foreign record is found by the
  reader: a tier need not check, but must not hide that something is missing.
- `retain` is told every location that is named. The caller has already waited for readers of others, so what
  is not in there may be used again at once.

What an implementation must be:

- **One writer, many readers.** `write`, `begin` and what it returned, `retain`, `check` and `destroy` are
  called by one thread at a time of the one process that opened the tier with `writer=True`; `read` by any
  thread of any process that opened it, at the same time as everything else.
- **Atomic and durable batches.** Either `write` returns, and from then on every reader finds every record at
  its location until a `retain` without it, or it raises, and nothing of the batch is named by anybody.
- **Batches that overlap.** `begin` and `Writing.end` are the two halves of `write`, so that the next batch is
  made while servers work on this one. Batches know nothing of each other: one may fail, or be given up, and
  the other be acknowledged. **Nobody names what was not acknowledged, so `retain` would forget it**: from
  when the caller looks which locations live until `retain` has returned, no batch may be on its way, not
  even one that was acknowledged and is not named yet. A tier may refuse a `retain` between the two halves.
- **Deaf to the dead.** A writer may be killed at any instant, and another one opens the tier. What the dead
  one still had in flight must never change a record that was acknowledged, or one that is written from now
  on. After it was opened a writer calls `retain` before its first `write`.
- **Never another's.** A tier is opened for one `TierIdentity`; what belongs to another (another segment,
  the client of that number before) is refused with `TierCorruptError` or not seen, never returned.
- **Bounded.** `read`, `write` and `check` raise `TierDownError` after a time of their own, and do not hang.

Synchronous and without any I/O framework; the contract's tests are `tests/backends/tiers/contract.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_LOCATION = 2**36 - 1
"""The largest location; the smallest is 1, 0 names nothing."""

MIN_RECORD_BYTES, MAX_RECORD_BYTES = 17, 16 + 4096
"""How long records are: a header of 16 bytes and a payload."""

MAX_BATCH_RECORDS = 4096
"""How many records one `write` brings at most; one `read` asks for at most as many."""

MAX_BEGUN = 2
"""How many batches are on their way at a time at most."""


@dataclass(frozen=True)
class TierIdentity:
    """Whose pages a tier holds. All three together are never used again in this world."""

    nonce: int
    """64 random bits that tell one life of a segment from another."""
    client: int
    """The client's number in the segment, below 64."""
    serial: int
    """Which client of that number, 32 bits."""


@dataclass(frozen=True)
class TierStatistics:
    """What a tier holds and did, as far as this opening of it knows."""

    records: int = 0
    """Records that are kept: those of the last `retain`, and those written since."""
    used_bytes: int = 0
    """Room that they take up there, with everything that is lost around them."""
    capacity_bytes: int | None = None
    """Room that there is in all; None if the tier does not know."""
    free_bytes: int | None = None
    """What is left of that; of servers others take some, too."""
    written_records: int = 0
    written_bytes: int = 0
    read_records: int = 0
    read_bytes: int = 0
    failures: int = 0
    """Calls that ended in `TierDownError`."""
    refused: int = 0
    """Batches that ended in `TierFullError`."""
    missing: int = 0
    """Records that were asked for and are not there."""


class Writing(Protocol):
    """A batch that was begun. Either `end` or `drop` comes, once."""

    def end(self) -> list[int]:
        """Wait until it is stored; returns and raises what `Tier.write` does."""
        ...

    def drop(self) -> None:
        """Give it up, at once; never raises. Its records take up room until the next `retain`."""
        ...


class Written:
    """A batch of a tier that stores it as it is begun."""

    def __init__(self, locations: list[int]) -> None:
        self._locations = locations

    def end(self) -> list[int]:
        """Return where the records are."""
        return self._locations

    def drop(self) -> None:
        """Do nothing: nobody names them."""


class Tier(Protocol):
    """One client's place for demoted pages, opened by one process."""

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        """Store the records, at most `MAX_BATCH_RECORDS`, and return the location of each, in order.

        Locations are in 1..`MAX_LOCATION`, all different, and none of them was kept by the last `retain` or
        written since. Takes any contiguous buffers and keeps no reference. Neighbours in a batch are likely
        to be read together. Raises `TierFullError` or `TierDownError`, and then nothing is stored.
        """
        ...

    def begin(self, records: Sequence["Buffer"]) -> Writing:
        """Begin to `write` the records, and keep no reference to them either.

        Raises as `write`, for this batch alone. At most `MAX_BEGUN` are on their way at a time.
        """
        ...

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        """Return what is at each location, in order: bytes that begin with the record.

        More may follow (the record knows its length). A record that is not there, or that the tier itself
        finds damaged or cut short, is None; a location that nobody wrote may be None or anything, as what
        was once there. Raises `TierDownError` if the tier cannot tell, for all of them.
        """
        ...

    def retain(self, live: Sequence[int]) -> None:
        """Keep these locations, in ascending order, and forget all others: their room may be used again.

        `live` may name locations that were never written here (a slot read while it changed): they cost
        room at most until the next call. Raises `TierDownError`; then nothing in `live` was forgotten.
        """
        ...

    def check(self) -> None:
        """Ask whether it is there and may be trusted with pages: little work, as often as every few seconds.

        Raises `TierDownError`, with what to do.
        """
        ...

    def statistics(self) -> TierStatistics:
        """Return what is known without asking anybody: never blocks, never raises."""
        ...

    def destroy(self) -> None:
        """Remove everything that is stored for this identity, and close. For the end of the client."""
        ...

    def close(self) -> None:
        """Let go of files and connections; records stay. Once closed nothing but `close` may be called."""
        ...
