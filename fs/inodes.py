"""The inodes that the kernel knows: node id -> lower file, reached by an O_PATH descriptor.

An inode is never reached by its path again, so renames underneath the mount do not confuse it, and while its
descriptor is open its number cannot be recycled. Where that is not sure, handles tell files apart: a FUSE
file system may show several others, with their numbers. Descriptors are limited: beyond a quota the oldest
are closed, if the file can be opened again by its handle (root only); files that are open or unlinked keep
theirs. Node ids are the lower inode numbers on the root's device and numbers of our own elsewhere.

The table itself is native (backends/native/reader_nodes.h): most files are looked up, asked for and forgotten
below Python, 12 us a name where it took 25. Threading: the event loop's thread only; worker threads get
descriptors, never inodes.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator

import pyfuse3
import trio

from tmem.backends import _native
from tmem.fs import syscalls
from tmem.fs.coherence import FileState
from tmem.fs.fanotify import is_local
from tmem.fs.identity import handle_of
from tmem.fs.state import SavedInode, SavedInodes

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_AT_A_TIME = 64
"""Descriptors that are closed at once at most: fewer where few may be open."""


class Inode(_native.Node):
    """One lower file that the kernel holds lookups of, as Python sees it: made once it is asked for.

    What the native table knows of it are attributes, which follow it; here is what only Python needs.
    """

    __slots__ = ("backing", "declined", "reads", "state")

    def __init__(self) -> None:
        self.declined = False
        """Whether its opens are passed through; decided when the first one is opened."""
        self.backing = 0
        """The kernel's number of its backing file, if it is passed through while it is open (`backing`)."""
        self.state: FileState | None = None
        """Coherence of its pages, from its first open on."""
        self.reads: trio.CapacityLimiter | None = None
        """What bounds the worker threads that read it, once there was one."""


def proc_path(descriptor: int) -> str:
    """Return a path that leads to what `descriptor` is open on, also for O_PATH and unlinked files."""
    return f"/proc/self/fd/{descriptor}"


def look_at(directory: int, name: bytes) -> tuple[os.stat_result, int]:
    """Return the status of a file in the directory open at `directory`, and an O_PATH descriptor of it."""
    descriptor = os.open(name, _PATH_FLAGS, dir_fd=directory)
    try:
        return os.fstat(descriptor), descriptor
    except BaseException:
        os.close(descriptor)
        raise


class InodeTable:
    """All inodes that the kernel knows, by node id and by lower identity.

    Closes `root` (O_RDONLY, not O_PATH) and every descriptor in `close`. `quota` bounds the O_PATH
    descriptors; `clock` is a monotonic one in seconds; `numbers_tell` says whether open files on the root's
    device have inode numbers of their own, None finds out.
    """

    def __init__(
        self,
        root: int,
        quota: int,
        clock: Callable[[], float] = time.monotonic,
        numbers_tell: bool | None = None,
    ) -> None:
        self._clock = clock
        self._root = root
        self.device = os.fstat(root).st_dev
        quota = max(quota, 16)
        self._by_handle = _can_open_handles(root)
        self._is_fuse = syscalls.file_system_type(root) == syscalls.FUSE_MAGIC
        numbers_tell = is_local(root) if numbers_tell is None else numbers_tell
        self.nodes = _native.Nodes(root, Inode, numbers_tell, self._is_fuse)
        """The native table, which also threads of the native reader ask."""
        self.opens = _native.Opens()
        """For the native reader: files that it may open by itself (`grants`)."""
        self.nodes.bound(quota, max(min(quota // _MOST_AT_A_TIME, _MOST_AT_A_TIME), 1), self._by_handle)

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, nodeid: int) -> Inode:
        """Return the inode with `nodeid`. FUSEError(ESTALE) if the kernel made it up."""
        inode = self.nodes.get(nodeid)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return inode

    @property
    def root(self) -> int:
        """The descriptor of the root directory (O_RDONLY)."""
        return self._root

    @property
    def opens_handles(self) -> bool:
        """Whether files on the root's device can be opened by their handles."""
        return self._by_handle

    @property
    def open_descriptors(self) -> int:
        """How many O_PATH descriptors are open."""
        return self.nodes.open

    def known(self, status: os.stat_result, descriptor: int) -> Inode | None:
        """Return the inode of the file open at `descriptor` and described by `status`, if it is known."""
        return self.nodes.known(status.st_dev, status.st_ino, descriptor)

    def find(self, key: tuple[int, int]) -> Inode | None:
        """Return the inode of the lower file with these st_dev and st_ino, if the kernel knows it."""
        return self.nodes.find(*key)

    def knows_for(self, inode: Inode) -> float:
        """Return for how many seconds the kernel has known the inode; for long if other code was told."""
        return self._clock() - inode.known_since

    def all(self) -> list[Inode]:
        """Return every inode that the kernel knows; first those that are open, the oldest first."""
        return self.nodes.all()

    def descriptor(self, inode: Inode) -> int:
        """Return an O_PATH descriptor of the inode, opened again by handle if need be. OSError(ESTALE)."""
        return self.nodes.descriptor(inode)

    @contextlib.contextmanager
    def kept(self, inode: Inode) -> Iterator[int]:
        """Give a descriptor that stays open while another inode's is opened, which may close old ones."""
        descriptor = os.dup(self.descriptor(inode))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def path(self, inode: Inode) -> str:
        """Return a path to the inode for calls that take no descriptor."""
        return proc_path(self.descriptor(inode))

    def handle(self, inode: Inode) -> bytes | None:
        """Return the inode's file handle, if its file system has handles."""
        return self.nodes.handle(inode)

    def handle_at(self, key: tuple[int, int], descriptor: int) -> bytes | None:
        """Return the handle of an open file with these st_dev and st_ino, if its file system has handles.

        Those of FUSE tell files apart although nobody can open by them. (On overlayfs such ones change.)
        """
        handle = handle_of(descriptor)
        if handle is None and self._is_fuse and key[0] == self.device:
            handle = handle_of(descriptor, to_open=False)
        return handle

    def lookup(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """Find `name` in `parent`; the caller must count the lookup with `remember`, or `drop` the inode."""
        return self.lookup_at(self.descriptor(parent), name)

    def lookup_at(self, directory: int, name: bytes) -> tuple[Inode, os.stat_result]:
        """The same in the directory open at `directory`."""
        status, descriptor = look_at(directory, name)
        return self.meet(status, descriptor), status

    def meet(self, status: os.stat_result, descriptor: int) -> Inode:
        """Return the inode of the file that `status` describes, made if need be; owns its O_PATH descriptor.

        The caller must do as after `lookup`.
        """
        kind = stat.S_IFMT(status.st_mode)
        return self.nodes.meet(status.st_dev, status.st_ino, kind, descriptor, self._clock())

    def remember(self, inode: Inode) -> None:
        """Count one lookup that the kernel will forget one day."""
        self.nodes.remember(inode)

    def forget(self, nodeid: int, count: int) -> Inode | None:
        """Take `count` lookups back. Return the inode if those were the last, to be dropped (`drop`).

        One that nobody here has asked for is gone then.
        """
        return self.nodes.take_back(nodeid, count)

    def drop(self, inode: Inode) -> None:
        """Remove an inode that the kernel holds no lookup of; others stay."""
        if inode.lookups <= 0:
            self.opens.forget(inode.nodeid)
        self.nodes.drop(inode)

    def store_to(self, inode: Inode, stored_to: bool) -> None:
        """Note whether programs may write to a file without our knowledge, also after its last close."""
        self.nodes.store_to(inode, stored_to)

    def close(self) -> None:
        """Close every descriptor."""
        self.nodes.close()

    def saved(self, used: Iterable[Inode]) -> tuple[SavedInodes, dict[Inode, int]]:
        """Return the table for `restore`, and where each inode stands in it.

        `used` are inodes that are needed although the kernel may have forgotten them.
        """
        ordered = dict.fromkeys([*self.all(), *used])
        places = {inode: place for place, inode in enumerate(ordered)}
        next_foreign, last_generation = self.nodes.counters()
        saved = SavedInodes(
            root=self._root,
            next_foreign=next_foreign,
            last_generation=last_generation,
            nodes=[_saved_inode(inode) for inode in ordered],
        )
        return saved, places

    def restore(self, saved: SavedInodes) -> list[Inode]:
        """Fill the new table, made with the same root; return the inodes in their order."""
        self.nodes.go_on(saved["next_foreign"], saved["last_generation"])
        inodes = []
        for row in saved["nodes"]:
            nodeid, device, number, kind, descriptor, lookups, handle, by_id, by_key, state, generation = row[
                :11
            ]
            backing, stored_to = row[11:]
            numbers = (nodeid, device, number, kind, descriptor, lookups, generation)
            inode = self.nodes.restore(*numbers, handle, by_id, by_key, stored_to)
            inode.state = FileState.restored(state) if state else None
            if by_id and inode.state is not None:
                self.opens.know(nodeid, device, number, None)
            inode.backing = backing
            inodes.append(inode)
        return inodes


def _saved_inode(inode: Inode) -> SavedInode:
    return (
        inode.nodeid,
        *inode.key,
        inode.kind,
        inode.descriptor,
        inode.lookups,
        inode.handle,
        inode.by_id,
        inode.by_key,
        inode.state.saved() if inode.state else None,
        inode.generation,
        inode.backing,
        inode.stored_to,
    )


def _can_open_handles(root: int) -> bool:
    """Say whether files can be opened by handle: the file system must know how, and we be allowed to."""
    handle = handle_of(root)
    if handle is None:
        return False
    try:
        os.close(syscalls.open_handle(root, handle, _PATH_FLAGS))
    except OSError:
        return False
    return True
