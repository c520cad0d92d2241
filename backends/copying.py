"""Copies a client while it goes on working: rounds of what is new, then a short freeze for the rest.

Theory. The first round exports every page of the client's persistent pools, each following one only what has
changed since, so rounds get shorter as long as copying is faster than the client. When they are short, or get
no shorter, the client is frozen: puts are refused (its devices wait), the last round makes the copy exact.

    handoff("copy")   round, round, ...      the client works
    handoff("freeze") last round             milliseconds; a save writes nothing in them, if its memory
                                             suffices: the disk may be waiting for the frozen client
    handoff("end")    the client goes on     or "depart": `handoff` has that

Ephemeral pools have no pages to copy. Not for what is done with the frames: `save`, `handoff`. Threading: one
thread from `ClientCopy` on; should it end, the core thaws the client.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from tmem.backends.savefile import BLOCK_BYTES, HEAD_BYTES, Kind, aligned
from tmem.backends.saverecords import ClientRecord
from tmem.backends.streams import FrameOutput, new_block
from tmem.errors import PoolError

if TYPE_CHECKING:
    from tmem.backends import _native

SHORT_BYTES = 4 << 20
"""A round is short if it has no more than this."""
ROUNDS = 20
"""After so many rounds the client is frozen, however long they are."""
_SMALLEST_BYTES = 64 << 10  # of the rest of a block that is worth a frame of its own


class PoolsChangedError(Exception):
    """The client has made or destroyed a persistent pool while it was copied: begin again."""


class Blocks(Protocol):
    """Where a round goes: blocks to fill, with room for a frame's head in front."""

    def block(self) -> memoryview:
        """Return a block to fill."""
        ...

    def data(self, client: int, pool: int, block: memoryview, length: int) -> None:
        """Take the block that was filled; nothing is to be done with one of `length` 0."""
        ...


class Spool:
    """Blocks in memory, ready before they are needed; they go to `out` later, or when all are filled."""

    def __init__(self, out: FrameOutput, size_bytes: int) -> None:
        self._out = out
        self._blocks = [new_block() for _ in range(-(-size_bytes // BLOCK_BYTES))]
        self._free = list(self._blocks)
        self._filled: list[tuple[int, int, memoryview, int]] = []
        self.overflowed = False
        """It was full, so everything goes to `out` now."""

    def block(self) -> memoryview:
        """Return a block to fill: of memory, or of `out` once that is full."""
        if not self._free and not self.overflowed:
            self._write()  # in order: later records of a page replace earlier ones
            self.overflowed = True
        return self._out.block() if self.overflowed else self._free[-1]

    def data(self, client: int, pool: int, block: memoryview, length: int) -> None:
        """Take a block that was filled; what it has left is filled next."""
        if self.overflowed:
            self._out.data(client, pool, block, length)
        elif length:
            self._filled.append((client, pool, block, length))
            rest = self._free.pop()[aligned(HEAD_BYTES + length) :]
            if len(rest) >= _SMALLEST_BYTES:
                self._free.append(rest)

    def empty(self) -> None:
        """Write everything to `out`, and begin anew."""
        self._write()
        self._out.drain()
        self._free = list(self._blocks)
        self.overflowed = False

    def _write(self) -> None:
        for client, pool, block, length in self._filled:
            self._out.data(client, pool, block, length, ours=False)
        self._filled.clear()


class ClientCopy:
    """The copy of one client, number `number` in the stream `out`; as a context it thaws the client at last.

    Raises `PoolError` if the client is gone or somebody else copies it, `PoolsChangedError`, and
    `CorruptPageError` for a page that is no more what was put.
    """

    def __init__(
        self, client: "_native.Client", number: int, out: FrameOutput, watch: Callable[[], None]
    ) -> None:
        self._client = client
        self._number = number
        self._out = out
        self._watch = watch
        self._pools: list[_native.Pool] = []
        self._frozen_at = 0.0
        self.begun = False
        """The stream says that the client follows."""
        self.frozen_s = 0.0
        """How long the client was frozen."""
        self.rounds = 0
        """Rounds copied."""
        self.pages = 0
        """Pages of the client when it was frozen."""
        self.left = False
        """The client is not to be thawed at the end: it has departed."""

    def __enter__(self) -> Self:
        if self._client.phase == "departed":
            name = self._client.name
            raise PoolError(
                f"client {name!r} departed in a handoff that was not completed: if it lives elsewhere now, "
                f"end it here with 'tmem destroy {name} --force', else let it go on with "
                f"'tmem thaw {name} --force'"
            )
        self._client.handoff("copy")
        try:
            self._pools = [pool for pool in self._client.pools() if pool.persistent]
            self._record = self._look()
            self._out.document(Kind.CLIENT, self._number, self._record.document())
            self.begun = True
        except BaseException:
            self._thaw()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.left:
            self._thaw()

    def copy(self, settle: Callable[[], None], shrinking: float) -> int:
        """Copy in rounds until they are short; the bytes of the last one. `settle` is called after each.

        A round that has more than `shrinking` of the one before is the last one as well: the client is too
        fast.
        """
        previous = 0
        for number in range(ROUNDS):
            size = self.round(self._out)
            settle()
            if number and (size <= SHORT_BYTES or size > shrinking * previous):
                break
            previous = size
        return size

    def round(self, blocks: Blocks) -> int:
        """Copy into `blocks` what no round has copied yet; the bytes of records."""
        size = 0
        try:
            for pool in self._pools:
                exporter = pool.export(changes=True)
                while True:
                    block, length = blocks.block(), 0
                    try:
                        length = exporter.fill(block[HEAD_BYTES:])
                    finally:  # or who comes next waits for the block
                        blocks.data(self._number, pool.id, block, length)
                    if not length:
                        break
                    size += length
                    if not self._frozen_at:  # whoever shows progress may have to wait for a terminal
                        self._watch()
        except PoolError:
            self._client.pools()  # PoolError: the client itself is gone
            if all(pool.alive for pool in self._pools):
                raise
            raise PoolsChangedError from None
        self.rounds += 1
        return size

    def freeze(self, blocks: Blocks) -> None:
        """Freeze the client and copy the rest into `blocks`: then the copy is exact."""
        self._frozen_at = time.monotonic()
        self._client.handoff("freeze")
        self._record, before = self._look(), self._record
        if _persistent(before) != _persistent(self._record) or not all(pool.alive for pool in self._pools):
            raise PoolsChangedError
        self.round(blocks)
        self.pages = sum(pool.statistics()["pages"] for pool in self._pools)

    def end(self) -> None:
        """Write the end of the client."""
        self._out.document(Kind.CLIENT_END, self._number, self._record.document())

    def settled(self) -> None:
        """Note that nobody waits for the client any more."""
        if self._frozen_at:
            self.frozen_s = time.monotonic() - self._frozen_at

    def _look(self) -> ClientRecord:
        try:
            return ClientRecord.of(self._client)
        except PoolError:
            self._client.pools()  # PoolError: the client itself is gone
            raise PoolsChangedError from None

    def _thaw(self) -> None:
        with suppress(PoolError):  # it is gone
            self._client.handoff("end")
        self.settled()


def _persistent(record: ClientRecord) -> list[tuple[int, bool]]:
    return [(pool.id, pool.exclusive) for pool in record.pools if pool.persistent]
