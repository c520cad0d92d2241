"""Operations on what is in a file, and on attributes of all kinds of object."""

# The calls themselves are what is tested:
# ruff: noqa: PTH101, PTH108, PTH113, PTH116

import fcntl
import mmap
import os
import socket
import stat
from pathlib import Path

from .compare import ATIME_NS, UTIME_NOW, UTIME_OMIT, utimensat
from .kinds import ACCESS, DEFAULT, FURTHER_GROUP, LIST, OWNER_ID, SMALL_LIST
from .register import opened, operation, told, variants


@operation
def stat_follow(case: str) -> object:
    return told(os.stat(f"{case}/x"))


@operation
def read(case: str) -> object:
    descriptor = opened(case, os.O_RDONLY)
    try:
        return [os.pread(descriptor, 100, 0), os.pread(descriptor, 10_000, 5000), os.read(descriptor, 7000)]
    finally:
        os.close(descriptor)


@operation
def read_twice(case: str) -> object:
    return [len(Path(f"{case}/x").read_bytes()) if os.path.isfile(f"{case}/x") else 0 for _ in "12"]


@operation
def read_without_atime(case: str) -> object:
    descriptor = opened(case, os.O_RDONLY | os.O_NOATIME)
    try:
        return os.read(descriptor, 10)
    finally:
        os.close(descriptor)


@variants(
    read=os.O_RDONLY,
    write=os.O_WRONLY,
    both=os.O_RDWR,
    truncate=os.O_WRONLY | os.O_TRUNC,
    read_truncate=os.O_RDONLY | os.O_TRUNC,
    create=os.O_WRONLY | os.O_CREAT,
    create_read=os.O_RDONLY | os.O_CREAT,
    create_truncate=os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    exclusive=os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    directory=os.O_RDONLY | os.O_DIRECTORY,
    nofollow=os.O_RDONLY | os.O_NOFOLLOW,
    path=os.O_PATH | os.O_NOFOLLOW,
    append=os.O_WRONLY | os.O_APPEND,
    sync=os.O_WRONLY | os.O_SYNC,
)
def open_(case: str, flags: object) -> object:
    assert isinstance(flags, int)
    descriptor = opened(case, flags)
    try:
        return told(os.fstat(descriptor))
    finally:
        os.close(descriptor)


@operation
def write(case: str) -> object:
    descriptor = opened(case, os.O_WRONLY)
    try:
        done = os.pwrite(descriptor, b"written", 100)
        return done, told(os.fstat(descriptor))
    finally:
        os.close(descriptor)


@operation
def write_far(case: str) -> object:
    descriptor = opened(case, os.O_RDWR)
    try:
        return os.pwrite(descriptor, b"far", 200_000), os.pread(descriptor, 10, 199_995)
    finally:
        os.close(descriptor)


@operation
def write_nothing(case: str) -> object:
    descriptor = opened(case, os.O_WRONLY)
    try:
        return os.write(descriptor, b"")
    finally:
        os.close(descriptor)


@operation
def append(case: str) -> object:
    one, two = opened(case, os.O_WRONLY | os.O_APPEND), opened(case, os.O_WRONLY | os.O_APPEND)
    try:
        done = [os.write(one, b"one"), os.write(two, b"two"), os.write(one, b"three")]
        return done, os.lseek(one, 0, os.SEEK_CUR), os.fstat(two).st_size
    finally:
        os.close(one)
        os.close(two)


@operation
def map_and_write(case: str) -> object:
    descriptor = opened(case, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 4096) as mapped:
            mapped[10:15] = b"store"
            mapped.flush()
            return os.pread(descriptor, 20, 0), mapped[:20]
    finally:
        os.close(descriptor)


@variants(nothing=0, some=3000, same=6000, more=10_000, negative=-1, much=1 << 62)
def truncate(case: str, size: object) -> object:
    assert isinstance(size, int)
    os.truncate(f"{case}/x", size)
    return None


@operation
def truncate_open(case: str) -> object:
    descriptor = opened(case, os.O_RDWR)
    try:
        os.ftruncate(descriptor, 5000)
        return told(os.fstat(descriptor)), os.pread(descriptor, 100, 4950)
    finally:
        os.close(descriptor)


@variants(private=0o600, program=0o755, set_id=0o6755, set_gid=0o2644, sticky=0o1777, nothing=0, all=0o7777)
def chmod(case: str, mode: object) -> object:
    assert isinstance(mode, int)
    os.chmod(f"{case}/x", mode)
    return None


@variants(
    nobody=(-1, -1),
    same_user=(OWNER_ID, -1),
    same_group=(-1, OWNER_ID),
    further_group=(-1, FURTHER_GROUP),
    strange_group=(-1, 7777),
    user=(1236, -1),
    both=(1236, 1236),
)
def chown(case: str, owner: object) -> object:
    assert isinstance(owner, tuple)
    os.chown(f"{case}/x", *owner, follow_symlinks=False)
    return None


@operation
def chown_followed(case: str) -> object:
    os.chown(f"{case}/x", -1, FURTHER_GROUP)
    return None


@variants(
    now=((0, UTIME_NOW), (0, UTIME_NOW)),
    given=((1_234_567_890, 123_456_789), (987_654_321, 999_999_999)),
    before_1970=((-5, 1), (-1_000_000_000, 2)),
    atime=((77, 7), (0, UTIME_OMIT)),
    mtime=((0, UTIME_OMIT), (88, 8)),
    neither=((0, UTIME_OMIT), (0, UTIME_OMIT)),
    atime_now=((0, UTIME_NOW), (0, UTIME_OMIT)),
    mtime_now=((0, UTIME_OMIT), (0, UTIME_NOW)),
    wrong=((0, -1), (0, 0)),
)
def utime(case: str, times: object) -> object:
    assert isinstance(times, tuple)
    utimensat(f"{case}/x", *times)
    return None


@variants(
    user="user.new", trusted="trusted.new", security="security.new", unknown="strange.new", bare="user."
)
def setxattr(case: str, name: object) -> object:
    assert isinstance(name, str)
    os.setxattr(f"{case}/x", name, b"value", follow_symlinks=False)
    return sorted(os.listxattr(f"{case}/x", follow_symlinks=False))


@variants(create=os.XATTR_CREATE, replace=os.XATTR_REPLACE)
def setxattr_(case: str, flags: object) -> object:
    assert isinstance(flags, int)
    os.setxattr(f"{case}/x", "user.colour", b"red", flags)
    return None


@operation
def setxattr_large(case: str) -> object:
    os.setxattr(f"{case}/x", "user.large", bytes(70_000))
    return None


@operation
def getxattr(case: str) -> object:
    return os.getxattr(f"{case}/x", "user.colour")


@operation
def listxattr(case: str) -> object:
    return sorted(os.listxattr(f"{case}/x", follow_symlinks=False))


@operation
def removexattr(case: str) -> object:
    os.removexattr(f"{case}/x", "user.colour")
    return None


@variants(
    large=(ACCESS, LIST), small=(ACCESS, SMALL_LIST), default=(DEFAULT, LIST), wrong=(ACCESS, b"\2\0\0\0xx")
)
def set_list(case: str, what: object) -> object:
    assert isinstance(what, tuple)
    os.setxattr(f"{case}/x", *what)
    return stat.S_IMODE(os.stat(f"{case}/x").st_mode)


@operation
def remove_list(case: str) -> object:
    os.removexattr(f"{case}/x", ACCESS)
    return None


@variants(exists=os.F_OK, read=os.R_OK, write=os.W_OK, execute=os.X_OK)
def access(case: str, mode: object) -> object:
    assert isinstance(mode, int)
    return os.access(f"{case}/x", mode), os.access(f"{case}/x", mode, effective_ids=True)


@operation
def execute(case: str) -> object:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(f"{case}/x", ["x"])
        except OSError as error:
            os._exit(error.errno or 255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@operation
def lock(case: str) -> object:
    descriptor, second = opened(case, os.O_RDWR), opened(case, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
        fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(second)
        os.close(descriptor)
    return None


@operation
def synchronise(case: str) -> object:
    descriptor = opened(case, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


@operation
def advise(case: str) -> object:
    descriptor = opened(case, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 4096, os.POSIX_FADV_SEQUENTIAL)
    finally:
        os.close(descriptor)
    return None


@operation
def send(case: str) -> object:
    """sendfile(2) of a file (of a directory it fails, and may touch it)."""
    if not os.path.isfile(f"{case}/x"):
        return None
    descriptor = opened(case, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    try:
        return os.sendfile(ours.fileno(), descriptor, 5990, 100)
    finally:
        ours.close()
        theirs.close()
        os.close(descriptor)


@operation
def unlink_and_go_on(case: str) -> object:
    descriptor = opened(case, os.O_RDWR)
    try:
        os.unlink(f"{case}/x")
        os.pwrite(descriptor, b"unlinked", 5995)
        os.ftruncate(descriptor, 6001)
        os.fchmod(descriptor, 0o600)
        os.utime(descriptor, ns=(ATIME_NS, 5))
        os.setxattr(descriptor, "user.late", b"x")
        return (
            told(os.fstat(descriptor)),
            os.pread(descriptor, 100, 5990),
            os.getxattr(descriptor, "user.late"),
        )
    finally:
        os.close(descriptor)


@operation
def change_without_rights(case: str) -> object:
    """What a descriptor may although the file's mode has changed since."""
    descriptor = opened(case, os.O_RDWR)
    try:
        os.chmod(f"{case}/x", 0)
        os.pwrite(descriptor, b"still", 10)
        os.ftruncate(descriptor, 20)
        return os.pread(descriptor, 100, 0), told(os.fstat(descriptor))
    finally:
        os.close(descriptor)
