"""The mount's pool in the segment, if there is one: senses it, uses it, and never fails for it.

One ephemeral, non-exclusive pool per mount (the overlay's reads do not stay in the kernel's page cache, so a
hit must not remove the page), or a shared one. Without a segment, or after any error of the pool, reads pass
through to the lower files; at most once a second `pool` looks whether a segment is there, and starts an empty
pool in it. While the client or the segment is off, reads pass through as well, but what changes is flushed
all the same, so that turning it on again shows nothing of the past. The process holds its client: when it
dies, so does the client's weight. Threading: `pool`, `claim` and `close` on the event loop's thread; `put`,
`get` and the flushes on any thread.
"""

import contextlib
import fcntl
import logging
import os
import struct
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends.clients import end_if_unused
from tmem.backends.paths import SegmentPaths
from tmem.errors import PoolError, SegmentError, TmemError
from tmem.fs.state import SavedPool
from tmem.fs.statistics import Counters

if TYPE_CHECKING:
    from tmem.backends._native import Client, Pool, Segment

log = logging.getLogger(__name__)


def ignore_pool(pool: "Pool | None") -> None:
    """Do nothing."""


SENSE_SECONDS = 1.0
"""How often a mount without a pool looks for a segment."""


_LOCK_BASE = 1 << 40
"""Where the byte locks of clients start: far beyond the segment's data."""


CLAIM_SECONDS = 2.0
"""How long a client may seem to be in use: a daemon that was killed lets go of its mount before its locks."""


class ClaimError(TmemError):
    """The mount's client belongs to a swap device or to another mount that is alive, or may not share."""


class InUseError(ClaimError):
    """Another mount uses the client, or one that is just ending."""


class Precache:
    """The pool of the mount whose client is called `client`, in the segment at `paths`.

    `shared` is the UUID of the shared pool to use instead of an own one. `clock` is a monotonic clock in
    seconds.
    """

    def __init__(
        self,
        paths: SegmentPaths,
        client: str,
        shared: uuid.UUID | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = Counters()
        self.shared = shared
        self._name = paths.name
        self._path = str(paths.segment)
        self.directory = paths.state
        """Where processes that use the segment agree with each other."""
        self._client_name = client
        self._clock = clock
        self._segment: Segment | None = None
        self._client: Client | None = None
        self._pool: Pool | None = None
        self._switch = (
            threading.Lock()
        )  # held while `_pool` and what `on_pool` was told become the same again
        self.on_pool: Callable[[Pool | None], None] = ignore_pool
        """Told of every change of the pool: of a new one after, of the end of one before pages of it may stay
        that are not right any more. From any thread."""
        self._lock = -1  # a descriptor
        self._locked = -1  # the id of the client that it locks
        self._next_look = float("-inf")
        self._complaint = ""

    def pool(self) -> "Pool | None":
        """Return the pool to use for one request, or None to pass through. Cheap: called for every read."""
        pool = self._pool
        if pool is not None:
            assert self._client is not None
            if self._client.usable:
                return pool
            if pool.alive:
                return None  # off: there is nothing to get, and flushes go to the pool without asking here
            log.info("the pool in the segment %s has ended: passing through", self._path)
            self._abandon(pool)
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + SENSE_SECONDS
            try:
                self._look()
            except (TmemError, OSError) as error:
                self._complain(error)
        return self._pool

    @property
    def current(self) -> "Pool | None":
        """The pool, if there is one, without looking for another."""
        return self._pool

    def claim(self) -> None:
        """Start using the segment if there is one, when the mount starts, or go on with what `restore` found.

        `ClaimError` if somebody else uses the client or it may not share; any other trouble only means to
        pass through for now.
        """
        self._next_look = self._clock() + SENSE_SECONDS
        deadline = time.monotonic() + CLAIM_SECONDS
        while True:
            try:
                if self._pool is None:
                    self._look()
                elif self._client is not None:
                    self._client.hold()
            except InUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
            except ClaimError:
                raise
            except (TmemError, OSError) as error:
                self._complain(error)
            return

    def saved(self) -> SavedPool:
        """Return what `restore` needs to go on with the same pool."""
        client, pool = self._client, self._pool
        if client is None or pool is None or self._lock < 0:
            return SavedPool(segment=None, client=-1, pool=-1, lock=self._lock)
        status = os.fstat(self._lock)
        return SavedPool(
            segment=(status.st_dev, status.st_ino), client=client.id, pool=pool.id, lock=self._lock
        )

    def restore(self, saved: SavedPool) -> None:
        """Find the pool again that was `saved`, with its pages; without it a new one begins at `claim`.

        TmemError if the segment is there and cannot be used.
        """
        from tmem.backends import _native

        self._lock, self._locked = saved["lock"], saved["client"]
        try:
            status = Path(self._path).stat()
        except FileNotFoundError:
            return
        if (status.st_dev, status.st_ino) != saved["segment"]:
            return  # another one has taken its place
        self._segment = _native.attach(self._path)
        with contextlib.suppress(PoolError):  # it has ended meanwhile
            client = self._segment.client(self._client_name, create=False)
            if client.id == saved["client"]:
                self._client = client
                self._pool = client.pool(saved["pool"])

    def _abandon(self, pool: "Pool | None") -> None:
        """Stop using a pool, after an error; a new one is looked for within a second. For any thread.

        The mapping ends with the last reference to it: other threads may still be in a call. If another pool
        has taken its place meanwhile, that stays: what is flushed must be what hits come from.
        """
        with self._switch:
            if pool is not None and self._pool is pool:
                self.on_pool(None)
                self._pool = None

    def _use(self, pool: "Pool") -> None:
        with self._switch:
            self._pool = pool
            self.on_pool(pool)

    def put(self, oid: bytes, index: int, data: memoryview) -> int:
        """Put whole pages; the pages that the pool accepted."""
        pool, client, segment = self._pool, self._client, self._segment
        if pool is None or client is None or segment is None:
            return 0
        try:
            if client.mode != "on" or segment.mode != "on":
                return 0  # a refused put would drop pages of the range that are there, and as good as these
            return pool.put(oid, index, data)
        except TmemError as error:
            self._lost(pool, error)
            return 0

    def absent(self, oid: bytes, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges (first page, page beyond the last) within one that are not there."""
        pool = self._pool
        try:
            present = pool.present(oid, first, last - first) if pool is not None else []
        except TmemError as error:
            self._lost(pool, error)
            present = []
        ranges, at = [], first
        for index, npages in [*present, (last, 0)]:
            if index > at:
                ranges.append((at, index))
            at = index + npages
        return ranges

    def room_bytes(self) -> int:
        """Return how much memory the mount's pages may occupy at most; 0 without a pool."""
        pool, client, segment = self._pool, self._client, self._segment
        if pool is None or client is None or segment is None:
            return 0
        try:
            return min(client.cap_bytes or segment.memory_bytes, segment.memory_bytes)
        except TmemError as error:
            self._lost(pool, error)
            return 0

    def turnover(self) -> tuple[int, int]:
        """Return the pages that the pool has evicted since it began, and those that it holds."""
        pool = self._pool
        try:
            statistics = pool.statistics() if pool is not None else {"evictions": 0, "pages": 0}
        except TmemError as error:
            self._lost(pool, error)
            return 0, 0
        return statistics["evictions"], statistics["pages"]

    def flush(self, oid: bytes, index: int, npages: int) -> int:
        """Drop pages; the number that existed. After an error the whole pool is given up."""
        pool = self._pool
        if pool is None or npages <= 0:
            return 0
        try:
            return pool.flush(oid, index, npages)
        except TmemError as error:
            self._lost(pool, error)
            return 0

    def flush_object(self, oid: bytes) -> int:
        """Drop every page of an object; the number that existed."""
        pool = self._pool
        if pool is None:
            return 0
        try:
            return pool.flush_object(oid)
        except TmemError as error:
            self._lost(pool, error)
            return 0

    def get(self, pool: "Pool", oid: bytes, index: int, buffer: memoryview) -> int:
        """Fill `buffer` from `index` on, up to the first miss; the pages filled."""
        try:
            return pool.get(oid, index, buffer)
        except TmemError as error:
            self._lost(pool, error)
            return 0

    def close(self) -> None:
        """Destroy the pool (leave a shared one), and the client if nothing is in it or set for it; detach."""
        client, segment = self._client, self._segment
        with self._switch:
            self.on_pool(None)
            self._pool = None
        self._client = self._segment = None
        self._next_look = float("inf")
        with contextlib.suppress(TmemError):
            if client is not None and self._locked == client.id:
                _destroy_ephemeral(client)
                end_if_unused(client)
        if segment is not None:
            segment.close()
        self._unlock()

    def _lost(self, pool: "Pool | None", error: TmemError) -> None:
        log.warning("the pool failed, passing through: %s", error)
        self._abandon(pool)

    def _look(self) -> None:
        if os.path.exists(self._path):  # noqa: PTH110 - a quarter of what Path costs
            self._attach()
            self._complaint = ""

    def _complain(self, error: Exception) -> None:
        self._abandon(self._pool)
        if str(error) != self._complaint:  # once, not once a second
            self._complaint = str(error)
            log.warning("cannot use the segment %s, passing through: %s", self._path, error)

    def _attach(self) -> None:
        from tmem.backends import _native

        if self._segment is None or not self._segment.alive:
            self._unlock()
            self._segment = _native.attach(self._path)
        if not self._segment.alive:
            raise SegmentError("it has ended")
        self._client = self._segment.client(self._client_name)
        if self._locked != self._client.id:  # it changes when somebody destroys the client
            self._unlock()
            self._lock = _lock_client(self._path, self._client_name, self._client.id)
            self._locked = self._client.id
        if any(pool.persistent for pool in self._client.pools()):
            raise ClaimError(f"the client {self._client_name!r} has a swap device: mount with -o client=NAME")
        _destroy_ephemeral(self._client)  # of a daemon that was killed: nobody has validated them since
        self._client.hold()
        self._use(self._new_pool(self._client))
        log.info("using a pool of the segment %s", self._path)

    def _new_pool(self, client: "Client") -> "Pool":
        if self.shared is None:
            return client.new_pool(persistent=False, exclusive=False)
        if self.shared.bytes not in client.authorised():
            raise ClaimError(
                f"the client {self._client_name!r} may not share the pool {self.shared}: allow it with "
                f"'tmem --name {self._name} authorise {self._client_name} {self.shared} --create'"
            )
        return client.new_pool(persistent=False, uuid=self.shared.bytes)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = self._locked = -1


def _destroy_ephemeral(client: "Client") -> None:
    for pool in client.pools():
        if not pool.persistent:
            pool.destroy()


def _lock_client(path: str, name: str, client_id: int) -> int:
    """Return a descriptor that holds the client for this process, until it is closed or the process dies.

    A byte lock on the segment's file tells a mount that is alive from pools that a killed daemon left.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _LOCK_BASE + client_id, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    except OSError:
        os.close(descriptor)
        raise InUseError(f"the client {name!r} is used by another mount: mount with -o client=NAME") from None
    return descriptor
