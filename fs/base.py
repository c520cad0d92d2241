"""What all groups of handlers share: the inode table, attributes, errors.

Each group of FUSE requests is a class on top of `Handlers` (`namespace`, `directories`, `files`); `overlay`
puts them together. Handlers run on the event loop's thread; what may block for long goes to a worker thread,
with descriptors that cannot be closed meanwhile.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import pyfuse3
import trio

from tmem.errors import TmemError, errno_of
from tmem.fs.acting import Caller
from tmem.fs.coherence import Change, Coherence, FileState
from tmem.fs.fanotify import is_local
from tmem.fs.identity import object_id
from tmem.fs.inodes import Inode, InodeTable
from tmem.fs.instances import Instances
from tmem.fs.kernel import Kernel
from tmem.fs.lifetimes import Lifetimes
from tmem.fs.precache import Precache
from tmem.fs.reading import Reading
from tmem.fs.watch import Watch

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes

    from tmem.fs.beyond import Beyond

T = TypeVar("T")

log = logging.getLogger(__name__)

Waiting = Callable[[], contextlib.AbstractContextManager[None]]
"""Brackets a handler's wait for a worker thread, so that the loop can have another task read requests."""


_READ_THREADS, _CHANGE_THREADS, _NAME_THREADS = 64, 40, 40
_THREADS_OF_A_FILE = 16
"""As many READs of a file keep any disk busy, and four files may hang before other misses wait."""

Failure = OSError | TmemError | MemoryError | OverflowError | ValueError
FAILURES = (OSError, TmemError, MemoryError, OverflowError, ValueError)
"""What a handler may fail with before `errors` has made a reply of it. Anything else ends the mount.

The last two are of values that nobody has thought of, which are some file's, so they are that file's error.
"""

_MOST_ERROR = 511
"""From the next one on (ERESTARTSYS) the kernel refuses the reply, and who waits for it waits for ever."""


def errno_seen(failure: Failure) -> int:
    """Return the errno that a program sees of a failure."""
    if isinstance(failure, TmemError):
        return errno_of(failure)
    if isinstance(failure, MemoryError):
        return errno.ENOMEM
    if not isinstance(failure, OSError):
        log.error("a request failed by an error of tmem's own, and was answered with EIO", exc_info=failure)
        return errno.EIO
    number = failure.errno or errno.EIO
    return number if 0 < number <= _MOST_ERROR else errno.EIO


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn the errors of system calls and of tmem into what pyfuse3 replies with."""
    try:
        yield
    except FAILURES as failure:
        raise pyfuse3.FUSEError(errno_seen(failure)) from None


class Handlers(pyfuse3.Operations):
    """State and helpers of all handlers.

    `fine_stamps` says whether changes on the root's device have distinct time stamps (see `identity`);
    `lifetimes` says how long the kernel may keep names and attributes.
    """

    def __init__(
        self,
        table: InodeTable,
        precache: Precache,
        coherence: Coherence,
        fine_stamps: bool,
        lifetimes: Lifetimes,
        waiting: Waiting,
    ) -> None:
        super().__init__()
        self.table = table
        self.precache = precache
        self.coherence = coherence
        coherence.on_name = table.opens.remember
        self.instances = Instances(table.device, precache.directory if precache.shared else None)
        self._fine_stamps = fine_stamps
        self.lifetimes = lifetimes
        self.kernel = Kernel(table.nodes.doubt)
        self.reading: Reading | None = None
        self.beyond: Beyond | None = None
        """What other hosts have read, where the mount has a tier."""
        self.watch: Watch | None = None
        """Tells of changes underneath, where they are reported."""
        self._is_local = is_local(table.root)
        self._waiting = waiting
        self.read_threads = trio.CapacityLimiter(_READ_THREADS)
        self.change_threads = trio.CapacityLimiter(_CHANGE_THREADS)
        self.name_threads = trio.CapacityLimiter(_NAME_THREADS)
        self.close_threads = trio.CapacityLimiter(_CHANGE_THREADS)
        self.rewrites = 0
        """Changes of contents that have ended: with those of names the kernel lets none go together."""

    async def in_thread(
        self, work: Callable[..., T], *arguments: object, threads: trio.CapacityLimiter | None = None
    ) -> T:
        """Run blocking work in a worker thread; the loop goes on meanwhile. If there is none, here.

        `threads` bounds how many there are at a time; None: trio's own bound, which stats and opens share.
        """
        begun = False

        def run() -> T:
            nonlocal begun
            begun = True
            return work(*arguments)

        with self._waiting():
            try:
                return await trio.to_thread.run_sync(run, limiter=threads)
            except RuntimeError:  # threads are limited (pids.max of a container, say)
                if begun:
                    raise
                return work(*arguments)

    async def ask(self, inode: Inode, work: Callable[..., T], *arguments: object) -> T:
        """Return what `work` says, given a descriptor of the inode and `arguments`.

        In a thread if the lower may not answer: then others go on.
        """
        if self.is_here(inode):
            return work(self.table.descriptor(inode), *arguments)
        with self.table.kept(inode) as beside:
            return await self.in_thread(work, beside, *arguments)

    async def read_in_thread(self, inode: Inode, work: Callable[..., T], *arguments: object) -> T:
        """As `in_thread`, for what reads a file; one that hangs has at most `_THREADS_OF_A_FILE` of these."""
        if inode.reads is None:
            inode.reads = trio.CapacityLimiter(_THREADS_OF_A_FILE)
        reads, borrower = inode.reads, object()
        try:
            reads.acquire_on_behalf_of_nowait(borrower)  # else it would cost a turn of the scheduler
        except trio.WouldBlock:
            with self._waiting():
                await reads.acquire_on_behalf_of(borrower)
        try:
            return await self.in_thread(work, *arguments, threads=self.read_threads)
        finally:
            reads.release_on_behalf_of(borrower)

    async def change_in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """As `in_thread`, for what changes a file: those that hang do not hold up reads and questions."""
        return await self.in_thread(work, *arguments, threads=self.change_threads)

    async def close_elsewhere(self, descriptor: int) -> None:
        """Close a file of a lower that may not answer: also a close asks it, by FLUSH. OSError."""
        await self.in_thread(os.close, descriptor, threads=self.close_threads)

    async def name_in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """As `in_thread`, for what changes names or attributes: those that hang hold up only such changes."""
        return await self.in_thread(work, *arguments, threads=self.name_threads)

    async def change_at(self, inode: Inode, work: Callable[..., T], *arguments: object) -> T:
        """Make an own change of an inode: what `work` returns, given a descriptor of it and `arguments`.

        In a thread if the lower may not answer: then others go on.
        """
        if self.is_here(inode):
            with self.change(inode):
                return work(self.table.descriptor(inode), *arguments)
        with self.table.kept(inode) as beside, self.change(inode) as change:
            return await self.name_in_thread(_changed, change, beside, work, *arguments)

    def is_here(self, inode: Inode) -> bool:
        """Say whether only this kernel answers for a file, and so does."""
        return self._is_local and inode.key[0] == self.table.device

    def limits_of(self, inode: Inode, caller: Caller | None) -> Caller | None:
        """Return as whom to take room (`acting.within_limits`), for a caller.

        As root where others answer for the file: they would ask for the caller's groups, too.
        """
        return caller if self.is_here(inode) else None

    def attributes(
        self, inode: Inode, status: os.stat_result, rewrites: int | None = None, hidden: bool = True
    ) -> "EntryAttributes":
        """Return what the kernel is told about an inode, `hidden` from programs or not.

        Not to be believed if its content may have changed since there were so many `rewrites`: the kernel
        does not see that a reply to a change is older.
        """
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.nodeid
        entry.generation = inode.generation
        entry.entry_timeout = self.lifetimes.of_name(status.st_dev)
        doubted = inode.stored_to or (rewrites is not None and rewrites != self.rewrites)
        entry.attr_timeout = 0.0 if doubted else self.lifetimes.of_attributes(status)
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
        another, old = self.table.nodes.tells(inode, status.st_mtime_ns, hidden)
        if another:
            tell_another_time(entry, status)
        if old:
            entry.attr_timeout = 0.0
        entry.st_ctime_ns = status.st_ctime_ns
        return entry

    def enter(self, parent: Inode, name: bytes) -> "EntryAttributes":
        """Look `name` up, count the lookup, and return the attributes for the reply."""
        inode, status = self.table.lookup(parent, name)
        self.table.remember(inode)
        return self.attributes(inode, status)

    def enter_found(
        self, status: os.stat_result, descriptor: int, rewrites: int | None = None
    ) -> "EntryAttributes":
        """The same of what was looked up already; owns its O_PATH descriptor."""
        inode = self.table.meet(status, descriptor)
        self.table.remember(inode)
        return self.attributes(inode, status, rewrites)

    def absent(self, parent: Inode) -> "EntryAttributes":
        """Return the reply for a name that `parent` lacks. FUSEError(ENOENT) if it is not to be kept."""
        seconds = self.lifetimes.of_absence(parent.key[0])
        if not seconds:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = seconds
        return entry

    def state_of(self, inode: Inode) -> FileState:
        """Return the coherence of a regular file's pages, made at its first open or change of content."""
        if inode.state is None:
            name = self._name_of(inode.key, self.table.handle(inode), self.table.descriptor(inode))
            fine_stamps = self._fine_stamps and inode.key[0] == self.table.device
            inode.state = self.coherence.recall(name, fine_stamps)
            self.table.opens.know(inode.nodeid, *inode.key, None)
        return inode.state

    def _name_of(self, key: tuple[int, int], handle: bytes | None, descriptor: int) -> bytes:
        """Return what names the lower file with this (st_dev, st_ino), open at `descriptor`."""
        return object_id(*key, handle, self.instances.mark_of(key[0], descriptor))

    def state_if_any(self, inode: Inode) -> FileState | None:
        """Return the coherence of the file's pages if there may be any; else there is none to keep right.

        The kernel may have forgotten the file since they came, and know it again for a chmod or a rename.
        """
        if inode.state is None and self.coherence.remembers_some:
            with contextlib.suppress(OSError):  # they are dropped at the next open then
                name = self._name_of(inode.key, self.table.handle(inode), self.table.descriptor(inode))
                return self.state_of(inode) if self.coherence.remembers(name) else None
        return inode.state

    def change(self, inode: Inode) -> Change:
        """Return the bracket around an own change of `inode` that ends before the handler waits."""
        return self.change_of(self.state_if_any(inode), self.table.descriptor(inode), self.is_here(inode))

    def change_of(self, state: FileState | None, descriptor: int, here: bool) -> Change:
        """Return the bracket around an own change of the file open at `descriptor`.

        Unless it `is_here` only what is done within `Change.seen` may take long.
        """
        if self.watch is not None and state is not None:
            # Reports of changes from before it would else be taken for such beside it, which cost all pages.
            self.watch.catch_up()
        if here:
            return self.coherence.change(state, descriptor)
        return self.coherence.change_elsewhere(state)

    def discard_if_unlinked(self, descriptor: int) -> None:
        """Drop the pages of a file if its last link is gone."""
        self.discard_unless_linked(descriptor, status_if_any(descriptor))

    def discard_unless_linked(self, descriptor: int, status: os.stat_result | None) -> None:
        """Drop the pages of a file if its last link is gone; `status` is the file's, just taken."""
        if status is None or status.st_nlink:
            return
        inode = self.table.known(status, descriptor)
        if inode is not None and inode.state is not None:
            self.coherence.discard(inode.state.name, inode.state)
        else:
            key = (status.st_dev, status.st_ino)
            handle = self.table.handle_at(key, descriptor)
            self.coherence.discard(self._name_of(key, handle, descriptor), None)


def tell_another_time(entry: "EntryAttributes", status: os.stat_result) -> None:
    """Tell the kernel of a time of modification that is nobody's, and have it ask again.

    So it drops what it has of the file, whatever time it knows.
    """
    entry.st_mtime_ns = status.st_mtime_ns ^ 1
    entry.attr_timeout = 0.0


def _changed(change: Change, descriptor: int, work: Callable[..., T], *arguments: object) -> T:
    with change.seen(descriptor):
        return work(descriptor, *arguments)


def status_if_any(descriptor: int) -> os.stat_result | None:
    """Return the status of an open file; None if it is gone in the lower's eyes.

    Then what was done to it is done, and no name leads to its pages.
    """
    try:
        return os.fstat(descriptor)
    except OSError:
        return None
