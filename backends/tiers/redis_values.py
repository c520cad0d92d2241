"""How records are packed into the values of a Redis server, and how both are numbered.

A value holds up to 64 records that were stored together: one byte that says how many lengths follow, the
lengths (16 bits each, 0: no record), then the records. A *location* is the number of its value (30 bits) and
the place in it (6 bits), so a value can be written again without the records that have died while the
others keep their locations.

Why packed: a server keeps a page of its own in 1.15 times its bytes and takes 52,000 of them a second; packed
it takes 217,000 in 1.08, or 1.01 where the value fits its allocator's size class (redis 7.0, one thread,
random records of 1,850 bytes on average). A hash with a field for each record gives 1.13 and 136,000. The
price is that a single record costs the transfer of 32 KiB: 80 us on loopback where the smallest answer costs
54. With 64 KiB a value moves a quarter faster still and a single record costs 97 us.

The values are not compressed: records come compressed. Plain functions; any thread.
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tmem.backends import _native
from tmem.backends.tiers.contract import MAX_LOCATION, TierIdentity

if TYPE_CHECKING:
    from typing_extensions import Buffer

PLACE_BITS = 6
MAX_RECORDS = 1 << PLACE_BITS
MAX_NUMBER = MAX_LOCATION >> PLACE_BITS
"""Values are numbered from 1 on; numbers begin anew after the last."""

VALUE_BYTES = 32_700
"""How long a value may be: with the server's own header this just fits the allocator's class of 32 KiB."""

KEY_OVERHEAD_BYTES = 150
"""What a key costs besides its value: its name, entries of the server's tables (measured, redis 7.0)."""

_COMMAND_BYTES, _END_BYTES = 128, 2
"""What a command takes up around its value at most: 80 bytes with the longest key."""

_GROUP_BITS = 4
"""So many values that follow each other have one hash slot, so that small batches concern one node."""


class Packed:
    """The values that hold the records of a batch, in order, as many in each as go into it.

    They lie in `room`, which is written to again once nobody needs what it held, if one is given and large
    enough, else in a new one; with space for the commands that store them around each: so a command is sent
    in one piece, from where it lies.
    """

    def __init__(self, records: Sequence["Buffer"], room: bytearray | None = None) -> None:
        self.room, self._starts, self._ends = _native.pack(
            list(records), VALUE_BYTES, MAX_RECORDS, room, _COMMAND_BYTES, _END_BYTES
        )
        self.sizes = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        self.counts = [self.room[start] for start in self._starts]
        """How many records each holds."""

    def sets(self, start: str, numbers: list[int]) -> list[memoryview]:
        """Return the commands that store the values under these numbers, as they are sent."""
        firsts = _native.resp_sets(self.room, self._starts, self._ends, start, numbers, _GROUP_BITS)
        whole = memoryview(self.room)
        return [whole[first : end + _END_BYTES] for first, end in zip(firsts, self._ends, strict=True)]


def unlinks(start: str, numbers: Sequence[int]) -> list[bytes]:
    """Return the commands that remove the values of these numbers, as they are sent."""
    return _native.resp_unlinks(start, list(numbers), _GROUP_BITS)


def neighbours(numbers: Sequence[int]) -> list[slice]:
    """Return the runs of numbers that follow each other whose values share a hash slot."""
    tags = [number >> _GROUP_BITS for number in numbers]
    cuts = [at for at in range(1, len(tags)) if tags[at] != tags[at - 1]]
    return [slice(*run) for run in pairwise((0, *cuts, len(tags)))] if tags else []


def pack(records: Sequence["bytes | memoryview"]) -> bytes:
    """Return the value that holds `records`, in which an empty one stands for none, in one piece."""
    return struct.pack(f"<B{len(records)}H", len(records), *map(len, records)) + b"".join(records)


unpack = _native.unpack
"""Returns the records of a value, of which there are 17 in most: in Python that takes twice as long."""

HEADER_BYTES = 1 + 2 * MAX_RECORDS
"""How much of a value `lengths` needs at most."""


def lengths(header: bytes) -> tuple[int, ...]:
    """Return the lengths of the records of the value that begins with `header`; () of a damaged one."""
    if not header or len(header) < 1 + 2 * header[0]:
        return ()
    return struct.unpack_from(f"<{header[0]}H", header, 1)


def prefix(identity: TierIdentity) -> str:
    """Return what the keys of `identity` begin with; it is plain text in a pattern."""
    return f"tmem:{{{identity.nonce:016x}.{identity.client:x}.{identity.serial:x}."


def key(start: str, number: int) -> bytes:
    """Return the key of the value `number`; `start` is its `prefix`."""
    return f"{start}{number >> _GROUP_BITS:x}}}{number:x}".encode()


def counter_key(start: str) -> bytes:
    """Return the key that counts the values of a `prefix`."""
    return f"{start}n}}".encode()


def number_of(start: str, name: bytes) -> int | None:
    """Return the number of the value whose key is `name`, None if it is none."""
    head, _, tail = name.partition(b"}")
    if not head.startswith(start.encode()) or not tail:
        return None
    try:
        number = int(tail, 16)
    except ValueError:
        return None
    return number if key(start, number) == name else None
