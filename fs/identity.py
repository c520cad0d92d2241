"""Which file a page belongs to, and which state of that file it shows.

The object id names the file: its device and its file handle (which holds the inode's generation; inode number
where the file system has no handles). It does not hold the version, so that a file which is written through
the mount keeps its other pages. The version (mtime, ctime, size) is kept beside it, in memory, by
`coherence`. In a pool that several mounts share there is an object for each version instead (`sharing`).
Nothing here depends on the mount: all mounts of a kernel give a file the same ids. Threading: plain functions
and values.
"""

import contextlib
import hashlib
import os
import struct
import time
from typing import NamedTuple

from tmem.fs import syscalls
from tmem.types import OID_SIZE

COARSE_NS = 2_000_000_000
"""Two changes this close may carry the same time stamp (FAT counts in steps of two seconds)."""


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

    `mark` tells file systems apart that have had the same device number (`instances`).
    """
    name = b"h" + handle if handle else b"i" + inode.to_bytes(8, "little")
    place = device.to_bytes(8, "little") + bytes([len(mark)]) + mark
    return hashlib.blake2b(place + name, digest_size=OID_SIZE).digest()


def version_object_id(name: bytes, version: Version) -> bytes:
    """Return the 24 bytes that name one version of the file called `name` (its `object_id`)."""
    stamps = struct.pack("<qqq", *version)
    return hashlib.blake2b(name + stamps, digest_size=OID_SIZE).digest()


def common_name(handle: bytes | None, inode: int) -> bytes:
    """Return what names a file on all hosts that mount its file system."""
    return b"h" + handle if handle else b"i" + inode.to_bytes(8, "little")


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


def has_fine_stamps(directory: int) -> bool:
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
        return any(_stamps_differ(descriptor) for _ in range(5))  # a slow round proves nothing: try again
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _stamps_differ(descriptor: int) -> bool:
    start_ns = time.monotonic_ns()
    stamps = set()
    for _ in range(8):
        os.pwrite(descriptor, b"x", 0)
        stamps.add(os.fstat(descriptor).st_ctime_ns)
    return len(stamps) == 8 and time.monotonic_ns() - start_ns < 3_000_000  # fewer than 8 ticks at any HZ


def handle_of(descriptor: int) -> bytes | None:
    """Return the file handle of an open file, or None where the file system has none."""
    try:
        return syscalls.file_handle(descriptor)
    except OSError:
        return None
