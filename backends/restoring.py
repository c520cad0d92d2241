"""Makes clients of the frames of a save file or a handoff, unseen by others until all are complete.

Clients are staged (`Segment.stage`), filled as frames come, and shown by one commit; whatever goes wrong,
they are destroyed, by the core if this process dies. Not for reading the frames: `streams`. Threading: the
thread that calls `apply` is the one that commits.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

from tmem.backends.clients import clients_by_name, more_to_promise
from tmem.backends.savefile import Frame, Kind
from tmem.backends.saverecords import ClientRecord, Header, PoolRecord, Summary, Totals
from tmem.backends.streams import FrameInput
from tmem.errors import PoolError, SaveFileError, TmemError
from tmem.types import PAGE_SIZE, format_size, size_within

if TYPE_CHECKING:
    from tmem.backends import _native

_AHEAD_BYTES = 64 << 20


@dataclass
class _Staged:
    """A client that is being filled."""

    client: "_native.Client"
    record: ClientRecord
    pools: "dict[int, _native.Pool]" = field(default_factory=dict)
    complete: bool = False


class _Backing:
    """Has memory backed ahead of the pages, by a thread: that takes the system longer than putting them."""

    def __init__(self, store: "_native.Segment", expected_bytes: int) -> None:
        self._store = store
        self._left_bytes = expected_bytes
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="tmem-backing", daemon=True)
        self._thread.start()

    def used(self, size_bytes: int) -> None:
        """Note that so much of what was expected has come."""
        self._left_bytes -= size_bytes
        self._wake.set()

    def end(self) -> None:
        """End the thread."""
        self._ended = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(TmemError):  # then the puts do it
            while (size := min(_AHEAD_BYTES, self._left_bytes)) > 0 and not self._ended:
                if not self._store.populate(size):
                    self._wake.wait()
                    self._wake.clear()


class Restorer:
    """Fills the segment `store` with clients; as a context it drops what was not committed.

    `name` is what messages call the stream, `chosen` the clients that are wanted (None: all), `called`
    another name for the only one. Everything raises `SaveFileError`, and what reading the stream raises.
    """

    def __init__(
        self,
        store: "_native.Segment",
        segment: str,
        name: str,
        chosen: frozenset[str] | None = None,
        called: str | None = None,
    ) -> None:
        self._store = store
        self._segment = segment
        self._name = name
        self._chosen = chosen
        self._called = called
        self._purpose = ""
        self._staged: dict[int, _Staged] = {}
        self._skipped: set[int] = set()
        self._expected_bytes = 0
        self._backing: _Backing | None = None
        self.records = 0
        """Records put or flushed."""
        self.committed: list[str] = []
        """Names of the clients that are there now."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._backing is not None:
            self._backing.end()
        for staged in self._staged.values():
            with suppress(PoolError):
                staged.client.destroy()
        self._staged.clear()

    def begin(self, frames: Iterator[Frame], purpose: str) -> Header:
        """Take the header, which must be for `purpose`, and refuse at once what cannot come to a good end."""
        self._purpose = purpose
        frame = next(frames)
        if frame.kind is not Kind.HEADER:
            raise self._malformed(f"a {frame.kind.name} where its header belongs")
        try:
            header = Header.parse(frame.document())
        except ValueError as error:
            raise self._malformed(str(error)) from None
        self._check_machine(header, purpose)
        names = {summary.name for summary in header.clients}
        if self._chosen is not None and (missing := self._chosen - names):
            raise SaveFileError(
                f"{self._name} has no client {_listed(missing)}: it has {_listed(names) or 'none'}"
            )
        wanted = [summary for summary in header.clients if self._wanted(summary.name)]
        if self._called is not None and len(wanted) != 1:
            raise SaveFileError(f"{self._name} has {_listed(names)}: choose the one to rename with --client")
        if taken := clients_by_name(self._store).keys() & {self._name_of(summary.name) for summary in wanted}:
            raise self._taken(taken)
        self._check_room(wanted)
        self._backing = _Backing(self._store, self._expected_bytes)
        return header

    def apply(self, frame: Frame) -> None:
        """Take one frame of a client."""
        action = self._ACTIONS.get(frame.kind)
        if action is None:
            raise self._malformed(f"a {frame.kind.name} where a client's frame belongs")
        if frame.kind is not Kind.CLIENT and frame.client in self._skipped:
            return
        try:
            action(self, frame)
        except ValueError as error:
            raise self._malformed(str(error)) from None

    def check_complete(self) -> None:
        """Raise `SaveFileError` if a client has begun but not ended, or was asked for and did not begin."""
        if any(not staged.complete for staged in self._staged.values()):
            raise self._malformed("a client without its end")
        there = {staged.record.name for staged in self._staged.values()}
        if self._chosen is not None and (missing := self._chosen - there):
            raise SaveFileError(
                f"{self._name} has no client {_listed(missing)}, which ended while it was saved: choose "
                f"{_listed(there) or 'another file'}"
            )

    def commit(self) -> None:
        """Show all clients. `SaveFileError`, and none is shown, if one is not complete or a name is taken."""
        self.check_complete()
        names = [staged.client.name for staged in self._staged.values()]
        try:
            self._store.commit()
        except PoolError as error:
            raise SaveFileError(f"{self._name} cannot be used: {error}") from None
        self.committed = names
        self._staged.clear()

    def check_totals(self, frame: Frame, read: FrameInput) -> None:
        """Compare the end of a save file with what was read."""
        try:
            totals = Totals.parse(frame.document())
        except ValueError as error:
            raise self._malformed(str(error)) from None
        if (totals.frames, totals.data_bytes) != (read.frames - 1, read.data_bytes):
            raise self._malformed(f"totals that do not fit: {totals}")

    # -- frames

    def _begin(self, frame: Frame) -> None:
        record = ClientRecord.parse(frame.document())
        if frame.client in self._staged or frame.client in self._skipped:
            raise ValueError(f"client {frame.client} a second time")
        if not self._wanted(record.name):
            self._skipped.add(frame.client)
            return
        name = self._name_of(record.name)
        try:
            client = self._store.stage(name)
        except PoolError as error:
            if name in clients_by_name(self._store):
                raise self._taken({name}) from None
            raise SaveFileError(f"client {name!r} cannot be made: {error}") from None
        staged = self._staged[frame.client] = _Staged(client, record)
        client.compress = record.compress
        client.weight = record.weight
        self._promise(staged, record)
        for pool in record.pools:
            if pool.persistent:
                staged.pools[pool.id] = self._new_pool(client, pool)

    def _data(self, frame: Frame) -> None:
        staged = self._of(frame)
        if frame.pool not in staged.pools:
            raise ValueError(f"pages for a pool {frame.pool} that the client has not")
        try:
            self.records += staged.pools[frame.pool].import_records(frame.payload)
        except PoolError as error:
            raise self._no_room(str(error)) from None
        if self._backing is not None:
            self._backing.used(len(frame.payload))

    def _end(self, frame: Frame) -> None:
        """Apply the settings as they were in the end: a cap or a mode might have refused the pages."""
        staged = self._of(frame)
        record = ClientRecord.parse(frame.document())
        if record.name != staged.record.name:
            raise ValueError(f"the end of client {record.name!r} for {staged.record.name!r}")
        if {pool.id for pool in record.pools if pool.persistent} != set(staged.pools):
            raise ValueError("a client ends with other pools than it began with")
        client = staged.client
        for uuid in record.authorised:
            client.authorise(UUID(hex=uuid).bytes)
        for pool in record.pools:
            if not pool.persistent:
                self._new_pool(client, pool)
        client.compress = record.compress
        client.weight = record.weight
        self._promise(staged, record)
        client.cap_bytes = record.cap_bytes
        client.dedup = record.dedup
        client.mode = record.mode
        staged.complete = True

    def _drop(self, frame: Frame) -> None:
        """Forget a client; also one that never began: there are files that say so of one that had ended."""
        if (staged := self._staged.pop(frame.client, None)) is not None:
            staged.client.destroy()
        self._skipped.add(frame.client)

    _ACTIONS: Mapping[Kind, Callable[["Restorer", Frame], None]] = {
        Kind.CLIENT: _begin,
        Kind.DATA: _data,
        Kind.CLIENT_END: _end,
        Kind.CLIENT_DROPPED: _drop,
    }

    # -- help

    def _of(self, frame: Frame) -> _Staged:
        staged = self._staged.get(frame.client)
        if staged is None:
            raise ValueError(f"a {frame.kind.name} of a client {frame.client} that has not begun")
        return staged

    def _promise(self, staged: _Staged, record: ClientRecord) -> None:
        if staged.client.floor_bytes == record.floor_bytes:
            return
        try:
            staged.client.floor_bytes = record.floor_bytes
        except PoolError:
            raise SaveFileError(
                f"client {record.name!r} was promised {format_size(record.floor_bytes)}, and segment "
                f"{self._segment!r} can promise {size_within(staged.client.most_floor_bytes)} now: lower the "
                f"floor before this ('tmem set'), {more_to_promise(self._store, staged.client)}"
            ) from None

    def _new_pool(self, client: "_native.Client", record: PoolRecord) -> "_native.Pool":
        uuid = None if record.uuid is None else UUID(hex=record.uuid).bytes
        try:
            if uuid is not None:
                return client.new_pool(False, uuid=uuid, id=record.id)
            return client.new_pool(record.persistent, record.exclusive, id=record.id)
        except PoolError as error:
            raise SaveFileError(
                f"pool {record.id} of client {client.name!r} cannot be made: {error}"
            ) from None

    def _wanted(self, name: str) -> bool:
        return self._chosen is None or name in self._chosen

    def _name_of(self, name: str) -> str:
        return self._called or name

    def _check_machine(self, header: Header, purpose: str) -> None:
        if header.purpose != purpose:
            raise self._malformed(f"the purpose {header.purpose!r}, not {purpose!r}")
        if header.byteorder != sys.byteorder:
            raise SaveFileError(
                f"{self._name} is of a {header.byteorder}-endian machine: use it on one of that kind"
            )
        if header.page_size != PAGE_SIZE:
            raise SaveFileError(
                f"{self._name} has pages of {header.page_size} bytes, not {PAGE_SIZE}: "
                "use the version of tmem that wrote it"
            )

    def _check_room(self, wanted: Iterable[Summary]) -> None:
        if self._store.mode != "on":
            raise SaveFileError(f"segment {self._segment!r} is {self._store.mode}: thaw it first")
        self._expected_bytes = sum(summary.memory_bytes for summary in wanted)
        # The bytes of the pages alone are certain, what the index takes here is not.
        if sum(summary.data_bytes for summary in wanted) > self._store.freeable_bytes():
            raise self._no_room("no memory")

    def _no_room(self, reason: str) -> SaveFileError:
        fewer = "" if self._purpose == "handoff" else ", or choose clients with --client"
        return SaveFileError(
            f"{self._name} does not fit into segment {self._segment!r} ({reason}): it needs about "
            f"{format_size(self._expected_bytes)}, and {format_size(self._store.freeable_bytes())} are "
            f"left; use a larger segment{fewer}"
        )

    def _taken(self, names: set[str]) -> SaveFileError:
        remedy = (
            "destroy what is there, choose others with --client, or give a single one another name with --as"
        )
        if self._purpose == "handoff":
            remedy = "destroy it there, or hand over to another segment"
        return SaveFileError(f"segment {self._segment!r} has {_listed(names)} already: {remedy}")

    def _malformed(self, what: str) -> SaveFileError:
        return SaveFileError(f"{self._name} cannot be: it has {what}; use the version of tmem that wrote it")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
