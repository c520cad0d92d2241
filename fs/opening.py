"""Opening, creating and closing files, and handing open ones over to new code.

Each open checks whether the file's pages still show it, decides (at the first one) whether the file is
cached at all, and says how the kernel is to cache it. Not for what is done with open files (`files`).
Threading: the event loop's thread.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import lower
from tmem.fs.acting import Caller, acting_as, drop_set_ids
from tmem.fs.base import errors
from tmem.fs.grants import Grants
from tmem.fs.inodes import Inode, proc_path
from tmem.fs.namespace import Namespace
from tmem.fs.openfile import OpenFile
from tmem.fs.policy import DEFAULT, Policy
from tmem.fs.precache import ignore_pool
from tmem.fs.reading import Reading
from tmem.fs.rules import EVERYTHING, path_below
from tmem.fs.state import SavedFile
from tmem.fs.worth import Account, Worth
from tmem.fs.writers import is_quiet

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, FileInfo, RequestContext

KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_TRUNC | os.O_NOATIME
"""What of an open's flags the lower is opened with."""
_MOST_LOOKS = 3
"""At a file that changes of ours overtake each time; then the event loop's thread asks what it is."""


@dataclass(frozen=True)
class Begun:
    """An inode that a thread opens."""

    inode: Inode
    turn: tuple[int, int]
    """Of its state, from before."""


class Opening(Namespace):
    """Handlers that open and close files.

    `cached` says whether the kernel caches a file with this status, opened to append or not (else direct_io);
    `most_cached` says the same by size, for all files from one byte on (None: it cannot be said so), `clock`
    is a monotonic clock in seconds.
    """

    def __init__(
        self,
        *arguments: object,
        cached: Callable[[os.stat_result, bool], bool],
        most_cached: Callable[[], int] | None = None,
        policy: Policy = DEFAULT,
        clock: Callable[[], float] = time.monotonic,
        **keywords: object,
    ) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._cached = cached
        self._most_cached = most_cached
        self._grants = Grants(self.table, self._fine_stamps, clock)
        self._policy = policy
        self._worth = Worth(self._account, clock)
        self._no_atimes = bool(os.fstatvfs(self.table.root).f_flag & (os.ST_NOATIME | os.ST_RDONLY))
        self._files: dict[int, OpenFile] = {}

    async def open(self, inode: int, flags: int, ctx: "RequestContext") -> "FileInfo":
        """Open a file, and check whether its pages still show it."""
        with errors():
            if flags & os.O_TRUNC:
                return await self._open_truncated(self.table[inode], flags, Caller.of(ctx))
            if self.waits_to_open(inode):
                return await self.open_elsewhere(inode, flags, Caller.of(ctx))
            return self.open_file(inode, flags, Caller.of(ctx))

    def waits_to_open(self, inode: int) -> bool:
        """Say whether to open a file may take longer than others can wait: then use `open_elsewhere`."""
        return not self.is_here(self.table[inode])

    def begin_open(self, inode: int) -> Begun:
        """Begin to open a file for reading in a thread of the caller's."""
        return Begun(node := self.table[inode], _turn(node))

    def has_opened(self, begun: Begun) -> bool:
        """Say whether nothing has happened meanwhile: `end_open` ends it; else `look_again` comes first."""
        return self._is_known(begun) and not _is_overtaken(begun)

    def end_open(
        self, begun: Begun, descriptor: int, status: os.stat_result | None, flags: int, caller: Caller
    ) -> "FileInfo":
        """End what was begun, with what was opened. OSError, TmemError, FUSEError."""
        return self._opened(begun.inode, descriptor, flags, caller, status)

    async def look_again(
        self, begun: Begun, descriptor: int, status: os.stat_result
    ) -> os.stat_result | None:
        """Return what the file is that was opened and looked at in a thread, of which `begun` is from before.

        None if there is always a change of ours beside it. OSError, also if the kernel has forgotten the
        inode: then it is closed.
        """
        for _ in range(_MOST_LOOKS):
            if not self._is_known(begun):
                await self.close_elsewhere(descriptor)
                raise OSError(errno.ESTALE, "forgotten, for its request was given up")
            if not _is_overtaken(begun):
                return status
            begun = Begun(begun.inode, _turn(begun.inode))
            try:
                status = await self.in_thread(os.fstat, descriptor)
            except OSError:
                await self.close_elsewhere(descriptor)
                raise
        return None

    def _is_known(self, begun: Begun) -> bool:
        return self.table.nodes.get(begun.inode.nodeid) is begun.inode

    async def open_elsewhere(self, inode: int, flags: int, caller: Caller) -> "FileInfo":
        """Open a file, without O_TRUNC, in a thread. OSError, TmemError, FUSEError."""
        node = self.table[inode]
        unchanged: bool | None = None
        with self.table.kept(node) as beside:
            if flags & os.O_ACCMODE != os.O_RDONLY:  # as in `open_file`
                with contextlib.suppress(PermissionError):
                    unchanged = await self._validate_elsewhere(node, beside)
            descriptor, status = await self._open_kept(node, beside, flags)
        return self._opened(node, descriptor, flags, caller, status, unchanged)

    async def _validate_elsewhere(self, node: Inode, beside: int) -> bool:
        """Check by a descriptor of our own whether the file's pages still show it. OSError."""
        descriptor, status = await self._open_kept(node, beside, os.O_RDONLY)
        try:
            return self._validate(node, descriptor, status)
        finally:
            await self.close_elsewhere(descriptor)

    async def _open_kept(self, inode: Inode, beside: int, flags: int) -> tuple[int, os.stat_result | None]:
        """Open an inode by a descriptor of ours in a thread, and look at it: as `look_again`."""
        begun = Begun(inode, _turn(inode))
        descriptor, status = await self.in_thread(_open_and_look, proc_path(beside), flags)
        return descriptor, await self.look_again(begun, descriptor, status)

    def open_file(self, inode: int, flags: int, caller: Caller) -> "FileInfo":
        """Open a file that is here, without O_TRUNC. OSError, TmemError."""
        node = self.table[inode]
        unchanged: bool | None = None
        if flags & os.O_ACCMODE != os.O_RDONLY:
            # First with a descriptor that only reads: one of our own that writes hides other writers.
            with contextlib.suppress(PermissionError):
                descriptor = self._open_now(node, os.O_RDONLY)
                try:
                    unchanged = self._validate(node, descriptor, os.fstat(descriptor))
                finally:
                    os.close(descriptor)
        info = self._opened(node, self._open_now(node, flags), flags, caller, None, unchanged)
        if self.reading is not None and self._grants.due:
            self._grant()
        return info

    def _open_now(self, inode: Inode, flags: int) -> int:
        """Open an inode on this thread. OSError."""
        return os.open(self.table.path(inode), (flags & KEPT_FLAGS) | os.O_CLOEXEC)

    def _grant(self) -> None:
        """Have opens answered below Python for a while, if they are to be answered in the usual way."""
        if self._most_cached is None or not self.coherence.takes_below or self._policy.rules != EVERYTHING:
            return
        aside = self._policy.steps_aside and self._worth.aside()
        if not aside and self.precache.pool() is not None:
            self._grants.give(self._most_cached(), self._no_atimes)

    def _validate(self, inode: Inode, descriptor: int, status: os.stat_result | None) -> bool:
        """Check with `descriptor` whether the file's pages still show it."""
        return self.coherence.validate(self.state_of(inode), status or os.fstat(descriptor), descriptor)

    async def _open_truncated(self, inode: Inode, flags: int, caller: Caller | None = None) -> "FileInfo":
        # Opened without O_TRUNC first: the change needs a descriptor before it happens.
        if self.waits_to_open(inode.nodeid):
            with self.table.kept(inode) as beside:
                descriptor, _ = await self._open_kept(inode, beside, flags & ~os.O_TRUNC)
        else:
            descriptor = self._open_now(inode, flags & ~os.O_TRUNC)
        try:
            here = self.is_here(inode)
            with self.change_of(self.state_of(inode), descriptor, here) as change:
                change.flush(0, None)

                def work() -> tuple[bool, os.stat_result | None]:
                    with change.seen(descriptor):
                        before = os.fstat(descriptor)
                        os.truncate(proc_path(descriptor), 0)  # by its path: it may be open for reading only
                        lost = drop_set_ids(descriptor, before, caller)
                        return lost, None if here else os.fstat(descriptor)

                try:
                    lost, status = await self.change_in_thread(work)
                    self.tell_lost(inode, lost)
                finally:
                    change.flush(0, None)
                    self.rewrites += 1
        except BaseException:
            os.close(descriptor)
            raise
        return self._opened(inode, descriptor, flags, caller, status)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: "RequestContext"
    ) -> tuple["FileInfo", "EntryAttributes"]:
        """Create a file and open it."""
        with errors():
            parent = self.table[parent_inode]
            if self.acts_here(parent):
                made = _make(self.table.descriptor(parent), name, mode, flags, ctx)
            else:
                with self.table.kept(parent) as directory:
                    made = await self.name_in_thread(_make, directory, name, mode, flags, ctx)
            descriptor, beside, status = made
            node = self.table.meet(status, beside)
            self.table.remember(node)
            try:
                info = self._opened(node, descriptor, flags, Caller.of(ctx), status)
            except BaseException:
                self.take_back(node.nodeid, 1)
                raise
            return info, self.attributes(node, status)

    def _opened(
        self,
        inode: Inode,
        descriptor: int,
        flags: int,
        caller: Caller | None,
        status: os.stat_result | None = None,
        unchanged: bool | None = None,
    ) -> "FileInfo":
        """Register an open file; `status` is its, if it was just taken.

        `unchanged` is what its validation said, None if there was none yet.
        """
        number = self.table.opens.number()
        try:
            self.precache.pool()  # senses a segment that has appeared
            state = self.state_of(inode)
            if status is None:
                status = os.fstat(descriptor)
            cached = self._cached(status, bool(flags & os.O_APPEND))
            if unchanged is None:
                unchanged = self.coherence.validate(state, status, descriptor)
            if (
                not inode.opens
            ):  # all opens of a file agree, as the kernel wants it for those it passes through
                inode.declined = self._declines(status, descriptor)
                inode.backing = self._back(inode, status) if inode.declined else 0
            if inode.backing:
                self._let_pass(inode, number, flags)
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            file = OpenFile(
                inode, state, descriptor, writable, bool(flags & os.O_APPEND), number=number, caller=caller
            )
            file.accessed = self._no_atimes or bool(flags & os.O_NOATIME) or lower.was_accessed(status)
            if inode.declined:
                self.table.opens.know(inode.nodeid, *inode.key, None)
            elif self.reading is not None:
                self._read_natively(self.reading, file)
        except BaseException:
            if inode.backing and not inode.opens:
                self._unback(inode, descriptor)
            if self.reading is not None:
                self.reading.close(number)
            os.close(descriptor)
            raise
        self.precache.counters.declined_opens += inode.declined
        self._files[number] = file
        inode.opens += 1
        keep = cached and unchanged and not state.untold
        if not keep and (cached or (inode.opens > 1 and not unchanged)):
            # An old size must not cut reads, nor those of somebody who has it open and cached.
            self.kernel.forget_attributes(inode.nodeid)
        if not keep:
            state.told(dropped=True)
        return pyfuse3.FileInfo(fh=number, direct_io=not cached, keep_cache=keep)

    def unheard(self, fh: int) -> None:
        """Note that nobody has heard what an open was told: its program was killed."""
        if (file := self._files.get(fh)) is not None:
            file.state.told(dropped=False)

    def _read_natively(self, reading: Reading, file: OpenFile) -> None:
        """Have hits of an open file answered below Python."""
        inode = file.inode
        self.coherence.admit(file.state)
        reading.open(file.number, file.descriptor, file.state, self.is_here(inode))
        if self.coherence.takes_below:
            self.table.opens.know(inode.nodeid, *inode.key, file.state.gate)
        if not file.accessed:
            reading.reader.note(file.number)  # so that the first read comes here, and is noted

    def _declines(self, status: os.stat_result, descriptor: int) -> bool:
        """Say whether a file that is opened now is to be passed through."""
        if self._policy.steps_aside and self._worth.aside():
            return True
        return self._policy.rules.decline(status.st_size, lambda: path_below(self.table.root, descriptor))

    def _back(self, inode: Inode, status: os.stat_result) -> int:
        """Return a new backing file for a file that nobody has open through the mount; 0: none."""
        if self.reading is None or self.reading.backing is None:
            return 0
        return self.reading.backing.open(self.table.path(inode), status)

    def _let_pass(self, inode: Inode, number: int, flags: int) -> None:
        """Have the kernel read and write an open file by itself, which it is told in the reply."""
        if self.reading is None:  # lost by a restart; the kernel refuses an open that differs from the others
            raise OSError(errno.EIO, "open elsewhere past the daemon, which cannot say so any more")
        if flags & os.O_DIRECT:  # the kernel would make EIO of what the lower says to that
            os.close(os.open(self.table.path(inode), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
        self.reading.reader.pass_through(number, inode.backing)
        self.precache.counters.backed_opens += 1
        if flags & os.O_ACCMODE != os.O_RDONLY and not inode.stored_to:
            # A store to a mapped page changes times, and the kernel does not notice.
            self.table.store_to(inode, True)
            self.kernel.forget_attributes(inode.nodeid)

    def _unback(self, inode: Inode, descriptor: int) -> None:
        """Give a file's backing file back after its last close."""
        if self.reading is not None and self.reading.backing is not None:
            self.reading.backing.close(inode.backing)
        inode.backing = 0
        # A mapping lives longer than the open file that it was made from.
        self.table.store_to(inode, inode.stored_to and is_quiet(descriptor) is not True)

    def _account(self) -> Account:
        """Tell how caching stands."""
        self.count_native_hits()
        counters = self.precache.counters
        evicted, stored = self.precache.turnover()
        return Account(
            hit_pages=counters.hit_pages,
            ahead_pages=counters.ahead_pages,
            miss_reads=counters.miss_reads,
            lower_pages=counters.miss_pages + counters.ahead_pages,
            lower_ns=counters.lower_ns,
            put_ns=counters.put_ns,
            gone_pages=evicted + counters.refused_pages,
            stored_pages=stored,
        )

    async def release(self, fh: int) -> None:
        """Close; a file without a name loses its pages with its last close."""
        if self.is_used(fh):
            await self.wait_unused(fh)
        with errors():
            if self.waits_to_close(fh):
                descriptor = self._end_use(fh)
                if descriptor is not None:
                    await self.close_elsewhere(descriptor)
            else:
                self.close_file(fh)

    def waits_to_close(self, fh: int) -> bool:
        """Say whether to close a file may take longer than others can wait: then use `release`."""
        return not self.is_here(self._files[fh].inode)

    def is_used(self, fh: int) -> bool:
        """Say whether a file that is to be closed is in use still, and `wait_unused` must come first."""
        file = self._files[fh]
        return bool(file.uses or (file.ahead is not None and file.ahead.running))

    async def wait_unused(self, fh: int) -> None:
        """Come back when nobody uses the descriptor of a file that is to be closed.

        It is in use after its last close only for a program that was killed: its request was given up. A
        thread would read another file by this number, and put that.
        """
        file = self._files[fh]
        with self._waiting():
            while self.is_used(fh):
                if file.ahead is not None and file.ahead.running:
                    await file.ahead.close()
                else:
                    await file.wait_unused()  # who goes on may begin to read ahead

    def close_file(self, fh: int) -> None:
        """Close a file that is not in use. OSError, TmemError."""
        descriptor = self._end_use(fh)
        if descriptor is not None:
            os.close(descriptor)

    def _end_use(self, fh: int) -> int | None:
        """Forget an open file that is not in use; its descriptor, unless another closes it. TmemError."""
        file = self._files.pop(fh)
        file.inode.opens -= 1
        try:
            if not file.inode.opens:
                if file.inode.backing:
                    self._unback(file.inode, file.descriptor)
                if self.is_here(file.inode):
                    self.discard_if_unlinked(file.descriptor)
                elif file.state.gone:  # not asked of a lower that may not answer: as in `_retire`
                    self.coherence.discard(file.state.name, file.state)
        except BaseException:
            if not self._closes_later(fh):
                os.close(file.descriptor)
            raise
        return None if self._closes_later(fh) else file.descriptor

    def _closes_later(self, fh: int) -> bool:
        """Have a file served natively no more; True if its descriptor is closed there."""
        return self.reading is not None and self.reading.close(fh)

    def read_by(self, reading: Reading | None) -> None:
        """Have hits answered by a native reader from now on, or not any more."""
        self.count_native_hits()
        self.reading = reading
        self.precache.on_pool = reading.use_pool if reading is not None else ignore_pool
        if reading is not None:
            self.table.nodes.believe(*self.lifetimes.rule())
            reading.reader.set_nodes(self.table.nodes, self._is_local)
            reading.open_with(self.table.opens, lambda: self._grants.learn(self._files))
            reading.use_pool(self.precache.current)
            for file in self._files.values():
                if not file.inode.declined:
                    self._read_natively(reading, file)

    def count_native_hits(self) -> None:
        """Bring the counters up to date with what the native reader has done."""
        if self.reading is not None:
            self.reading.count(self.precache.counters)

    def used_by_files(self) -> list[Inode]:
        """Return the inodes of open files."""
        return [file.inode for file in self._files.values()]

    def saved_files(self, places: dict[Inode, int]) -> tuple[list[SavedFile], int]:
        """Return the open files, with their inodes as `places`, and the next handle."""
        files = [
            (number, places[file.inode], file.descriptor, file.writable, file.append, file.inode.declined)
            for number, file in self._files.items()
        ]
        return files, self.table.opens.number()

    def restore_files(self, saved: list[SavedFile], next_file: int, inodes: list[Inode]) -> None:
        """Have the files open that were saved."""
        self.table.opens.number_from(next_file)
        for number, place, descriptor, writable, append, declined in saved:
            inode = inodes[place]
            inode.declined = declined
            assert inode.state is not None
            self._files[number] = OpenFile(inode, inode.state, descriptor, writable, append, number=number)
            inode.opens += 1

    def close_files(self) -> None:
        """Close what is still open at the end of the mount."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)


def _turn(inode: Inode) -> tuple[int, int]:
    return inode.state.turn if inode.state is not None else (0, 0)


def _is_overtaken(begun: Begun) -> bool:
    """Say whether an own change of the file has begun or ended meanwhile.

    While one is under way `validate` judges nothing by a status; to ask anew might wait for that change.
    """
    state = begun.inode.state
    return state is not None and not state.changes and (begun.turn[1] > 0 or state.turn != begun.turn)


def _open_and_look(path: str, flags: int) -> tuple[int, os.stat_result]:
    """Open a file; return the descriptor and the file's status. OSError."""
    descriptor = os.open(path, (flags & KEPT_FLAGS) | os.O_CLOEXEC)
    try:
        return descriptor, os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _make(
    directory: int, name: bytes, mode: int, flags: int, ctx: "RequestContext"
) -> tuple[int, int, os.stat_result]:
    """Return a descriptor of a new file, an O_PATH one, and its status.

    OSError(ESTALE) if the name has come into being underneath: then the kernel looks it up and opens what it
    finds. It must check whether the caller may, and to open a pipe may take as long as nobody opens its other
    end.
    """
    wanted = (flags & KEPT_FLAGS & ~os.O_TRUNC) | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with acting_as(ctx):
            descriptor = os.open(name, wanted, stat.S_IMODE(mode), dir_fd=directory)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        raise OSError(errno.ESTALE, "made underneath") from None
    try:
        status = os.fstat(descriptor)
        # Not by its name, which may be another file's by now.
        return descriptor, os.open(proc_path(descriptor), os.O_PATH | os.O_CLOEXEC), status
    except BaseException:
        os.close(descriptor)
        raise
