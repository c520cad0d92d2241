"""What a mount cannot offer as the lower directory does: each operation with what it gives there and here.

This is the list in the documentation. `x` is a file of 6000 bytes, `sparse` one of 1 MiB with only its last
page written, `p` a pipe, `s` a bound socket whose server listens.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .compare import _check, _libc, fallocate

PAGE = 4096
MIB = 1 << 20
FS_IOC_GETFLAGS, FS_IOC_FIEMAP, FICLONE, FS_IOC_GETVERSION = 0x80086601, 0xC020660B, 0x40049409, 0x80087601
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
AT_FDCWD, STATX_BTIME = -100, 0x800

Limit = Callable[[Path], object]
LIMITS: dict[str, tuple[Limit, object, object, object]] = {}
_SAME = object()


def limit(lower: object, mount: object, others: object = _SAME) -> Callable[[Limit], Limit]:
    """Register an operation, what it gives in the lower directory, and through the mount.

    `others` is what it gives with other loops than the native one.
    """

    def register(do: Limit) -> Limit:
        LIMITS[do.__name__] = (do, lower, mount, mount if others is _SAME else others)
        return do

    return register


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def stage(case: Path) -> None:
    (case / "x").write_bytes(b"x" * 6000)
    with (case / "sparse").open("wb") as file:
        os.pwrite(file.fileno(), b"end", MIB - PAGE)
        os.truncate(file.fileno(), MIB)
    os.mkfifo(case / "p")


@limit(None, None, others="EOPNOTSUPP")
def allocate(case: Path) -> object:
    with opened(case / "x") as descriptor:
        fallocate(descriptor, 0, 0, MIB)
    return None


@limit(None, None, others="EOPNOTSUPP")
def punch_a_hole(case: Path) -> object:
    with opened(case / "x") as descriptor:
        fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, PAGE)
    return None


@limit(None, None, others="EOPNOTSUPP")
def zero_a_range(case: Path) -> object:
    with opened(case / "x") as descriptor:
        fallocate(descriptor, ZERO_RANGE, 0, PAGE)
    return None


@limit(MIB, MIB)
def posix_fallocate(case: Path) -> object:
    """The C library writes where fallocate is not offered."""
    with opened(case / "x") as descriptor:
        os.posix_fallocate(descriptor, 0, MIB)
        return os.fstat(descriptor).st_size


@limit((MIB - PAGE, MIB), (MIB - PAGE, MIB), others=(0, MIB))
def find_data_where_nobody_writes(case: Path) -> object:
    with opened(case / "sparse", os.O_RDONLY) as descriptor:
        data = os.lseek(descriptor, 0, os.SEEK_DATA)
        return data, os.lseek(descriptor, data, os.SEEK_HOLE)


@limit((MIB - PAGE, MIB), (0, MIB))
def find_data_and_then_a_hole(case: Path) -> object:
    with opened(case / "sparse") as descriptor:
        data = os.lseek(descriptor, 0, os.SEEK_DATA)
        return data, os.lseek(descriptor, data, os.SEEK_HOLE)


@limit("ENXIO", "ENXIO")
def find_data_beyond_the_end(case: Path) -> object:
    with opened(case / "x") as descriptor:
        return os.lseek(descriptor, 6000, os.SEEK_DATA)


@limit(2000, "EOPNOTSUPP")
def collapse_a_range(case: Path) -> object:
    """No request of FUSE has it."""
    with opened(case / "x") as descriptor:
        os.truncate(descriptor, PAGE + 2000)
        fallocate(descriptor, COLLAPSE, 0, PAGE)
        return os.fstat(descriptor).st_size


@limit(True, "EOPNOTSUPP")
def unnamed_file(case: Path) -> object:
    with opened(case, os.O_TMPFILE | os.O_RDWR) as descriptor:
        return descriptor > 0


@limit(True, False)
def access_time_of_an_empty_file_that_is_sent(case: Path) -> object:
    """The kernel knows that there is nothing to ask for."""
    with opened(case / "empty", os.O_RDWR | os.O_CREAT) as source, opened(case / "x", os.O_RDWR) as target:
        os.utime(case / "empty", ns=(1, 2))
        os.sendfile(target, source, 0, 100)
    return (case / "empty").stat().st_atime_ns > 1


@limit(6000, 6000)
def copy_file_range(case: Path) -> object:
    """The kernel copies through pages."""
    with opened(case / "x") as source, opened(case / "y", os.O_RDWR | os.O_CREAT) as target:
        return os.copy_file_range(source, target, 10_000)


@limit("EOPNOTSUPP", "EOPNOTSUPP")
def clone(case: Path) -> object:
    """As on a lower file system that cannot; on one that can it succeeds only there."""
    with opened(case / "x") as source, opened(case / "y", os.O_RDWR | os.O_CREAT) as target:
        return fcntl.ioctl(target, FICLONE, source)


@limit(True, "ENOTTY")
def flags_of_a_file(case: Path) -> object:
    """Chattr and lsattr."""
    with opened(case / "x") as descriptor:
        return len(fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8))) == 8


@limit(True, "ENOTTY")
def generation_of_a_file(case: Path) -> object:
    with opened(case / "x") as descriptor:
        return len(fcntl.ioctl(descriptor, FS_IOC_GETVERSION, bytes(8))) == 8


@limit(True, "EOPNOTSUPP")
def extents_of_a_file(case: Path) -> object:
    with opened(case / "x") as descriptor:
        return len(fcntl.ioctl(descriptor, FS_IOC_FIEMAP, struct.pack("QQIIII", 0, MIB, 0, 0, 0, 0))) > 0


@limit("ENOTTY", "ENOTTY")
def unknown_ioctl(case: Path) -> object:
    with opened(case / "x") as descriptor:
        return fcntl.ioctl(descriptor, 0x1234)


@limit("EINVAL", 100)
def unaligned_direct_read(case: Path) -> object:
    """Through the mount any alignment will do."""
    with opened(case / "x", os.O_RDONLY | os.O_DIRECT) as descriptor:
        return len(os.pread(descriptor, 100, 5))


@limit(True, False)
def time_of_birth(case: Path) -> object:
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.statx(AT_FDCWD, os.fsencode(case / "x"), 0, STATX_BTIME, buffer))
    return bool(struct.unpack_from("=I", buffer, 0)[0] & STATX_BTIME)


@limit(True, True)
def lease(case: Path) -> object:
    with opened(case / "x", os.O_RDONLY) as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


@limit((stat.S_IFREG, b"first"), (stat.S_IFREG, b"first"))
def handle_of_a_file(case: Path) -> object:
    from tmem.fs import syscalls

    (case / "x").write_bytes(b"first")
    with opened(case / "x") as descriptor, opened(case, os.O_RDONLY) as directory:
        handle = syscalls.file_handle(descriptor)
        if handle is None:
            return "EOPNOTSUPP"
        again = syscalls.open_handle(directory, handle, os.O_RDONLY)
        try:
            return stat.S_IFMT(os.fstat(again).st_mode), os.read(again, 10)
        finally:
            os.close(again)


@limit(b"there!", b"first!there!")
def cleared_append(case: Path) -> object:
    """A descriptor that was opened with O_APPEND appends, although that has been taken back."""
    (case / "x").write_bytes(b"first!")
    with opened(case / "x", os.O_RDWR | os.O_APPEND) as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        os.pwrite(descriptor, b"there!", 0)
    return (case / "x").read_bytes()


LIMITS_BETWEEN: dict[str, tuple[Callable[[Path, Path], object], object, object]] = {}
"""Of two programs: one in the directory under test, one in the lower directory."""


def meeting(lower: object, mount: object) -> Callable[[Callable[[Path, Path], object]], None]:
    """Register what gives `lower` if both are in the lower directory, and `mount` if the first is not."""

    def register(do: Callable[[Path, Path], object]) -> None:
        LIMITS_BETWEEN[do.__name__] = (do, lower, mount)

    return register


@meeting("EAGAIN", None)
def locks(here: Path, below: Path) -> object:
    with opened(here / "x") as one, opened(below / "x") as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None


@meeting(True, "ENXIO")
def pipes(here: Path, below: Path) -> object:
    with opened(below / "p", os.O_RDONLY | os.O_NONBLOCK), opened(here / "p", os.O_WRONLY | os.O_NONBLOCK):
        return True


@meeting(True, "ECONNREFUSED")
def sockets(here: Path, below: Path) -> object:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(below / "s"))
        server.listen()
        client.connect(str(here / "s"))
    return True


@meeting("ETXTBSY", None)
def writing_below_to_a_program_that_runs_here(here: Path, below: Path) -> object:
    shutil.copy("/bin/sleep", below / "program")
    pid = os.posix_spawn(here / "program", ["program", "60"], {})
    try:
        with opened(below / "program", os.O_WRONLY):
            return None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@meeting("ETXTBSY", None)
def running_here_what_is_written_below(here: Path, below: Path) -> object:
    shutil.copy("/bin/sleep", below / "program")
    with opened(below / "program", os.O_WRONLY):
        os.waitpid(os.posix_spawn(here / "program", ["program", "0"], {}), 0)
    return None
