"""Have changes made underneath the mount show at once, where the kernel reports them (`fanotify`).

For each report that concerns a file which the kernel knows through the mount:

- changed content: the file's pages are dropped, bytes that were read before are not put, and its attributes
  are asked for again;
- changed attributes, links or place: its attributes are asked for again;
- changed entries of a directory: its attributes, and all names (`kernel`);
- reports were lost, or do not say what they are about: all of this for all files.

The mount's own changes are reported too, under the daemon's own process id, and left out: `coherence`
brackets them, and the kernel has made them itself. A read calls `catch_up` before it asks the pool, so it
never returns bytes from before a change that was over when it began. So does an own change before it begins,
that what was over by then is not taken for something beside it. What the kernel answers by itself
(names, attributes, cached pages) follows when the event loop has read the report.

The stamps of a write come before its bytes, and these before its report. If the kernel asks for attributes in
between and reads after that, it has old bytes and the new time of modification, by which it would keep them.
So of an open file of which it was told that time already it is told another one (`Nodes.has_old`), once. A
close of who had it open for writing may mean no more than that, and so may those reports that were waiting or
being applied when the kernel was told: then no program shall see that time, but a second later, if the file
is open still and nothing else has made the kernel ask.

A file that the kernel has only just been told of is left alone for a moment. The kernel enters one without
any rights, and takes the attributes of the reply only if no notice came in between; if another one overtakes
those that it asks for instead, a user is refused (EACCES) what everybody may. Of first uses of directories
4 % were with notices all the time, 3 of 4,000 with 300 notices for each change beside them (Linux 6.18).

Threading: the event loop's thread.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable

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

REPEATS_OF_OLD = 3
"""As often, if the kernel may have old pages: it ignores a reply to what it asked before it was told, which
may be the one that would have had it drop them."""

TAKEN_IN_SECONDS = 0.02
"""After this, a reply that introduces a file has been taken in, if its process got a CPU."""

_REMEMBERED_HANDLES = 10_000
_GONE = (errno.ESTALE, errno.ENOENT)
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _Later:
    """Has `do` take what was added, `seconds` after the first of it was."""

    def __init__(self, seconds: float, do: Callable[[Iterable[Inode | None]], None]) -> None:
        self._seconds = seconds
        self._do = do
        self._waiting: dict[Inode | None, None] = {}
        self._some = trio.Event()

    def add(self, inode: Inode | None) -> None:
        self._waiting[inode] = None
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            await trio.sleep(self._seconds)
            self.do_now()

    def do_now(self) -> None:
        waiting, self._waiting = self._waiting, {}
        some, self._some = self._some, trio.Event()
        some.set()  # `run` waits for this one if nothing was added
        self._do(waiting)


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
        self._held_back = _Later(TAKEN_IN_SECONDS, self._tell_all)
        self._repeated = _Later(REPEAT_SECONDS, self._tell_all_again)  # None stands for names
        table.nodes.reported_by(events.descriptor)
        # The kernel may have old pages of these, and not have heard so; since when, or when it was told again
        # (monotonic), and how often it will be.
        self._with_old: dict[Inode, tuple[float, int]] = {}

    @property
    def descriptor(self) -> int:
        """The descriptor that is readable while there are reports."""
        return self._events.descriptor

    async def run(self) -> None:
        """Apply changes as they come, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._held_back.run)
            nursery.start_soon(self._repeated.run)
            while True:
                await trio.lowlevel.wait_readable(self._events.descriptor)
                self.catch_up()
                await trio.sleep(PAUSE_SECONDS)

    def catch_up(self) -> None:
        """Apply every change that was over when this was called."""
        self._table.nodes.catches_up(True)
        try:
            self._catch_up()
        finally:
            self._table.nodes.catches_up(False)

    def _catch_up(self) -> None:
        names = lost = False
        for event in self._events.read():
            if event.pid == self._pid:
                continue
            if event.mask & fanotify.OVERFLOW or not event.handle:  # the kernel had no memory for that
                lost = True
                continue
            try:
                names |= self._apply(event)
            except OSError:  # nor have we, or no descriptor is left: whatever the report was about
                lost = True
        if lost:
            self._suspect_all()
        if names or lost:
            self._kernel.forget_names()
            self._repeated.add(None)

    def _apply(self, event: Event) -> bool:
        """Apply one report; True if names have changed. OSError if it cannot be told what it is about."""
        inode = self._find(event.handle)
        if inode is None:
            return False
        self._counters.noticed_changes += 1
        if event.mask & (fanotify.MODIFY | fanotify.CLOSE_WRITE):
            self._content(inode, bool(event.mask & fanotify.MODIFY))
        self._tell(inode)
        return bool(event.mask & fanotify.NAMES)

    def _suspect_all(self) -> None:
        self._counters.lost_reports += 1
        for inode in self._table.all():
            self._content(inode, certain=False)
            self._tell(inode)

    def _tell(self, inode: Inode) -> None:
        """Have the kernel ask for the attributes again, now or in a moment, and once more later."""
        if self._table.knows_for(inode) < TAKEN_IN_SECONDS:
            self._held_back.add(inode)
        else:
            self._kernel.forget_attributes(inode.nodeid)
        self._repeated.add(inode)

    def _tell_all(self, inodes: Iterable[Inode | None]) -> None:
        for inode in inodes:
            if inode is None:
                self._kernel.forget_names()
            elif self._table.find(inode.key) is inode:  # else its number may be another's
                if inode in self._with_old:
                    self._drop_old(inode, certain=False)
                self._kernel.forget_attributes(inode.nodeid)
            else:
                self._with_old.pop(inode, None)

    def _tell_all_again(self, inodes: Iterable[Inode | None]) -> None:
        now = time.monotonic()
        for inode in inodes:
            known = self._with_old.pop(inode, None) if inode is not None else None
            if inode is None or known is None:
                continue
            since, repeats = known
            if since > now - REPEAT_SECONDS:  # what was added first decides when
                self._with_old[inode] = known
                self._repeated.add(inode)
            elif not inode.opens:
                self._drop_old(inode, certain=False)
            else:
                self._drop_old_still(inode)
                if repeats > 1:
                    self._with_old[inode] = (now, repeats - 1)
                    self._repeated.add(inode)
        self._tell_all(inodes)

    def tell_the_rest(self) -> None:
        """Tell now what is held back: other code will go on (`restart`)."""
        self._held_back.do_now()

    def _content(self, inode: Inode, certain: bool) -> None:
        """Drop what there is of a file whose bytes have changed, or may have."""
        if inode.state is not None:
            with contextlib.suppress(OSError):  # it is gone: nobody can read it
                self._coherence.reported(inode.state, self._table.descriptor(inode))
                # Of what it passes through the kernel keeps nothing, and there own writes are reported, too.
                if inode.opens and not inode.backing and self._drop_old(inode, certain):
                    self._with_old[inode] = (time.monotonic(), REPEATS_OF_OLD)

    def _drop_old(self, inode: Inode, certain: bool) -> bool:
        """Have the kernel drop its pages with the next reply that has attributes, if it may not otherwise."""
        try:
            status = os.fstat(self._table.descriptor(inode))
        except OSError:  # it is gone
            return False
        return self._table.nodes.has_old(inode, status.st_mtime_ns, certain)

    def _drop_old_still(self, inode: Inode) -> None:
        """The same once more. Who has it mapped has it open, and may ask for nothing that no program sees."""
        with contextlib.suppress(OSError):  # it is gone
            status = os.fstat(self._table.descriptor(inode))
            self._table.nodes.still_has_old(inode, status.st_mtime_ns)

    def _find(self, handle: bytes) -> Inode | None:
        """Return the inode with this handle, if the kernel knows it. OSError if that cannot be told."""
        key = self._keys.get(handle)
        if key is None:
            try:
                descriptor = syscalls.open_handle(self._table.root, handle, _PATH_FLAGS)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                return None
            try:
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if len(self._keys) >= _REMEMBERED_HANDLES:
                self._keys.clear()
            key = self._keys[handle] = (status.st_dev, status.st_ino)
        return self._table.find(key)

    def close(self) -> None:
        """Watch no longer."""
        self._table.nodes.reported_by(-1)
        self._events.close()
