"""The inodes that the kernel knows: node id -> lower file, reached by an O_PATH descriptor.

An inode is never reached by its path again, so renames underneath the mount do not confuse it, and while its
descriptor is open its number cannot be recycled. Where that is not sure, handles tell files apart: a FUSE
file system may show several others, with their numbers. Descriptors are limited: beyond a quota the oldest
are closed, if the file can be opened again by its handle (root only); files that are open or unlinked keep
theirs. Node ids are the lower inode numbers on the root's device and numbers of our own elsewhere. Threading:
the event loop's thread only; worker threads get descriptors, never inodes, and threads of the native reader
what `nodes` has.
"""

import contextlib
import errno
import math
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyfuse3

from tmem.fs import syscalls
from tmem.fs.coherence import FileState
from tmem.fs.fanotify import is_local
from tmem.fs.identity import Version, handle_of
from tmem.fs.state import SavedInode, SavedInodes

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_GENERATION = (1 << 32) - 1  # the kernel keeps 32 bits, and compares all
_TRIES = 64  # descriptors that are looked at to close some, so the cost stays bounded
_LOOKS = 3
_FOREIGN_IDS = 1 << 62  # node ids of files on other devices than the root's start here


@dataclass(eq=False, slots=True)
class Inode:
    """One lower file that the kernel holds lookups of."""

    nodeid: int
    key: tuple[int, int]
    """(st_dev, st_ino) of the lower file."""
    kind: int
    """S_IFMT bits of its mode."""
    descriptor: int
    """O_PATH, or -1 while closed to save descriptors; use `InodeTable.descriptor`."""
    lookups: int = 0
    generation: int = 0
    """Tells it from other files that have had its node id: handles of the mount's files hold both."""
    handle: bytes | None = None
    """Its file handle, once asked for."""
    opens: int = 0
    """Open handles of regular files."""
    known_since: float = -math.inf
    """When the kernel was first told of it, on the table's clock; long ago if other code did."""
    declined: bool = False
    """Whether these are passed through; decided when the first one is opened."""
    backing: int = 0
    """The kernel's number of its backing file, if it is passed through while it is open (`backing`)."""
    stored_to: bool = False
    """Whether programs may write to it through the mount without our knowledge, also after its last close;
    set by `InodeTable.store_to`."""
    listed: tuple[Version | None, float] = (None, 0.0)
    """Which version of a directory the kernel has a listing of, and until when to believe it (monotonic)."""
    state: FileState | None = field(default=None, repr=False)
    """Coherence of its pages, from its first open on."""


def proc_path(descriptor: int) -> str:
    """Return a path that leads to what `descriptor` is open on, also for O_PATH and unlinked files."""
    return f"/proc/self/fd/{descriptor}"


Found = tuple[tuple[int, int], int, int]
"""(st_dev, st_ino), S_IFMT bits and an O_PATH descriptor of a file that was looked up."""


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
        from tmem.backends import _native

        self._clock = clock
        self._handle_at = _native.handle
        status = os.fstat(root)
        self.device = status.st_dev
        self._root = root
        self._quota = max(quota, 16)
        self._batch = max(min(self._quota // _TRIES, _TRIES), 1)
        self._by_handle = _can_open_handles(root)
        self._open: OrderedDict[int, Inode] = OrderedDict()  # oldest first, by node id
        self._next_foreign = _FOREIGN_IDS
        self._last_generation = 0
        key = (status.st_dev, status.st_ino)
        node = Inode(pyfuse3.ROOT_INODE, key, stat.S_IFDIR, root, lookups=1)
        self._by_id: dict[int, Inode] = {node.nodeid: node}
        self._by_key: dict[tuple[int, int], Inode] = {key: node}
        self._numbers_tell = is_local(root) if numbers_tell is None else numbers_tell
        self._is_fuse = syscalls.file_system_type(root) == syscalls.FUSE_MAGIC
        self._beside: dict[tuple[tuple[int, int], bytes], Inode] = {}
        """With their handles, inodes whose lower identity was another's in `_by_key`; not if numbers tell."""
        self.nodes = _native.Nodes()
        """For threads of the native reader: open descriptors of files on the root's device, without the root
        and files whose attributes may not be believed; and for listings: what has been told of files."""
        self.opens = _native.Opens()
        """For the native reader: files that it may open by itself (`grants`)."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, nodeid: int) -> Inode:
        """Return the inode with `nodeid`. FUSEError(ESTALE) if the kernel made it up."""
        try:
            return self._by_id[nodeid]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

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
        return len(self._open)

    def known(self, status: os.stat_result, descriptor: int) -> Inode | None:
        """Return the inode of the file open at `descriptor` and described by `status`, if it is known."""
        return self._known_at((status.st_dev, status.st_ino), descriptor)

    def find(self, key: tuple[int, int]) -> Inode | None:
        """Return the inode of the lower file with these st_dev and st_ino, if the kernel knows it."""
        return self._by_key.get(key)

    def knows_for(self, inode: Inode) -> float:
        """Return for how many seconds the kernel has known the inode."""
        return self._clock() - inode.known_since

    def all(self) -> list[Inode]:
        """Return every inode that the kernel knows."""
        return list(self._by_id.values())

    def descriptor(self, inode: Inode) -> int:
        """Return an O_PATH descriptor of the inode, opened again by handle if need be. OSError(ESTALE)."""
        if inode.descriptor < 0:
            assert inode.handle is not None
            inode.descriptor = syscalls.open_handle(self._root, inode.handle, _PATH_FLAGS)
            self._keep(inode)
        return inode.descriptor

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
        if inode.handle is None:
            inode.handle = self.handle_at(inode.key, self.descriptor(inode))
        return inode.handle

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
        descriptor = os.open(name, _PATH_FLAGS, dir_fd=self.descriptor(parent))
        try:
            status = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        key = (status.st_dev, status.st_ino)
        return self._meet(key, stat.S_IFMT(status.st_mode), descriptor), status

    def meet(self, found: Found, opens: bool = True) -> Inode:
        """Return the inode of a file that was looked up, and count the lookup; owns its descriptor.

        Unless `opens`, an inode whose descriptor was closed is left so.
        """
        inode = self._meet(*found, opens=opens)
        inode.lookups += 1
        return inode

    def admit(self, found: Iterable[Found]) -> list[Inode]:
        """Return the inodes of files that were looked up, and count the lookups; owns their descriptors.

        Files of a listing are many, and few of them are used next: a descriptor that was closed stays closed.
        """
        return [self.meet(one, opens=False) for one in found]

    def remember(self, inode: Inode) -> None:
        """Count one lookup that the kernel will forget one day."""
        inode.lookups += 1

    def forget(self, nodeid: int, count: int) -> Inode | None:
        """Take `count` lookups back; return the inode if those were the last: `drop` it then."""
        inode = self._by_id.get(nodeid)
        if inode is None or nodeid == pyfuse3.ROOT_INODE:
            return None
        inode.lookups -= count
        return inode if inode.lookups <= 0 else None

    def drop(self, inode: Inode) -> None:
        """Remove an inode that the kernel holds no lookup of; others stay."""
        if inode.lookups > 0 or self._by_id.pop(inode.nodeid, None) is None:
            return
        if self._by_key.get(inode.key) is inode:
            del self._by_key[inode.key]
        elif inode.handle is not None and self._beside.get((inode.key, inode.handle)) is inode:
            del self._beside[inode.key, inode.handle]
        self._open.pop(inode.nodeid, None)
        self._close(inode)
        self.nodes.remove(inode.nodeid)
        self.opens.forget(inode.nodeid)

    def store_to(self, inode: Inode, stored_to: bool) -> None:
        """Note whether programs may write to a file without our knowledge."""
        inode.stored_to = stored_to
        self._show(inode)

    def close(self) -> None:
        """Close every descriptor."""
        for inode in self._by_id.values():
            self._close(inode)
        self._by_id.clear()
        self._by_key.clear()
        self._beside.clear()
        self._open.clear()

    def saved(self, used: Iterable[Inode]) -> tuple[SavedInodes, dict[Inode, int]]:
        """Return the table for `restore`, and where each inode stands in it.

        `used` are inodes that are needed although the kernel may have forgotten them.
        """
        closable = [self._by_id[nodeid] for nodeid in self._open]
        ordered = dict.fromkeys([*closable, *self._by_id.values(), *used])
        places = {inode: place for place, inode in enumerate(ordered)}
        nodes = [self._saved_inode(inode) for inode in ordered]
        saved = SavedInodes(
            root=self._root,
            next_foreign=self._next_foreign,
            last_generation=self._last_generation,
            nodes=nodes,
        )
        return saved, places

    def restore(self, saved: SavedInodes) -> list[Inode]:
        """Fill the new table, made with the same root; return the inodes in their order."""
        self._next_foreign = saved["next_foreign"]
        self._last_generation = saved["last_generation"]
        inodes = []
        for row in saved["nodes"]:
            nodeid, device, number, kind, descriptor, lookups, handle, by_id, by_key, state, generation = row[
                :11
            ]
            inode = Inode(nodeid, (device, number), kind, descriptor, lookups, generation, handle)
            inode.state = FileState.restored(state) if state else None
            inode.backing, inode.stored_to = row[11:]
            if inode.state is not None:
                self.opens.know(nodeid, device, number, None)
            if by_id:
                self._by_id[nodeid] = inode
            if by_key:
                self._by_key[inode.key] = inode
            elif by_id and handle is not None and not self._tells(inode.key):
                self._beside[inode.key, handle] = inode
            if descriptor >= 0 and nodeid != pyfuse3.ROOT_INODE:
                self._open[nodeid] = inode
                self._show(inode)
            inodes.append(inode)
        return inodes

    def _saved_inode(self, inode: Inode) -> SavedInode:
        return (
            inode.nodeid,
            *inode.key,
            inode.kind,
            inode.descriptor,
            inode.lookups,
            inode.handle,
            self._by_id.get(inode.nodeid) is inode,
            self._by_key.get(inode.key) is inode,
            inode.state.saved() if inode.state else None,
            inode.generation,
            inode.backing,
            inode.stored_to,
        )

    def _meet(self, key: tuple[int, int], kind: int, descriptor: int, opens: bool = True) -> Inode:
        """Return the inode of a file, made if it is not known; `descriptor` is its own from now on.

        Unless `opens`, an inode whose descriptor was closed is left so.
        """
        inode = self._known_at(key, descriptor)
        if inode is not None and inode.descriptor >= 0:
            os.close(descriptor)
            return inode
        if inode is not None and inode.handle == self._handle_at(descriptor):
            if not opens:
                os.close(descriptor)
                return inode
            inode.descriptor = descriptor
        else:  # if its number was known, it was recycled: that node id answers ESTALE until it is forgotten
            inode = self._made(key, kind, descriptor)
        self._keep(inode)
        return inode

    def _tells(self, key: tuple[int, int]) -> bool:
        """Say whether an inode that is open is the one file with this lower identity."""
        return self._numbers_tell and key[0] == self.device

    def _known_at(self, key: tuple[int, int], descriptor: int) -> Inode | None:
        """Return the inode of an open file with this lower identity, if it is known."""
        inode = self._by_key.get(key)
        if self._tells(key) or (inode is None and not self._beside):
            return inode
        handle = self.handle_at(key, descriptor)
        if handle is None or (inode is not None and self.handle(inode) == handle):
            return inode
        beside = self._beside.get((key, handle))
        if beside is None and inode is not None and self._is_link(inode, descriptor):
            return inode
        return beside

    def _is_link(self, inode: Inode, descriptor: int) -> bool:
        """Say whether an open file with an inode's number but another handle is another link to it.

        As far as can be seen. To a FUSE file system each link may be a node of its own, of which the kernel
        remembers other attributes.
        """
        try:
            mine = self.descriptor(inode)
            for _ in range(_LOOKS):  # it may be changing
                status = syscalls.fresh_status(mine)
                if status.nlink < 2 or stat.S_ISDIR(status.mode):
                    return False
                if status == syscalls.fresh_status(descriptor):
                    return True
        except OSError:  # one of them is gone
            return False
        return False

    def _made(self, key: tuple[int, int], kind: int, descriptor: int) -> Inode:
        device, nodeid = key
        if device != self.device or nodeid in self._by_id or not 1 < nodeid < _FOREIGN_IDS:
            nodeid = self._next_foreign
            self._next_foreign += 1
        self._last_generation = self._last_generation % _MAX_GENERATION + 1
        inode = Inode(nodeid, key, kind, descriptor, generation=self._last_generation)
        inode.known_since = self._clock()
        self._by_id[nodeid] = inode
        if key in self._by_key and not self._tells(key) and (handle := self.handle(inode)) is not None:
            self._beside[key, handle] = inode
        else:
            self._by_key[key] = inode
        return inode

    def _show(self, inode: Inode) -> None:
        """Have its attributes asked for natively if they may be."""
        nodeid = inode.nodeid
        if inode.stored_to:
            self.nodes.remove(nodeid)
        elif inode.descriptor < 0:
            self.nodes.hide(nodeid)
        # The number of an inode that the kernel has forgotten may be another's already; the root's is not
        # what stat shows of it.
        elif (
            nodeid != pyfuse3.ROOT_INODE and inode.key[0] == self.device and self._by_id.get(nodeid) is inode
        ):
            self.nodes.set(nodeid, inode.descriptor)

    def _close(self, inode: Inode) -> None:
        if inode.descriptor >= 0:
            self.nodes.hide(inode.nodeid)  # waits for who uses it
            os.close(inode.descriptor)
            inode.descriptor = -1

    def _keep(self, inode: Inode) -> None:
        """Note an open descriptor, and close old ones beyond the quota."""
        self._open[inode.nodeid] = inode
        self._show(inode)
        if len(self._open) > self._quota and self._by_handle:
            self._retire(inode)

    def _retire(self, newest: Inode) -> None:
        """Close the oldest descriptors: many at once, for listing a large tree closes one for each name.

        14 us each took half the time of a name one by one, in a batch 5 (15,000 files, load 13).
        """
        closed: list[Inode] = []
        for _ in range(_TRIES):
            nodeid, oldest = self._open.popitem(last=False)
            if oldest is newest or oldest.opens or oldest.key[0] != self.device:
                self._open[nodeid] = oldest
            else:
                closed.append(oldest)
                if len(closed) == self._batch:
                    break
        handles = self.nodes.retire([(inode.nodeid, inode.descriptor) for inode in closed])
        for inode, handle in zip(closed, handles, strict=True):
            if handle is None:
                self._open[inode.nodeid] = inode
            else:
                inode.handle, inode.descriptor = handle, -1


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
