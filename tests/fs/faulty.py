"""A lower file system that fails as it is told: the tree of one directory, served by a child process.

Each operation (`OPERATIONS`, by pyfuse3's names) can be given a `Fault`. Nothing is cached by the kernel
(names are, for so many seconds), so that every access of the overlay's daemon comes here. `Faulty`
is the test's end; run as a program, this is the server:
``python faulty.py DIRECTORY MOUNTPOINT SOCKET SECONDS``.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from tmem.fs import syscalls

if TYPE_CHECKING:
    from pyfuse3 import (
        EntryAttributes,
        FileInfo,
        ReaddirToken,
        RequestContext,
        SetattrFields,
        StatvfsData,
    )


@dataclass(frozen=True)
class Fault:
    """What an operation does instead of succeeding."""

    errno: int = 0
    """Fail with this error."""
    name: str = ""
    """Only for files of this name, whatever directory they are in; empty: for all."""
    begin: int = 0
    """Reads and writes fail from this byte on; what comes before is done. Listings: from this entry on."""
    hangs: bool = False
    """Wait until the fault is taken away."""
    most: int = 0
    """Reads return no more bytes than this at a time."""
    ends: bool = False
    """Reads find the end of the file at `begin`, whatever its size."""
    size: int = -1
    """The size that attributes say."""
    replaced_by: str = ""
    """Once a file was created, this one takes its place; it is called ``replaced`` then."""


class Faulty:
    """A running server of the files in `directory`, mounted on `point`."""

    def __init__(self, directory: Path, point: Path, name_seconds: int = 0) -> None:
        self.directory = directory
        self.point = point
        directory.mkdir(exist_ok=True)
        point.mkdir(exist_ok=True)
        control = directory.parent / f"{directory.name}.sock"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(control))
        listening.listen()
        command = [sys.executable, __file__, str(directory), str(point), str(control), str(name_seconds)]
        self.process = subprocess.Popen(command)
        listening.settimeout(60)
        self._connection, _ = listening.accept()
        listening.close()
        control.unlink()
        assert self._ask({}) == []

    def fail(self, operation: str, **fault: int | str | bool) -> None:
        """Have an operation fail from now on."""
        self._ask({operation: dataclasses.asdict(Fault(**fault))})  # type: ignore[arg-type]

    def heal(self) -> None:
        """Have all operations succeed from now on; those that wait go on."""
        self._ask(dict.fromkeys(OPERATIONS))

    def waiting(self) -> list[str]:
        """Return the operations that wait right now."""
        return self._ask({})

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it all, whatever state it is in."""
        self.kill()
        self._connection.close()
        with contextlib.suppress(OSError):
            syscalls.umount(str(self.point), syscalls.MNT_DETACH)

    def _ask(self, faults: dict[str, dict[str, object] | None]) -> list[str]:
        self._connection.sendall(json.dumps(faults).encode() + b"\n")
        answer: list[str] = json.loads(self._connection.makefile().readline())
        return answer


OPERATIONS = (
    *("lookup", "getattr", "setattr", "open", "create", "read", "write", "flush", "fsync", "release"),
    *("unlink", "opendir", "readdir", "statfs", "getxattr", "setxattr", "listxattr", "removexattr"),
    *("readlink", "symlink", "mkdir", "rmdir", "mknod", "link", "rename"),
)


_EXCHANGE = 2  # RENAME_EXCHANGE
AGE_NS = 10_000_000_000
"""Files say that they are older than they are, so that their versions are trusted at once."""


class _Server(pyfuse3.Operations):
    def __init__(self, directory: str, name_seconds: int) -> None:
        super().__init__()
        self.root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.directory = directory
        self.name_seconds = name_seconds
        self.names: dict[int, bytes] = {pyfuse3.ROOT_INODE: b"."}  # below the root
        self.faults: dict[str, Fault] = {}
        self.changed = trio.Event()
        self.waiting: list[str] = []

    async def control(self, stream: trio.SocketStream) -> None:
        buffered = b""
        async for part in stream:
            buffered += part
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                for operation, fault in json.loads(line).items():
                    self.faults.pop(operation, None)
                    if fault is not None:
                        self.faults[operation] = Fault(**fault)
                    self.changed.set()
                    self.changed = trio.Event()
                await stream.send_all(json.dumps(self.waiting).encode() + b"\n")
        pyfuse3.terminate()

    async def fault(self, operation: str, name: bytes) -> Fault:
        """Wait or fail as told; else the fault, for what only some operations know."""
        while True:
            fault = self.faults.get(operation, Fault())
            if fault.name and fault.name != os.fsdecode(name.rpartition(b"/")[2]):
                return Fault()
            if not fault.hangs:
                break
            self.waiting.append(operation)
            await self.changed.wait()
            self.waiting.remove(operation)
        if fault.errno and not fault.begin:
            raise pyfuse3.FUSEError(fault.errno)
        return fault

    def below(self, parent: int, name: bytes) -> bytes:
        """Return a name as `names` has it."""
        return name if parent == pyfuse3.ROOT_INODE else self.names[parent] + b"/" + name

    def path(self, inode: int) -> str:
        return f"{self.directory}/{os.fsdecode(self.names[inode])}"

    def attributes(self, name: bytes) -> "EntryAttributes":
        with _errors():
            status = os.stat(name, dir_fd=self.root, follow_symlinks=False)
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = self.name_seconds
        entry.attr_timeout = self.name_seconds if stat.S_ISDIR(status.st_mode) else 0  # who may search it
        entry.st_ino = pyfuse3.ROOT_INODE if name == b"." else status.st_ino
        entry.st_mode, entry.st_nlink = status.st_mode, status.st_nlink
        entry.st_uid, entry.st_gid, entry.st_rdev = status.st_uid, status.st_gid, status.st_rdev
        told = self.faults.get("getattr", Fault())
        lies = told.size >= 0 and not stat.S_ISDIR(status.st_mode)
        entry.st_size = told.size if lies else status.st_size
        entry.st_blocks, entry.st_blksize = status.st_blocks, status.st_blksize
        entry.st_atime_ns, entry.st_mtime_ns = status.st_atime_ns - AGE_NS, status.st_mtime_ns - AGE_NS
        entry.st_ctime_ns = status.st_ctime_ns - AGE_NS
        self.names[entry.st_ino] = name
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> "EntryAttributes":
        await self.fault("lookup", name)
        return self.attributes(self.below(parent_inode, name))

    async def getattr(self, inode: int, ctx: "RequestContext") -> "EntryAttributes":
        await self.fault("getattr", self.names[inode])
        return self.attributes(self.names[inode])

    async def setattr(
        self,
        inode: int,
        attr: "EntryAttributes",
        fields: "SetattrFields",
        fh: int | None,
        ctx: "RequestContext",
    ) -> "EntryAttributes":
        await self.fault("setattr", self.names[inode])
        path = self.path(inode)
        with _errors():
            if fields.update_size:
                os.truncate(path, attr.st_size)
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                os.chown(path, uid, attr.st_gid if fields.update_gid else -1, follow_symlinks=False)
            if fields.update_mode:
                os.chmod(path, stat.S_IMODE(attr.st_mode))  # noqa: PTH101
            if fields.update_atime or fields.update_mtime:
                atime_ns = attr.st_atime_ns + AGE_NS if fields.update_atime else None
                mtime_ns = attr.st_mtime_ns + AGE_NS if fields.update_mtime else None
                syscalls.utimens(path, atime_ns, mtime_ns)
        return self.attributes(self.names[inode])

    async def open(self, inode: int, flags: int, ctx: "RequestContext") -> "FileInfo":
        await self.fault("open", self.names[inode])
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: "RequestContext"
    ) -> tuple["FileInfo", "EntryAttributes"]:
        fault = await self.fault("create", name)
        with _errors():
            wanted = flags & os.O_EXCL | os.O_CREAT | os.O_WRONLY
            path = self.below(parent_inode, name)
            os.close(os.open(path, wanted, stat.S_IMODE(mode), dir_fd=self.root))
        entry = self.attributes(path)
        if fault.replaced_by:
            self.names[entry.st_ino] = b"replaced"
            os.rename(name, b"replaced", src_dir_fd=self.root, dst_dir_fd=self.root)
            os.rename(fault.replaced_by, name, src_dir_fd=self.root, dst_dir_fd=self.root)
        return pyfuse3.FileInfo(fh=entry.st_ino, direct_io=True), entry

    async def read(self, fh: int, off: int, size: int) -> bytes:
        fault = await self.fault("read", self.names[fh])
        if fault.begin:
            if off >= fault.begin:
                if fault.ends:
                    return b""
                raise pyfuse3.FUSEError(fault.errno)
            size = min(size, fault.begin - off)
        descriptor = os.open(self.names[fh], os.O_RDONLY, dir_fd=self.root)
        data = os.pread(descriptor, min(size, fault.most) if fault.most else size, off)
        os.close(descriptor)
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        fault = await self.fault("write", self.names[fh])
        if fault.begin:
            if off >= fault.begin:
                raise pyfuse3.FUSEError(fault.errno)
            buf = buf[: fault.begin - off]
        descriptor = os.open(self.names[fh], os.O_WRONLY, dir_fd=self.root)
        os.pwrite(descriptor, buf, off)
        os.close(descriptor)
        return len(buf)

    async def flush(self, fh: int) -> None:
        await self.fault("flush", self.names[fh])

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.fault("fsync", self.names[fh])

    async def release(self, fh: int) -> None:
        await self.fault("release", self.names[fh])

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is forgotten: tests are short."""

    async def unlink(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        await self.fault("unlink", name)
        with _errors():
            os.unlink(self.below(parent_inode, name), dir_fd=self.root)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: "RequestContext") -> None:
        await self.fault("rmdir", name)
        with _errors():
            os.rmdir(self.below(parent_inode, name), dir_fd=self.root)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        await self.fault("mkdir", name)
        with _errors():
            os.mkdir(self.below(parent_inode, name), stat.S_IMODE(mode), dir_fd=self.root)
        return self._own(parent_inode, name, ctx)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: "RequestContext"
    ) -> "EntryAttributes":
        await self.fault("mknod", name)
        with _errors():
            os.mknod(self.below(parent_inode, name), mode, rdev, dir_fd=self.root)
        return self._own(parent_inode, name, ctx)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        await self.fault("symlink", name)
        with _errors():
            os.symlink(target, self.below(parent_inode, name), dir_fd=self.root)
        return self._own(parent_inode, name, ctx)

    def _own(self, parent: int, name: bytes, ctx: "RequestContext") -> "EntryAttributes":
        """Give what was made to whom it was made for."""
        path = self.below(parent, name)
        with _errors():
            os.chown(path, ctx.uid, ctx.gid, dir_fd=self.root, follow_symlinks=False)
        return self.attributes(path)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: "RequestContext"
    ) -> "EntryAttributes":
        await self.fault("link", new_name)
        path = self.below(new_parent_inode, new_name)
        with _errors():
            os.link(self.names[inode], path, src_dir_fd=self.root, dst_dir_fd=self.root)
        return self.attributes(path)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: "RequestContext",
    ) -> None:
        await self.fault("rename", name_old)
        old, new = self.below(parent_inode_old, name_old), self.below(parent_inode_new, name_new)
        with _errors():
            syscalls.renameat2(self.root, old, self.root, new, flags)
        for inode, name in self.names.items():
            if name == old or name.startswith(old + b"/"):
                self.names[inode] = new + name[len(old) :]
            elif flags & _EXCHANGE and (name == new or name.startswith(new + b"/")):
                self.names[inode] = old + name[len(new) :]

    async def readlink(self, inode: int, ctx: "RequestContext") -> bytes:
        await self.fault("readlink", self.names[inode])
        with _errors():
            return os.readlink(os.fsencode(self.path(inode)))  # noqa: PTH115 - of bytes

    async def opendir(self, inode: int, ctx: "RequestContext") -> int:
        await self.fault("opendir", self.names[inode])
        return inode

    async def readdir(self, fh: int, start_id: int, token: "ReaddirToken") -> None:
        fault = await self.fault("readdir", self.names[fh])
        names = sorted(os.fsencode(path.name) for path in Path(self.path(fh)).iterdir())
        for number in range(start_id, len(names)):
            if fault.begin and number >= fault.begin:
                if number > start_id:
                    return
                raise pyfuse3.FUSEError(fault.errno)
            entry = self.attributes(self.below(fh, names[number]))
            if not pyfuse3.readdir_reply(token, names[number], entry, number + 1):
                return

    async def releasedir(self, fh: int) -> None:
        """Nothing to close."""

    async def statfs(self, ctx: "RequestContext") -> "StatvfsData":
        await self.fault("statfs", b"")
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1000
        data.f_files = data.f_ffree = data.f_favail = 1000
        data.f_namemax = 255
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: "RequestContext") -> bytes:
        await self.fault("getxattr", self.names[inode])
        if not name.startswith(b"user."):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        with _errors():
            return os.getxattr(self.path(inode), name, follow_symlinks=False)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: "RequestContext") -> None:
        await self.fault("setxattr", self.names[inode])
        with _errors():
            os.setxattr(self.path(inode), name, value, follow_symlinks=False)

    async def listxattr(self, inode: int, ctx: "RequestContext") -> Sequence[bytes]:
        await self.fault("listxattr", self.names[inode])
        with _errors():
            return [os.fsencode(name) for name in os.listxattr(self.path(inode), follow_symlinks=False)]

    async def removexattr(self, inode: int, name: bytes, ctx: "RequestContext") -> None:
        await self.fault("removexattr", self.names[inode])
        with _errors():
            os.removexattr(self.path(inode), name, follow_symlinks=False)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None


async def _serve(server: _Server, control: str) -> None:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(control)
    connected.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.control, trio.SocketStream(trio.socket.from_stdlib_socket(connected)))
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main(directory: str, point: str, control: str, name_seconds: str) -> None:
    """Be the server."""
    server = _Server(directory, int(name_seconds))
    pyfuse3.init(server, point, {"fsname=faulty", "default_permissions"})
    try:
        trio.run(_serve, server, control)
    finally:
        pyfuse3.close(unmount=True)


def ends(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Say whether a process ends by itself in time."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
