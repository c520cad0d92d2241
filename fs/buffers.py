"""Page-aligned buffers that replies are sent from, where pyfuse3 sends them (else see `reading`).

pyfuse3 has copied a reply to the kernel before any other task runs, so a handler may give its buffer back
just before it returns a view of it. Threading: the event loop's thread; in between, worker threads may fill
the buffer.
"""

import mmap

from tmem.types import PAGE_SIZE

REQUEST_BYTES = 1 << 20
"""The largest read that the kernel sends (256 pages); one page more if it starts within a page."""

_BUFFER_BYTES = REQUEST_BYTES + 2 * PAGE_SIZE


class Buffers:
    """A few reused buffers of `REQUEST_BYTES` and two pages; more are made when requests overlap."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._free: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """Return a writable, page-aligned buffer of at least `size` bytes."""
        if size > _BUFFER_BYTES:  # only if the kernel's limit was raised
            return memoryview(mmap.mmap(-1, size))
        return self._free.pop() if self._free else memoryview(mmap.mmap(-1, _BUFFER_BYTES))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        if len(buffer) == _BUFFER_BYTES and len(self._free) < self._keep:
            self._free.append(buffer)

    def reply(self, buffer: memoryview, start: int, length: int) -> bytes:
        """Return what a handler returns to reply with these bytes of a buffer; takes it back."""
        self.give(buffer)
        return buffer[start : start + length]  # type: ignore[return-value]  # any buffer will do

    def reply_before(self, buffer: memoryview, start: int, length: int, failure: OSError) -> bytes:
        """Reply with these bytes of a buffer, which end where reading failed. Raises `failure` instead.

        The kernel may be filling its own cache, where fewer bytes would mean zeros from there on.
        """
        self.give(buffer)
        raise failure

    def payload(self, data: bytes) -> memoryview:
        """Return what a request to write brings, given what its handler is called with."""
        return memoryview(data)
