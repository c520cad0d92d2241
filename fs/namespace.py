"""Names and attributes: everything that is not file content or the listing of directories.

New files are made as the calling process (`acting`); permissions are checked by the kernel
(default_permissions). Any of these may change a lower file's ctime and so its version: a file whose pages are
in the pool is changed within `Handlers.change`, so that it keeps them.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import syscalls
from tmem.fs.acting import Caller, acting_as, drop_set_ids, threads_may_act, within_limits
from tmem.fs.base import Handlers, errors, status_if_any, tell_another_time
from tmem.fs.coherence import Change
from tmem.fs.inodes import Inode, look_at, proc_path

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, RequestContext, SetattrFields, StatvfsData

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCESS_LIST = b"system.posix_acl_access"
_ACL_NAMES = (_ACCESS_LIST, b"system.posix_acl_default")
_RENAME_WHITEOUT = 4


class Namespace(Handlers):
    """Handlers of names, attributes, links and extended attributes."""

    async def lookup(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> "EntryAttributes":
        """Find a name."""
        with errors():
            parent = self.table[parent_inode]
            try:
                return self.enter(parent, name)
            except FileNotFoundError:
                return self.absent(parent)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups back; files that the kernel has forgotten keep their pages while they have a name."""
        for nodeid, count in inode_list:
            self.take_back(nodeid, count)

    def take_back(self, nodeid: int, count: int) -> None:
        """Take `count` lookups of one file back."""
        inode = self.table.forget(nodeid, count)
        if inode is None:
            return
        if inode.state is not None:
            self._retire(inode)
        self.table.drop(inode)

    def _retire(self, inode: Inode) -> None:
        assert inode.state is not None
        # The lower may not answer if it is elsewhere; what is remembered in vain is evicted one day.
        linked = not inode.state.gone
        if self.is_here(inode):
            linked = False
            with contextlib.suppress(OSError):
                linked = os.fstat(self.table.descriptor(inode)).st_nlink > 0
        if linked:
            self.coherence.remember(inode.state)
        else:
            self.coherence.discard(inode.state.name, inode.state)

    async def getattr(self, inode: int, ctx: "RequestContext") -> "EntryAttributes":
        """Return attributes; a lower that may not answer is asked by a thread (natively, usually)."""
        with errors():
            node = self.table[inode]
            if self.reading is None or self.is_here(node):
                status = os.fstat(self.table.descriptor(node))
            else:  # what changes meanwhile the reader sees (`passing_tell`)
                with self.table.kept(node) as beside:
                    status = await self.in_thread(os.fstat, beside)
            entry = self.attributes(node, status, hidden=False)
            if inode == pyfuse3.ROOT_INODE:
                entry.st_ino = node.key[1]  # its node id is always 1; this is what stat shows
            return entry

    async def setattr(
        self,
        inode: int,
        attr: "EntryAttributes",
        fields: "SetattrFields",
        fh: int | None,
        ctx: "RequestContext",
    ) -> "EntryAttributes":
        """Change size, owner, mode and times, in this order."""
        with errors():
            node = self.table[inode]
            caller = Caller.of(ctx)
            if fields.update_size:
                await self._truncate(node, attr.st_size, fh, caller)
            rewrites = self.rewrites
            limits = self.limits_of(node, caller)
            status = await self.change_at(node, _set_owner_mode_times, attr, fields, caller, limits)
            entry = self.attributes(node, status, rewrites)
            if node.opens and node.state is not None and (node.state.untold or node.state.version is None):
                # By this reply the kernel takes the time of modification for that of the pages it has, which
                # may be older. So it is told another one, to be asked for again before anybody sees it.
                tell_another_time(entry, status)
            return entry

    async def _truncate(self, inode: Inode, size: int, fh: int | None, caller: Caller | None = None) -> None:
        limits = self.limits_of(inode, caller)
        # A descriptor of our own: the inode's may be closed while the worker thread is at it.
        descriptor = os.dup(self.table.descriptor(inode))
        try:
            # With a state even if nobody has opened it yet: somebody may, before the worker thread is done.
            with self.change_of(self.state_of(inode), descriptor, self.is_here(inode)) as change:
                change.flush(size, None)

                def work() -> bool:
                    with change.seen(descriptor):
                        before = os.fstat(descriptor)
                        with within_limits(limits):
                            self.resize(descriptor, size, fh)
                        return drop_set_ids(proc_path(descriptor), before, caller)

                try:
                    self.tell_lost(inode, await self.change_in_thread(work))
                finally:
                    change.flush(size, None)
        finally:
            os.close(descriptor)

    def resize(self, descriptor: int, size: int, fh: int | None) -> None:
        """Truncate the file; `files` uses the open file instead, whose mode may have changed since."""
        os.truncate(proc_path(descriptor), size)

    def tell_lost(self, inode: Inode, lost: bool) -> None:
        """Have the kernel ask for the mode again if a change has cost set-id bits."""
        if lost:
            self.kernel.forget_attributes(inode.nodeid)

    async def readlink(self, inode: int, ctx: "RequestContext") -> bytes:
        """Return where a symbolic link leads."""
        with errors():
            return await self.ask(self.table[inode], _link_at)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a file, pipe, socket or device."""
        return await self._make(parent_inode, name, ctx, partial(os.mknod, name, mode, rdev))

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a directory."""
        return await self._make(parent_inode, name, ctx, partial(os.mkdir, name, stat.S_IMODE(mode)))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a symbolic link."""
        return await self._make(parent_inode, name, ctx, partial(os.symlink, target, name))

    async def _make(
        self, parent_inode: int, name: bytes, ctx: "RequestContext", make: Callable[..., None]
    ) -> "EntryAttributes":
        """Make something by calling `make` with a ``dir_fd``, as the caller, and enter it."""
        with errors():
            parent = self.table[parent_inode]
            if self.acts_here(parent):
                with acting_as(ctx):
                    make(dir_fd=self.table.descriptor(parent))
                return self.enter(parent, name)
            with self.table.kept(parent) as directory:
                found = await self.name_in_thread(_make_at, directory, name, ctx, make)
            return self.enter_found(*found)

    def acts_here(self, parent: Inode) -> bool:
        """Say whether files are to be made in a directory on this thread."""
        return self.is_here(parent) or not threads_may_act()

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Give a file another name."""
        with errors():
            node, parent = self.table[inode], self.table[new_parent_inode]
            if self.is_here(node) and self.is_here(parent):
                with self.table.kept(parent) as directory, self.change(node), within_limits(Caller.of(ctx)):
                    os.link(self.table.path(node), new_name, dst_dir_fd=directory, follow_symlinks=True)
                return self.enter(parent, new_name)
            rewrites = self.rewrites
            with (
                self.table.kept(parent) as directory,
                self.table.kept(node) as beside,
                self.change_of(self.state_if_any(node), beside, here=False) as change,
            ):
                found = await self.name_in_thread(_link_to, change, beside, directory, new_name)
            return self.enter_found(*found, rewrites)

    async def unlink(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove a name; with the last one go the file's pages."""
        with errors():
            parent = self.table[parent_inode]
            if not self.is_here(parent):
                with self.table.kept(parent) as directory:
                    await self._change_names([(directory, name)], partial(os.unlink, name, dir_fd=directory))
                return
            directory = self.table.descriptor(parent)
            with self._affected(directory, name):
                os.unlink(name, dir_fd=directory)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove an empty directory."""
        with errors():
            parent = self.table[parent_inode]
            if self.is_here(parent):
                os.rmdir(name, dir_fd=self.table.descriptor(parent))
                return
            with self.table.kept(parent) as directory:
                await self.name_in_thread(partial(os.rmdir, name, dir_fd=directory))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: "RequestContext",
    ) -> None:
        """Rename, replace or exchange; a file that is replaced loses its pages with its last name."""
        with errors():
            old, new = self.table[parent_inode_old], self.table[parent_inode_new]
            makes = flags & _RENAME_WHITEOUT  # something in the old place
            here = self.is_here(old) and self.is_here(new)
            with self.table.kept(old) as old_dir, self.table.kept(new) as new_dir:

                def work() -> None:
                    if makes:
                        with acting_as(ctx):
                            syscalls.renameat2(old_dir, name_old, new_dir, name_new, flags)
                        return
                    with within_limits(Caller.of(ctx) if here else None):
                        if flags:
                            syscalls.renameat2(old_dir, name_old, new_dir, name_new, flags)
                        else:
                            os.rename(name_old, name_new, src_dir_fd=old_dir, dst_dir_fd=new_dir)

                if here or (makes and not threads_may_act()):
                    with self._affected(old_dir, name_old), self._affected(new_dir, name_new):
                        work()
                else:
                    await self._change_names([(old_dir, name_old), (new_dir, name_new)], work)

    async def _change_names(self, names: Sequence[tuple[int, bytes]], work: Callable[[], None]) -> None:
        """Have a thread change the names of files elsewhere, bracketed as in `_affected`."""
        found = await self.name_in_thread(_files_at, names)
        try:
            with contextlib.ExitStack() as stack:
                changes = []
                for status, descriptor in found:
                    inode = self.table.known(status, descriptor)
                    state = self.state_if_any(inode) if inode else None
                    change = stack.enter_context(self.change_of(state, descriptor, here=False))
                    changes.append((change, descriptor))
                left = await self.name_in_thread(_work_within, changes, work)
            for (_, descriptor), status_after in zip(found, left, strict=True):
                self.discard_unless_linked(descriptor, status_after)
        finally:
            for _, descriptor in found:
                os.close(descriptor)

    @contextlib.contextmanager
    def _affected(self, directory: int, name: bytes) -> Iterator[None]:
        """Bracket a change of the names of a file that may have pages, and drop them if it was the last."""
        try:
            descriptor = os.open(name, _PATH_FLAGS, dir_fd=directory)
        except OSError:  # no such file: the operation itself says what that means
            yield
            return
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                yield
                return
            inode = self.table.known(status, descriptor)
            with self.change_of(self.state_if_any(inode) if inode else None, descriptor, here=True):
                yield
            self.discard_if_unlinked(descriptor)
        finally:
            os.close(descriptor)

    async def statfs(self, ctx: "RequestContext") -> "StatvfsData":
        """Return the lower file system's numbers."""
        with errors():
            if self._is_local:
                lower = os.fstatvfs(self.table.root)
            else:
                lower = await self.in_thread(os.fstatvfs, self.table.root)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = lower.f_bsize, lower.f_frsize
        data.f_blocks, data.f_bfree, data.f_bavail = lower.f_blocks, lower.f_bfree, lower.f_bavail
        data.f_files, data.f_ffree, data.f_favail = lower.f_files, lower.f_ffree, lower.f_favail
        data.f_namemax = lower.f_namemax
        return data

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: "RequestContext") -> None:
        """Set an extended attribute."""
        with errors():
            node, caller = self.table[inode], Caller.of(ctx)
            limits = self.limits_of(node, caller)
            await self.change_at(node, _set_attribute, name, value, caller, limits)

    async def getxattr(self, inode: int, name: bytes, ctx: "RequestContext") -> bytes:
        """Return an extended attribute."""
        try:
            with errors():
                return await self.ask(self.table[inode], _attribute_at, name)
        except pyfuse3.FUSEError as error:
            if error.errno == errno.EOPNOTSUPP and name in _ACL_NAMES:
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR) from None  # the kernel would refuse all access
            raise

    async def listxattr(self, inode: int, ctx: "RequestContext") -> Sequence[bytes]:
        """Return the names of the extended attributes."""
        with errors():
            names = await self.ask(self.table[inode], _attributes_at)
        return [name for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]

    async def removexattr(self, inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove an extended attribute."""
        with errors():
            await self.change_at(self.table[inode], _remove_attribute, name)


def _link_at(descriptor: int) -> bytes:
    return os.readlink(b"", dir_fd=descriptor)


def _attribute_at(descriptor: int, name: bytes) -> bytes:
    return os.getxattr(proc_path(descriptor), name)


def _attributes_at(descriptor: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listxattr(proc_path(descriptor))]


def _set_owner_mode_times(
    descriptor: int,
    attr: "EntryAttributes",
    fields: "SetattrFields",
    caller: Caller,
    limits: Caller | None,
) -> os.stat_result:
    path = proc_path(descriptor)
    others = fields.update_size or fields.update_mode or fields.update_atime or fields.update_mtime
    if fields.update_uid or fields.update_gid or not others:
        # Nothing at all is chown(-1, -1), or a write that the kernel wants to take set-id bits away.
        uid = attr.st_uid if fields.update_uid else -1
        gid = attr.st_gid if fields.update_gid else -1
        before = os.fstat(descriptor)
        with within_limits(limits):
            os.chown(path, uid, gid)
        if caller.uid == before.st_uid:
            _lose_set_gid(descriptor, before, caller)
    if fields.update_mode:
        os.chmod(path, stat.S_IMODE(attr.st_mode))  # noqa: PTH101 - the path is a descriptor's
    if fields.update_atime or fields.update_mtime:
        atime_ns = attr.st_atime_ns if fields.update_atime else None
        mtime_ns = attr.st_mtime_ns if fields.update_mtime else None
        syscalls.utimens(path, atime_ns, mtime_ns)
    return os.fstat(descriptor)


def _set_attribute(descriptor: int, name: bytes, value: bytes, caller: Caller, limits: Caller | None) -> None:
    before = os.fstat(descriptor)
    with within_limits(limits):
        os.setxattr(proc_path(descriptor), name, value)
    if name == _ACCESS_LIST:
        _lose_set_gid(descriptor, before, caller)


def _remove_attribute(descriptor: int, name: bytes) -> None:
    os.removexattr(proc_path(descriptor), name)


def _lose_set_gid(descriptor: int, before: os.stat_result, caller: Caller) -> None:
    """Take set-group-id away after a change by one who is not in the group: the daemon may keep it."""
    now = os.fstat(descriptor)
    set_gid = stat.S_ISREG(now.st_mode) and now.st_mode & stat.S_ISGID
    if set_gid and caller.uid != 0 and not caller.is_member(before.st_gid):
        os.chmod(proc_path(descriptor), stat.S_IMODE(now.st_mode) & ~stat.S_ISGID)  # noqa: PTH101


def _make_at(
    directory: int, name: bytes, ctx: "RequestContext", make: Callable[..., None]
) -> tuple[os.stat_result, int]:
    with acting_as(ctx):
        make(dir_fd=directory)
    return look_at(directory, name)


def _link_to(change: Change, descriptor: int, directory: int, name: bytes) -> tuple[os.stat_result, int]:
    with change.seen(descriptor):
        os.link(proc_path(descriptor), name, dst_dir_fd=directory, follow_symlinks=True)
    return look_at(directory, name)


def _files_at(names: Sequence[tuple[int, bytes]]) -> list[tuple[os.stat_result, int]]:
    """Return status and O_PATH descriptor of those of the names, with their directories, that are files."""
    found = []
    for directory, name in names:
        with contextlib.suppress(OSError):  # no such file: the operation itself says what that means
            status, descriptor = look_at(directory, name)
            if stat.S_ISREG(status.st_mode):
                found.append((status, descriptor))
            else:
                os.close(descriptor)
    return found


def _work_within(
    changes: Sequence[tuple[Change, int]], work: Callable[[], None]
) -> list[os.stat_result | None]:
    """Do it within all these changes of files, open at these; return their status after it."""
    with contextlib.ExitStack() as stack:
        for change, descriptor in changes:
            stack.enter_context(change.seen(descriptor))
        work()
    return [status_if_any(descriptor) for _, descriptor in changes]
