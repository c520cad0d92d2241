"""An open file of the mount, and the points at which tests hold its handlers up.

What the handlers of open files (`opening`, `files`) and the loads of its pages (`loading`) share. Threading:
the event loop's thread; worker threads get its descriptor and `state` only.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from tmem.fs.acting import Caller
from tmem.fs.coherence import FileState
from tmem.fs.inodes import Inode
from tmem.fs.readahead import Stream

Pause = Callable[[str], None]
"""Called in worker threads, at ``read:lower-read`` (before the put), ``write:flushed``, ``write:written`` and
``truncate:done``."""


def no_pause(point: str) -> None:
    """Do nothing."""


@dataclass(eq=False, slots=True)
class OpenFile:
    """One open file of the mount."""

    inode: Inode
    state: FileState
    descriptor: int
    writable: bool
    append: bool
    stream_start: int = 0
    """Where the stretch of bytes began that ends at `stream_end` and was put as it was read."""
    stream_end: int = 0
    exact: bool = False
    """Whether the kernel reads no more of the lower file than it is asked for."""
    ahead: Stream | None = None
    """What is read ahead of it."""
    number: int = 0
    """The handle."""
    loads: int = 0
    """Reads of the lower file for the pool that are under way."""
    side_by_side: tuple[int, int] | None = None
    """The bytes that were put by reads that were under way at a time."""
    caller: Caller | None = None
    """Who opened it; None after the code was replaced."""
    accessed: bool = False
    """Whether its access time needs no more care."""
    uses: int = 0
    """Reads and the like that wait, and use the descriptor meanwhile or after that."""
    unused: trio.Event | None = None
    """For who waits until there are none."""

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Bracket the wait of one that uses the file: for a thread that was given the descriptor, say."""
        self.uses += 1
        try:
            yield
        finally:
            self.uses -= 1
            if not self.uses and self.unused is not None:
                self.unused.set()

    async def wait_unused(self) -> None:
        """Come back when nobody is within `used` any more."""
        while self.uses:
            self.unused = trio.Event()
            await self.unused.wait()
