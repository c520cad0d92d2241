"""The native reader of one mount, which answers hits below Python (backends/native/reader.h).

It stands between the kernel's device and the socket that pyfuse3 uses. What it needs to know it is told
here: which pool, which files are open, and by each file's gate (`coherence.FileState.show`) whether its pages
may be served. Threading: the event loop's thread, except `use_pool`.
"""

import contextlib
import errno
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from tmem.fs.backing import Backing
from tmem.fs.buffers import REQUEST_BYTES, Buffers
from tmem.fs.coherence import FileState
from tmem.fs.device import Device
from tmem.fs.statistics import Counters
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends._native import Opens, Pool, Reader, ReaderBuffer
    from tmem.fs.shortcuts import Shortcuts, Start

log = logging.getLogger(__name__)

MOST_HELPERS = 3

_COUNTERS = (
    *("hit_reads", "hit_pages", "hit_bytes", "miss_reads", "miss_pages", "lower_ns"),
    *("put_ns", "put_pages", "refused_pages", "overtaken_pages"),
)
"""What is counted there by the names of `Counters`."""

NOTHING, REQUEST, GONE, ASKED, NEWS = range(5)
"""What `Reader.serve` returns; NEWS is added to the others."""


class NativeBuffers(Buffers):
    """Buffers of the native reader, which stay with it: handlers name them to it instead of copying them."""

    def __init__(self, reader: "Reader") -> None:
        super().__init__()
        self._reader = reader

    def take(self, size: int) -> memoryview:
        """Return a writable, page-aligned buffer of at least `size` bytes."""
        return memoryview(self._reader.take(size))

    def give(self, buffer: memoryview) -> None:
        """Do nothing: a buffer goes back with the last reference to it."""

    def reply(self, buffer: memoryview, start: int, length: int) -> bytes:
        """Return what a handler returns to reply with these bytes of a buffer."""
        return self._reader.send(cast("ReaderBuffer", buffer.obj), start, length) if length else b""

    def reply_before(self, buffer: memoryview, start: int, length: int, failure: OSError) -> bytes:
        """Reply with these bytes to a program, and with the failure where the kernel fills its own cache."""
        if length <= 0:
            raise failure
        return self._reader.send(cast("ReaderBuffer", buffer.obj), start, length, failure.errno or errno.EIO)

    def payload(self, data: bytes) -> memoryview:
        """Return what a request to write brings, given what its handler is called with."""
        return memoryview(self._reader.payload(data))


class Reading:
    """A native reader on a connected device."""

    def __init__(self, device: Device) -> None:
        from tmem.backends import _native

        self._new_gate = _native.Gate
        helpers = min(len(os.sched_getaffinity(0)) - 1, MOST_HELPERS)
        ends = (device.descriptor, device.channel.fileno(), device.session)
        self.reader = _native.Reader(*ends, helpers, REQUEST_BYTES)
        self.buffers = NativeBuffers(self.reader)
        self._counted: dict[str, int] = {}  # of its counters, what the mount's have already
        self.backing = Backing(device.descriptor) if device.passthrough else None
        """Where files that are not cached can be passed through."""
        self.rings = device.rings
        """What requests come by, None: the device."""
        self._session = device.session
        self._switch = threading.Lock()
        # Readable when there is something to do: a request, a reply, or a request that a helper has read.
        self._anything = select.epoll()
        self._device, *others = ends
        for end in others:
            self._anything.register(end, select.EPOLLIN)
        self._shortcuts: Shortcuts | None = None
        self._learn: Callable[[], None] = lambda: None

    def serve(self, wake: int, timeout_ms: int) -> int:
        """Have requests answered until there is something to do (`Reader.serve`); what was opened is known
        then."""
        event = self.reader.serve(wake, timeout_ms)
        if event >= NEWS:
            self._learn()
            event -= NEWS
        return event

    def open_with(self, opens: "Opens", learn: Callable[[], None]) -> None:
        """Have opens answered below Python as `opens` allow; `learn` is called when there is news of them."""
        self._learn = learn
        self.reader.set_opens(opens)

    def answer_with(self, shortcuts: "Shortcuts") -> None:
        """Have requests answered past libfuse by these from now on."""
        self._shortcuts = shortcuts
        self._anything.register(self.reader.open_shortcut(), select.EPOLLIN)

    def answer(self, start_soon: "Start") -> int:
        """Answer what does not go to libfuse; return how many requests that were."""
        return self._shortcuts.answer(start_soon) if self._shortcuts is not None else 0

    def begin(self) -> None:
        """Take requests by the rings, if there are any; when memory is locked, or all of theirs would be."""
        if self.rings is None:
            return
        try:
            self.reader.use_rings(self.rings)
        except OSError as error:
            log.warning("requests do not come over io_uring: %s", error.strerror)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Bracket waiting for `fileno`, which tells of requests only meanwhile.

        Whatever has the device in a set is told of each request by the kernel, whether anybody waits or
        not: 0.15 us of a hit.
        """
        self._anything.register(self._device, select.EPOLLIN)
        try:
            yield
        finally:
            self._anything.unregister(self._device)

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to do."""
        return self._anything.fileno()

    def has_request(self) -> bool:
        """Say whether a request for pyfuse3 lies in the socket."""
        poll = select.poll()
        poll.register(self._session, select.POLLIN)
        return bool(poll.poll(0))

    def use_pool(self, pool: "Pool | None") -> None:
        """Take hits from this pool from now on; no thread uses the one before any more. For any thread."""
        with self._switch:
            self.reader.set_pool(pool)

    def open(self, number: int, descriptor: int, state: FileState, local: bool) -> None:
        """Serve the open file `number`, until `close`; `local`: to ask for its size takes no waiting."""
        if state.gate is None:
            state.gate = self._new_gate()
        state.show()
        self.reader.open(number, descriptor, state.gate, local)

    def close(self, number: int) -> bool:
        """Stop serving a file; True if its descriptor is in use, and is closed here after that."""
        return self.reader.close_file(number)

    def count(self, counters: Counters) -> None:
        """Add to `counters` what was done here since the last time."""
        counted, before = self.reader.counters(), self._counted
        for name in _COUNTERS:
            setattr(counters, name, getattr(counters, name) + counted[name] - before.get(name, 0))
        counters.lower_bytes += (counted["miss_pages"] - before.get("miss_pages", 0)) * PAGE_SIZE
        self._counted = counted

    def end(self) -> None:
        """Stop it all; nobody may be in `Reader.serve`."""
        self.reader.close()
        self._anything.close()
