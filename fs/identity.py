"""Which file a page belongs to, and which state of that file it shows.

The object id names the file: its device, its inode number and, where the file system has handles, its file
handle (which holds the inode's generation). It does not hold the version, so that a file which is written
through the mount keeps its other pages. The version (mtime, ctime, size) is kept beside it, in memory, by
`coherence`. In a pool that several mounts share there is an object for each version instead (`sharing`).
Nothing here depends on the mount: all mounts of a kernel give a file the same ids. Threading: plain functions
and values.
"""

import contextlib
import hashlib
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tmem.fs import syscalls
from tmem.types import OID_SIZE

COARSE_NS = 2_000_000_000
"""Two changes this close may carry the same time stamp (FAT counts in steps of two seconds)."""

_SHORT_HANDLE = 4 + OID_SIZE - 2 - 8  # with its type
_CHANGES = 8
_QUICK_NS = 3_000_000  # fewer than 8 ticks at any HZ
_COARSE_ROUNDS = 3
_TRYING_NS = 1_000_000_000


class Version(NamedTuple):
    """What a change of a file's content cannot leave as it was, time stamps permitting."""

    mtime_ns: int
    ctime_ns: int
    size: int


def version_of(status: os.stat_result) -> Version:
    """Return the version that `status` shows."""
    return Version(status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def version_at(descriptor: int) -> Version | None:
    """Return the version of the file open (O_PATH will do) at `descriptor`, None if the lower cannot tell."""
    try:
        return version_of(os.fstat(descriptor))
    except OSError:
        return None


def object_id(device: int, inode: int, handle: bytes | None, mark: bytes = b"") -> bytes:
    """Return the 24 bytes that name the file, and its object in a pool that is the mount's own.

    `mark` tells file systems apart that have had the same device number (`instances`). Files on the root's
    device of a mount with a pool of its own have none: where their handle is as short as usual, number and
    handle are the name themselves, which is found below Python, too (`reader_opens`).
    """
    if handle and not mark and len(handle) <= _SHORT_HANDLE:
        kind, opaque = int.from_bytes(handle[:4], sys.byteorder), handle[4:]
        if 0 < kind < 256:
            return (bytes([len(opaque), kind]) + inode.to_bytes(8, "little") + opaque).ljust(OID_SIZE, b"\0")
    # Both: some file systems use handles again (FUSE ones whose node ids are addresses), others numbers.
    name = b"n" + inode.to_bytes(8, "little") + (handle or b"")
    place = device.to_bytes(8, "little") + bytes([len(mark)]) + mark
    return hashlib.blake2b(place + name, digest_size=OID_SIZE).digest()


def stamps_of(version: Version) -> bytes:
    """Return the version as bytes of its own. Stamps may lie beyond 2262, where 64 bits of ns end."""
    try:
        return struct.pack("<qqq", *version)
    except struct.error:
        return b"".join(number.to_bytes(16, "little", signed=True) for number in version)


def version_object_id(name: bytes, version: Version) -> bytes:
    """Return the 24 bytes that name one version of the file called `name` (its `object_id`)."""
    return hashlib.blake2b(name + stamps_of(version), digest_size=OID_SIZE).digest()


def common_name(handle: bytes | None, inode: int) -> bytes:
    """Return what names a file on all hosts that mount its file system."""
    return b"h" + handle if handle else b"i" + inode.to_bytes(8, "little")


def has_common_names(directory: int) -> bool:
    """Say whether files of the file system of `directory` have a `common_name`.

    Handles of FUSE are node ids, which many count anew on each host: two files have the same, and where
    stamps are whole seconds the same version too.
    """
    return syscalls.file_system_type(directory) != syscalls.FUSE_MAGIC


class Content(NamedTuple):
    """One version of one file, as all hosts that mount its file system name it."""

    name: bytes
    """Its `common_name`."""
    version: Version


def is_settled(version: Version, now_ns: int, fine_stamps: bool) -> bool:
    """Say whether a change from now on must show in the version.

    Where stamps are coarse, a change in the same step as the last one would not. `now_ns` is the wall clock.
    """
    return fine_stamps or max(version.mtime_ns, version.ctime_ns) < now_ns - COARSE_NS


class Round(NamedTuple):
    """Eight changes of a file, each after a stat that showed the one before."""

    distinct: int
    """Stamps among them."""
    took_ns: int


def has_fine_stamps(directory: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> bool:
    """Say whether the file system gives each change that follows a stat a time stamp of its own.

    Linux does since 6.13 on ext4, xfs, btrfs and tmpfs (multigrain time stamps); tried out on an unnamed file
    in `directory`, which leaves no trace. Eight changes within microseconds would otherwise share a stamp.
    """
    descriptor = -1
    with contextlib.suppress(OSError):
        descriptor = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    if descriptor < 0:
        return False
    try:
        return are_fine(_rounds(descriptor, clock_ns))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def are_fine(rounds: Iterable[Round]) -> bool:
    """Judge by those rounds that were quick enough: on a busy machine five in a row were not.

    Fine needs one, coarse three; if they do not come within a second of trying, coarse is the safe side.
    """
    tried_ns = coarse = 0
    for one in rounds:
        tried_ns += one.took_ns
        if one.took_ns < _QUICK_NS:
            if one.distinct == _CHANGES:
                return True
            coarse += 1
        if coarse == _COARSE_ROUNDS or tried_ns > _TRYING_NS:
            break
    return False


def _rounds(descriptor: int, clock_ns: Callable[[], int]) -> Iterator[Round]:
    while True:
        start_ns = clock_ns()
        stamps = set()
        for _ in range(_CHANGES):
            os.pwrite(descriptor, b"x", 0)
            stamps.add(os.fstat(descriptor).st_ctime_ns)
        yield Round(len(stamps), clock_ns() - start_ns)


def handle_of(descriptor: int, to_open: bool = True) -> bytes | None:
    """Return the file handle of an open file, or None where the file system has none (see `syscalls`)."""
    try:
        return syscalls.file_handle(descriptor, to_open)
    except OSError:
        return None
