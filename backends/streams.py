"""Frames to and from descriptors, the checksums and system calls in a thread of their own.

While the core exports into one block (or imports from one), the thread writes (or reads) another: the core,
the checksum and the kernel all work without the interpreter's lock. A few blocks are all the memory: files
are written past the page cache (`past_the_cache`), and dropped from it as they are read. Pipes and sockets,
blocking or not, do as well; nothing seeks.

Not for what frames mean. Threading: one thread calls the methods of an object, another one belongs to it; it
is a daemon, so a pipe that nobody serves does not keep the process.
"""

import errno
import fcntl
import os
import queue
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from tmem.backends.savefile import (
    ALIGNMENT,
    BLOCK_BYTES,
    MAX_FRAME_BYTES,
    REMEDY,
    Frame,
    FrameReader,
    FrameWriter,
    Kind,
    new_buffer,
)

_BLOCKS = 3
_PIPE_BYTES = 1 << 20
_DROP_BYTES = 4 << 20


def new_block() -> memoryview:
    """Return a block for data frames, its memory backed by the system."""
    block = new_buffer(BLOCK_BYTES)
    for at in range(0, BLOCK_BYTES, ALIGNMENT):
        block[at] = 1
    return block


class FrameOutput:
    """Writes frames to `descriptor`, in order, from a thread of its own.

    An error of the thread, an OSError mostly, is raised by whatever is called next.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)  # the thread may outlive the caller's
        _widen(descriptor)
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(_BLOCKS):
            self._free.put(new_block())
        self._todo: queue.SimpleQueue[Callable[[FrameWriter], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.timeout_s: float | None = None
        """How long a method waits at most for what is written to be taken, then raises TimeoutError."""
        self._writer: FrameWriter | None = None
        self._thread = threading.Thread(target=self._run, name="tmem-output", daemon=True)
        self._thread.start()

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self._writer.frames if self._writer else 0

    @property
    def data_bytes(self) -> int:
        """Bytes of records written so far."""
        return self._writer.data_bytes if self._writer else 0

    def block(self) -> memoryview:
        """Return a block to fill; records go behind HEAD_BYTES of room. Waits until one is free."""
        self._check()
        try:
            block = self._free.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self._too_slow() from None
        self._check()
        return block

    def data(self, client: int, pool: int, block: memoryview, length: int, ours: bool = True) -> None:
        """Write `length` bytes of records of a pool. A block of `block` comes back to it; `ours` False
        leaves it alone."""

        def write(writer: FrameWriter) -> None:
            try:
                writer.data(client, pool, block, length)
            finally:
                if ours:
                    self._free.put(block)

        if length:
            self._put(write)
        elif ours:
            self._free.put(block)

    def document(self, kind: Kind, client: int, content: Mapping[str, object]) -> None:
        """Write a frame with a JSON object."""
        self._put(lambda writer: writer.document(kind, client, content))

    def drain(self) -> None:
        """Wait until all is written."""
        done = threading.Event()
        self._put(lambda writer: done.set())
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        while not done.wait(0.1):
            self._check()
            if deadline is not None and time.monotonic() > deadline:
                raise self._too_slow()
        self._check()

    def close(self) -> None:
        """Write everything and end the thread; the descriptor stays open."""
        self.drain()
        self._todo.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """Write no more. A write that is under way ends when it can, or when the descriptor's other end
        does."""
        self._error = self._error or BrokenPipeError("abandoned")
        self._todo.put(None)

    def _too_slow(self) -> TimeoutError:
        return TimeoutError(f"what was written is not taken within {self.timeout_s:g} s")

    def _put(self, work: Callable[[FrameWriter], None]) -> None:
        self._check()
        self._todo.put(work)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._writer = writer = FrameWriter(self._write)
            while (work := self._todo.get()) is not None:
                if self._error is not None:
                    break
                work(writer)
        except BaseException as error:
            self._error = error
        finally:
            os.close(self._descriptor)
            if self._error is not None:
                self._free.put(memoryview(b""))  # whoever waits for a block shall see the error

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                _wait(self._descriptor, select.POLLOUT)
            except OSError as error:
                # After a short write, of a disk that gets full, what is left may have no proper size.
                if error.errno != errno.EINVAL or not _end_direct(self._descriptor):
                    raise


class FrameInput:
    """Reads frames of `descriptor` ahead, in a thread of its own; iterate over it once.

    `name` and `remedy` as of `FrameReader`. The payload of a frame is valid until the next one is taken. With
    the frame of kind `last` the iteration ends; `whole` says that nothing may follow it.
    """

    def __init__(
        self, descriptor: int, name: str, last: Kind, whole: bool = False, remedy: str = REMEDY
    ) -> None:
        self._descriptor = os.dup(descriptor)  # the thread may outlive the caller's
        self._last = last
        self._whole = whole
        self._reader = FrameReader(Descriptor(self._descriptor).read, name, remedy)
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(_BLOCKS):
            self._free.put(new_buffer(MAX_FRAME_BYTES))
        self._found: queue.SimpleQueue[tuple[Frame, memoryview] | BaseException | None] = queue.SimpleQueue()
        self._taken: memoryview | None = None
        threading.Thread(target=self._run, name="tmem-input", daemon=True).start()

    @property
    def frames(self) -> int:
        """Frames read so far."""
        return self._reader.frames

    @property
    def data_bytes(self) -> int:
        """Bytes of records read so far."""
        return self._reader.data_bytes

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self._taken is not None:
            self._free.put(self._taken)
            self._taken = None
        found = self._found.get()
        if found is None:
            raise StopIteration
        if isinstance(found, BaseException):
            raise found
        frame, self._taken = found
        return frame

    def close(self) -> None:
        """Read no more than is under way."""
        self._free.put(None)

    def _run(self) -> None:
        try:
            while (buffer := self._free.get()) is not None:
                frame = self._reader.next(buffer)
                if frame.kind is self._last and self._whole:
                    self._reader.expect_end()
                self._found.put((frame, buffer))
                if frame.kind is self._last:
                    break
            self._found.put(None)
        except BaseException as error:
            self._found.put(error)
        finally:
            os.close(self._descriptor)


class Descriptor:
    """What a `FrameReader` reads from; of a file nothing stays in the page cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._at = self._dropped = os.lseek(descriptor, 0, os.SEEK_CUR) if self._regular else 0
        if self._regular:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.timeout_s: float | None = None
        """How long to wait at most for a pipe or socket to give something, then raise TimeoutError."""

    def read(self, buffer: memoryview) -> int:
        """Fill `buffer`, less only where the stream ends; how many bytes."""
        if self._regular:
            self._advise()
        got = 0
        while got < len(buffer):
            if self.timeout_s is not None and not _wait(self._descriptor, select.POLLIN, self.timeout_s):
                raise TimeoutError(f"nothing came for {self.timeout_s:g} s")
            try:
                more = os.readv(self._descriptor, [buffer[got:]])
            except BlockingIOError:
                _wait(self._descriptor, select.POLLIN)
                continue
            if not more:
                break
            got += more
        self._at += got
        return got

    def _advise(self) -> None:
        """Have the page cache drop what we have read."""
        if self._at - self._dropped >= _DROP_BYTES:
            os.posix_fadvise(
                self._descriptor, self._dropped, self._at - self._dropped, os.POSIX_FADV_DONTNEED
            )
            self._dropped = self._at


def _wait(descriptor: int, event: int, timeout_s: float | None = None) -> bool:
    """Wait until `descriptor` is ready for `event`; False after `timeout_s`."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _widen(descriptor: int) -> None:
    """Make a pipe carry more at once; whatever else it is stays as it is."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def past_the_cache(descriptor: int) -> None:
    """Have an ordinary file that we have opened written past the page cache, if its file system can do that.

    It leaves memory to a machine that has little, and a fresh page of cache may cost more than the disk does:
    measured 1.4 GB/s instead of 0.3 to 1.5. Reading is better with the cache, whose requests are larger (five
    restores in turn: 0.81 of dd instead of 0.46); there what was read is dropped at once.
    """
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)


def _end_direct(descriptor: int) -> bool:
    """Undo that; False if it was not done."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
