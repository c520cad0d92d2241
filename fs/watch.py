"""Have changes made underneath the mount show at once, where the kernel reports them (`fanotify`).

For each report that concerns a file which the kernel knows through the mount:

- changed content: the file's pages are dropped, bytes that were read before are not put, and its attributes
  are asked for again;
- changed attributes, links or place: its attributes are asked for again;
- changed entries of a directory: its attributes, and all names (`kernel`);
- reports were lost: all of this for all files.

The mount's own changes are reported too, under the daemon's own process id, and left out: `coherence`
brackets them, and the kernel has made them itself. A read calls `catch_up` before it asks the pool, so it
never returns bytes from before a change that was over when it began. What the kernel answers by itself
(names, attributes, cached pages) follows when the event loop has read the report.

Threading: the event loop's thread.
"""

import contextlib
import os

import trio

from tmem.fs import fanotify, syscalls
from tmem.fs.coherence import Coherence
from tmem.fs.fanotify import Event, Events
from tmem.fs.inodes import Inode, InodeTable
from tmem.fs.kernel import Kernel
from tmem.fs.statistics import Counters

PAUSE_SECONDS = 0.001
"""Between two looks under load, so that reports of one file become one."""

REPEAT_SECONDS = 1.0
"""After this, the kernel is told again: a reply that it had not taken in yet the first time may have
introduced a file with attributes from before the change."""

_REMEMBERED_HANDLES = 10_000
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Watch:
    """Applies `events`, which it owns, to all the others."""

    def __init__(
        self, events: Events, table: InodeTable, coherence: Coherence, kernel: Kernel, counters: Counters
    ) -> None:
        self._events = events
        self._table = table
        self._coherence = coherence
        self._kernel = kernel
        self._counters = counters
        self._pid = os.getpid()
        self._keys: dict[bytes, tuple[int, int]] = {}  # lower identities by handle
        self._repeat: dict[int, None] = {}  # node ids
        self._repeat_names = False
        self._repeat_at = float("inf")

    @property
    def descriptor(self) -> int:
        """The descriptor that is readable while there are reports."""
        return self._events.descriptor

    async def run(self) -> None:
        """Apply changes as they come, until cancelled."""
        while True:
            with trio.move_on_at(self._repeat_at):
                await trio.lowlevel.wait_readable(self._events.descriptor)
            self.catch_up()
            if trio.current_time() >= self._repeat_at:
                self._tell_again()
            elif self._repeat and self._repeat_at == float("inf"):
                self._repeat_at = trio.current_time() + REPEAT_SECONDS
            await trio.sleep(PAUSE_SECONDS)

    def catch_up(self) -> None:
        """Apply every change that was over when this was called."""
        names = False
        for event in self._events.read():
            if event.pid != self._pid:
                names |= self._apply(event)
        if names:
            self._kernel.forget_names()
            self._repeat_names = True

    def _apply(self, event: Event) -> bool:
        """Apply one report; True if names have changed."""
        if event.mask & fanotify.OVERFLOW:
            self._suspect_all()
            return True
        inode = self._find(event.handle)
        if inode is None:
            return False
        self._counters.noticed_changes += 1
        if event.mask & (fanotify.MODIFY | fanotify.CLOSE_WRITE):
            self._content(inode)
        self._tell(inode)
        return bool(event.mask & fanotify.NAMES)

    def _suspect_all(self) -> None:
        self._counters.lost_reports += 1
        for inode in self._table.all():
            self._content(inode)
            self._tell(inode)

    def _tell(self, inode: Inode) -> None:
        """Have the kernel ask for the attributes again, now and once more later."""
        self._kernel.forget_attributes(inode.nodeid)
        self._repeat[inode.nodeid] = None

    def _content(self, inode: Inode) -> None:
        if inode.state is not None:
            with contextlib.suppress(OSError):  # it is gone: nobody can read it
                self._coherence.reported(inode.state, self._table.descriptor(inode))

    def _find(self, handle: bytes) -> Inode | None:
        """Return the inode with this handle, if the kernel knows it."""
        key = self._keys.get(handle)
        if key is None:
            try:
                descriptor = syscalls.open_handle(self._table.root, handle, _PATH_FLAGS)
            except OSError:  # it is gone
                return None
            try:
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if len(self._keys) >= _REMEMBERED_HANDLES:
                self._keys.clear()
            key = self._keys[handle] = (status.st_dev, status.st_ino)
        return self._table.find(key)

    def _tell_again(self) -> None:
        if self._repeat_names:
            self._kernel.forget_names()
        for nodeid in self._repeat:
            self._kernel.forget_attributes(nodeid)
        self._repeat.clear()
        self._repeat_names = False
        self._repeat_at = float("inf")

    def close(self) -> None:
        """Watch no longer."""
        self._events.close()
