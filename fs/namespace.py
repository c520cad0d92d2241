"""Names and attributes: everything that is not file content or the listing of directories.

New files belong to the calling process, which only root can arrange; permissions are checked by the kernel
(default_permissions). Any of these may change a lower file's ctime and so its version: a file whose pages are
in the pool is changed within `Handlers.change`, so that it keeps them.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs import syscalls
from tmem.fs.base import Handlers, errors
from tmem.fs.inodes import Inode, proc_path

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, RequestContext, SetattrFields, StatvfsData

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")


class Namespace(Handlers):
    """Handlers of names, attributes, links and extended attributes."""

    async def lookup(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> "EntryAttributes":
        """Find a name."""
        with errors():
            return self.enter(self.table[parent_inode], name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups back; files that the kernel has forgotten keep their pages while they have a name."""
        for nodeid, count in inode_list:
            inode = self.table.forget(nodeid, count)
            if inode is None:
                continue
            if inode.state is not None:
                self._retire(inode)
            self.table.drop(inode)

    def _retire(self, inode: Inode) -> None:
        assert inode.state is not None
        linked = False
        with contextlib.suppress(OSError):
            linked = os.fstat(self.table.descriptor(inode)).st_nlink > 0
        if linked:
            self.coherence.remember(inode.state)
        else:
            self.coherence.discard(inode.state.name, inode.state)

    async def getattr(self, inode: int, ctx: "RequestContext") -> "EntryAttributes":
        """Return attributes."""
        with errors():
            node = self.table[inode]
            entry = self.attributes(node, os.fstat(self.table.descriptor(node)))
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
            if fields.update_size:
                await self._truncate(node, attr.st_size, fh)
            with self.change(node):
                self._set_owner_mode_times(node, attr, fields)
            return self.attributes(node, os.fstat(self.table.descriptor(node)))

    async def _truncate(self, inode: Inode, size: int, fh: int | None) -> None:
        # A descriptor of our own: the inode's may be closed while the worker thread is at it.
        descriptor = os.dup(self.table.descriptor(inode))
        try:
            # With a state even if nobody has opened it yet: somebody may, before the worker thread is done.
            with self.coherence.change(self.state_of(inode), descriptor) as change:
                change.flush(size, None)
                try:
                    await self.in_thread(self.resize, descriptor, size, fh)
                finally:
                    change.flush(size, None)
        finally:
            os.close(descriptor)

    def resize(self, descriptor: int, size: int, fh: int | None) -> None:
        """Truncate the file; `files` uses the open file instead, whose mode may have changed since."""
        os.truncate(proc_path(descriptor), size)

    def _set_owner_mode_times(self, inode: Inode, attr: "EntryAttributes", fields: "SetattrFields") -> None:
        path = self.table.path(inode)
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            gid = attr.st_gid if fields.update_gid else -1
            os.chown(path, uid, gid)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))  # noqa: PTH101 - the path is a descriptor's
        if fields.update_atime or fields.update_mtime:
            status = os.fstat(self.table.descriptor(inode))
            atime_ns = attr.st_atime_ns if fields.update_atime else status.st_atime_ns
            mtime_ns = attr.st_mtime_ns if fields.update_mtime else status.st_mtime_ns
            os.utime(path, ns=(atime_ns, mtime_ns))

    async def readlink(self, inode: int, ctx: "RequestContext") -> bytes:
        """Return where a symbolic link leads."""
        with errors():
            return os.readlink(b"", dir_fd=self.table.descriptor(self.table[inode]))

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a file, pipe, socket or device."""
        with errors(), self.new_name(parent_inode, name, ctx, mode) as directory:
            os.mknod(name, mode, rdev, dir_fd=directory)
        with errors():
            return self.enter(self.table[parent_inode], name)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a directory."""
        with errors(), self.new_name(parent_inode, name, ctx, 0) as directory:
            os.mkdir(name, stat.S_IMODE(mode), dir_fd=directory)
        with errors():
            return self.enter(self.table[parent_inode], name)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Make a symbolic link."""
        with errors(), self.new_name(parent_inode, name, ctx, 0) as directory:
            os.symlink(target, name, dir_fd=directory)
        with errors():
            return self.enter(self.table[parent_inode], name)

    @contextlib.contextmanager
    def new_name(self, parent_inode: int, name: bytes, ctx: "RequestContext", mode: int) -> Iterator[int]:
        """Yield the parent's descriptor to make `name` in, then give what was made to the calling process."""
        directory = self.table.descriptor(self.table[parent_inode])
        yield directory
        uid, gid = ctx.uid, ctx.gid
        if self._owner[0] != 0 or (uid, gid) == self._owner:
            return
        if os.fstat(directory).st_mode & stat.S_ISGID:
            gid = -1  # taken from the directory
        os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
        if mode & (stat.S_ISUID | stat.S_ISGID):  # chown has removed these
            os.chmod(name, stat.S_IMODE(mode), dir_fd=directory)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        """Give a file another name."""
        with errors():
            node, parent = self.table[inode], self.table[new_parent_inode]
            with self.change(node):
                os.link(
                    self.table.path(node),
                    new_name,
                    dst_dir_fd=self.table.descriptor(parent),
                    follow_symlinks=True,
                )
            return self.enter(parent, new_name)

    async def unlink(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove a name; with the last one go the file's pages."""
        with errors():
            directory = self.table.descriptor(self.table[parent_inode])
            with self._affected(directory, name):
                os.unlink(name, dir_fd=directory)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove an empty directory."""
        with errors():
            os.rmdir(name, dir_fd=self.table.descriptor(self.table[parent_inode]))

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
            old_dir = self.table.descriptor(self.table[parent_inode_old])
            new_dir = self.table.descriptor(self.table[parent_inode_new])
            with self._affected(old_dir, name_old), self._affected(new_dir, name_new):
                if flags:
                    syscalls.renameat2(old_dir, name_old, new_dir, name_new, flags)
                else:
                    os.rename(name_old, name_new, src_dir_fd=old_dir, dst_dir_fd=new_dir)

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
            inode = self.table.known(status)
            with self.coherence.change(inode.state if inode else None, descriptor):
                yield
            self.discard_if_unlinked(descriptor)
        finally:
            os.close(descriptor)

    async def statfs(self, ctx: "RequestContext") -> "StatvfsData":
        """Return the lower file system's numbers."""
        with errors():
            lower = os.fstatvfs(self.table.root)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = lower.f_bsize, lower.f_frsize
        data.f_blocks, data.f_bfree, data.f_bavail = lower.f_blocks, lower.f_bfree, lower.f_bavail
        data.f_files, data.f_ffree, data.f_favail = lower.f_files, lower.f_ffree, lower.f_favail
        data.f_namemax = lower.f_namemax
        return data

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: "RequestContext") -> None:
        """Set an extended attribute."""
        with errors():
            node = self.table[inode]
            with self.change(node):
                os.setxattr(self.table.path(node), name, value)

    async def getxattr(self, inode: int, name: bytes, ctx: "RequestContext") -> bytes:
        """Return an extended attribute."""
        try:
            with errors():
                return os.getxattr(self.table.path(self.table[inode]), name)
        except pyfuse3.FUSEError as error:
            if error.errno == errno.EOPNOTSUPP and name in _ACL_NAMES:
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR) from None  # the kernel would refuse all access
            raise

    async def listxattr(self, inode: int, ctx: "RequestContext") -> Sequence[bytes]:
        """Return the names of the extended attributes."""
        with errors():
            return [os.fsencode(name) for name in os.listxattr(self.table.path(self.table[inode]))]

    async def removexattr(self, inode: int, name: bytes, ctx: "RequestContext") -> None:
        """Remove an extended attribute."""
        with errors():
            node = self.table[inode]
            with self.change(node):
                os.removexattr(self.table.path(node), name)
