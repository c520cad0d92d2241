"""What all groups of handlers share: the inode table, attributes, errors.

Each group of FUSE requests is a class on top of `Handlers` (`namespace`, `directories`, `files`); `overlay`
puts them together. Handlers run on the event loop's thread; what may block for long goes to a worker thread,
with descriptors that cannot be closed meanwhile.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import pyfuse3
import trio

from tmem.errors import TmemError, errno_of
from tmem.fs.coherence import Change, Coherence, FileState
from tmem.fs.identity import handle_of, object_id
from tmem.fs.inodes import Inode, InodeTable
from tmem.fs.precache import Precache

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes

T = TypeVar("T")

Waiting = Callable[[], contextlib.AbstractContextManager[None]]
"""Brackets a handler's wait for a worker thread, so that the loop can have another task read requests."""


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn the errors of system calls and of tmem into what pyfuse3 replies with."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or 5) from None
    except TmemError as error:
        raise pyfuse3.FUSEError(errno_of(error)) from None


class Handlers(pyfuse3.Operations):
    """State and helpers of all handlers.

    `fine_stamps` says whether changes on the root's device have distinct time stamps (see `identity`);
    `timeout_seconds` is how long the kernel may keep names and attributes.
    """

    def __init__(
        self,
        table: InodeTable,
        precache: Precache,
        coherence: Coherence,
        fine_stamps: bool,
        timeout_seconds: float,
        waiting: Waiting,
    ) -> None:
        super().__init__()
        self.table = table
        self.precache = precache
        self.coherence = coherence
        self._fine_stamps = fine_stamps
        self._timeout = timeout_seconds
        self._waiting = waiting
        self._owner = (os.geteuid(), os.getegid())

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run blocking work in a worker thread; the loop goes on meanwhile."""
        with self._waiting():
            return await trio.to_thread.run_sync(work, *arguments)

    def attributes(self, inode: Inode, status: os.stat_result) -> "EntryAttributes":
        """Return what the kernel is told about an inode."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.nodeid
        entry.entry_timeout = entry.attr_timeout = self._timeout
        entry.st_mode = status.st_mode
        entry.st_nlink = status.st_nlink
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blksize = status.st_blksize
        entry.st_blocks = status.st_blocks
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        return entry

    def enter(self, parent: Inode, name: bytes) -> "EntryAttributes":
        """Look `name` up, count the lookup, and return the attributes for the reply."""
        inode, status = self.table.lookup(parent, name)
        self.table.remember(inode)
        return self.attributes(inode, status)

    def state_of(self, inode: Inode) -> FileState:
        """Return the coherence of a regular file's pages, made at its first open or change of content."""
        if inode.state is None:
            handle = self.table.handle(inode)
            fine_stamps = self._fine_stamps and inode.key[0] == self.table.device
            inode.state = self.coherence.recall(object_id(*inode.key, handle), fine_stamps)
        return inode.state

    def change(self, inode: Inode) -> Change:
        """Return the bracket around an own change of `inode` that ends before the handler waits."""
        return self.coherence.change(inode.state, self.table.descriptor(inode))

    def discard_if_unlinked(self, descriptor: int) -> None:
        """Drop the pages of a file if its last link is gone."""
        status = os.fstat(descriptor)
        if status.st_nlink:
            return
        inode = self.table.known(status)
        if inode is not None and inode.state is not None:
            self.coherence.discard(inode.state.name, inode.state)
        else:
            name = object_id(status.st_dev, status.st_ino, handle_of(descriptor))
            self.coherence.discard(name, None)
