"""What the native reader may open by itself, and what it has opened (backends/native/reader_opens.h).

The usual open, of a file that is only read and has not changed or was never opened, needs nothing that only
Python can do. So while opens are to be answered in the usual way Python *grants* that for a second at a time:
each grant says what an open would be told now, and the next open after it comes here and asks all those who
have a say (rules, what is worth it, plenty of memory, whether there is a pool). What was opened so is
*learned* whenever the reader returns, before anything else is done. Not for deciding any of this: `opening`.
Threading: the event loop's thread.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tmem.fs.acting import Caller
from tmem.fs.coherence import FileState
from tmem.fs.identity import Version
from tmem.fs.openfile import OpenFile

if TYPE_CHECKING:
    from tmem.fs.inodes import InodeTable

GRANT_SECONDS = 1.0
"""As often as it is looked whether caching pays, and for a pool."""
_AGAIN_SECONDS = 0.5


class Grants:
    """The grants of one mount. `clock` is a monotonic clock in seconds; `fine_stamps` as for `Handlers`."""

    def __init__(self, table: "InodeTable", fine_stamps: bool, clock: Callable[[], float]) -> None:
        self._table = table
        self._fine_stamps = fine_stamps
        self._clock = clock
        self._next = float("-inf")

    @property
    def due(self) -> bool:
        """Whether it is time for another one."""
        return self._clock() >= self._next

    def give(self, kept_bytes: int, accessed: bool) -> None:
        """Allow opens: files of up to `kept_bytes` are kept by the kernel.

        `accessed`: access times need no care.
        """
        self._next = self._clock() + _AGAIN_SECONDS
        self._table.opens.grant(GRANT_SECONDS, kept_bytes, self._fine_stamps, accessed)

    def learn(self, files: dict[int, OpenFile]) -> None:
        """Know what has been opened meanwhile, and enter what still is into `files`."""
        first, opened = self._table.opens.learn()
        for nodeid, gate, name, size, version, quiet in first:
            known = None if version is None else Version(*version)
            state = FileState(name, name, self._fine_stamps, size, known, quiet=quiet, gate=gate, takes=True)
            self._table[nodeid].state = state
        for number, nodeid, descriptor, accessed, *caller in opened:
            inode = self._table[nodeid]
            assert inode.state is not None
            if not inode.opens:
                inode.declined = False
            inode.opens += 1
            file = OpenFile(inode, inode.state, descriptor, False, False, number=number)
            file.caller, file.accessed = Caller(*caller), accessed
            files[number] = file
