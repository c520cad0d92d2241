"""Where a file lies: its file system, the disks below that, and what the kernel says of both.

Facts only, from /proc, /sys and two system calls; what they mean for a spill file is the business of
`tierchecks`. What cannot be told is empty, or None. Nothing is changed but by `keep_in_place`. Threading:
plain functions.
"""

import array
import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles

SWAPS = Path("/proc/swaps")

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # Linux 6.1
_STATX_BYTES = 256
_MASK, _DIO_MEMORY_ALIGN = 0, 152  # offsets in struct statx
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
_NOCOW = 0x00800000  # FS_NOCOW_FL: 'chattr +C'
_DEEP = 8


@dataclass(frozen=True)
class Place:
    """Where a file lies."""

    kind: str
    """Type of the file system, such as ``ext4`` or ``fuse.sshfs``."""
    source: str
    """What it was mounted from."""
    devices: tuple[str, ...]
    """The block devices below it, as in /sys/block, each before what it consists of; also those below a file
    that is a loop device. None for a file system that has none, or does not say so."""
    free_bytes: int
    """What root may still write there."""
    direct: bool | None
    """Whether direct I/O goes past the page cache; None where the kernel does not say (before Linux 6.1)."""
    rewrites_in_place: bool | None
    """Whether a block that is written again stays where it is, so that no room is needed for it; None where
    that is not known."""
    rotating: str | None
    """The disk of which the kernel believes that it rotates, if there is one."""


_IN_PLACE = ("ext2", "ext3", "ext4", "xfs")
_ELSEWHERE = ("zfs", "bcachefs", "nilfs2")


def place_of(file: Path, mounts: Path = procfiles.MOUNTS, sys: Path = Path("/sys")) -> Place:
    """Return where `file` lies. OSError if it cannot be reached."""
    with _opened(file) as descriptor:
        kind, source = _mounted(descriptor, mounts)
        free = os.fstatvfs(descriptor)
        in_place = True if kind in _IN_PLACE else False if kind in _ELSEWHERE else None
        if kind == "btrfs":
            in_place = _is_nocow(descriptor)
        devices = tuple(dict.fromkeys(_devices(descriptor, source, sys, _DEEP)))
        return Place(
            kind,
            source,
            devices,
            free.f_bfree * free.f_frsize,
            _direct(descriptor),
            in_place,
            next((name for name in devices if _rotates(sys, name)), None),
        )


def swap_disks(swaps: Path = SWAPS, sys: Path = Path("/sys")) -> dict[str, str]:
    """Return the block devices below the swap areas in use, each with its area."""
    found: dict[str, str] = {}
    lines = procfiles.lines(swaps) if swaps.exists() else []  # a kernel may have no swap
    for line in lines[1:]:
        area = procfiles.unescape(line.split()[0])
        with contextlib.suppress(OSError), _opened(area) as descriptor:
            for name in _devices(descriptor, area, sys, _DEEP):
                found.setdefault(name, area)
    return found


def keep_in_place(descriptor: int) -> None:
    """Have btrfs write the blocks of a file, which is empty yet, where they are. Others refuse: OSError."""
    flags = _flags(descriptor)
    flags[0] |= _NOCOW
    fcntl.ioctl(descriptor, _SET_FLAGS, flags)


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[int]:
    """Open a file or a device to ask about it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mounted(descriptor: int, mounts: Path) -> tuple[str, str]:
    """Return type and source of the mount that the open file is reached by.

    By the number of the mount: that of the device is another one in mountinfo than in stat(2) for btrfs."""
    wanted = None
    for line in procfiles.lines(Path(f"/proc/self/fdinfo/{descriptor}")):
        if line.startswith("mnt_id:"):
            wanted = line.split()[1]
    for line in procfiles.lines(mounts):
        before, _, after = line.partition(" - ")
        if before.split(" ")[0] == wanted:
            kind, source, *_ = after.split(" ")
            return kind, procfiles.unescape(source)
    return "", ""


def _devices(descriptor: int, source: str, sys: Path, deep: int) -> Iterator[str]:
    status = os.fstat(descriptor)
    number = status.st_rdev or status.st_dev
    if not os.major(number):  # a file system of several devices has a number of its own
        with contextlib.suppress(OSError):
            number = Path(source).stat().st_rdev
    link = sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if link.exists():
        yield from _below(link.resolve().name, sys, deep)


def _below(name: str, sys: Path, deep: int) -> Iterator[str]:
    """Yield a block device and what it consists of."""
    if deep <= 0:
        return
    yield name
    for part in _parts(sys, name):
        yield from _below(part, sys, deep - 1)
    backing = _text(sys / "class/block" / name / "loop/backing_file")
    if backing:
        with contextlib.suppress(OSError), _opened(backing) as descriptor:
            yield from _devices(descriptor, backing, sys, deep - 1)


def _parts(sys: Path, name: str) -> list[str]:
    """Return what a block device consists of: the disk of a partition, the devices of an array or a map."""
    directory = (sys / "class/block" / name).resolve()
    if (directory / "partition").exists():
        return [directory.parent.name]
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in (directory / "slaves").iterdir())
    return []


def _rotates(sys: Path, name: str) -> bool:
    """Say whether a disk rotates; what consists of others only repeats what they say."""
    return not _parts(sys, name) and _text(sys / "block" / name / "queue/rotational") == "1"


def _text(path: Path) -> str:
    try:
        return procfiles.text(path).strip()
    except OSError:
        return ""


def _direct(descriptor: int) -> bool | None:
    """Say whether direct I/O to the open file is done, by statx(2), which Python 3.11 has not."""
    result = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except AttributeError:
        return None
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, result):
        return None
    (mask,) = struct.unpack_from("=I", result, _MASK)
    (align,) = struct.unpack_from("=I", result, _DIO_MEMORY_ALIGN)
    return bool(align) if mask & _STATX_DIOALIGN else None


def _flags(descriptor: int) -> "array.array[int]":
    flags = array.array("I", [0])
    fcntl.ioctl(descriptor, _GET_FLAGS, flags)
    return flags


def _is_nocow(descriptor: int) -> bool | None:
    try:
        return bool(_flags(descriptor)[0] & _NOCOW)
    except OSError:
        return None
