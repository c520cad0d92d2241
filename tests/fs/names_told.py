"""What a reader tells of names and attributes below Python, taken apart, and what it should be."""

import os
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from .reader_desk import GETATTR, Desk

ATTRIBUTES = struct.Struct("=QQQqqqIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_DIRENT = struct.Struct("=QQII")


class Entry(NamedTuple):
    """One entry of a listing that the kernel has got."""

    name: bytes
    node: int
    generation: int
    name_seconds: int
    attribute_seconds: int
    attributes: tuple[int, ...]
    ino: int
    number: int
    kind: int


def entries(page: bytes) -> list[Entry]:
    found = []
    at = 0
    while at < len(page):
        node, generation, name_seconds, attribute_seconds, _, _ = _ENTRY.unpack_from(page, at)
        attributes = ATTRIBUTES.unpack_from(page, at + _ENTRY.size)
        ino, off, length, kind = _DIRENT.unpack_from(page, at + _ENTRY.size + ATTRIBUTES.size)
        start = at + _ENTRY.size + ATTRIBUTES.size + _DIRENT.size
        assert node == 0 or ino == attributes[0]
        name = page[start : start + length]
        found.append(
            Entry(name, node, generation, name_seconds, attribute_seconds, attributes, ino, off, kind)
        )
        at = (start + length + 7) & ~7
    assert at == len(page)
    return found


def wanted(status: os.stat_result, node: int) -> tuple[int, ...]:
    """Return what the kernel must be told of a file."""
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return (
        *(node, status.st_size, status.st_blocks, *(ns // 10**9 for ns in times)),
        *(ns % 10**9 for ns in times),
        *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid),
        *(status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0),
    )


def wanted_of(path: Path) -> tuple[int, ...]:
    """Return the same of a file whose node has its number."""
    return wanted(path.stat(), path.stat().st_ino)


def every_kind(directory: Path) -> None:
    """Make files of every kind, with attributes at the limits of what can be told."""
    (directory / "empty").touch()
    (directory / "file").write_bytes(b"x" * 12345)
    with (directory / "huge").open("wb") as file:
        file.truncate(1 << 43)
    (directory / "directory").mkdir(mode=0o1711)
    (directory / "symlink").symlink_to("x" * 1000)
    os.mkfifo(directory / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(directory / "socket"))
    os.link(directory / "file", directory / "another name")
    (directory / os.fsdecode(b"\xff\n\xfe")).touch()
    (directory / "early").touch()
    os.utime(directory / "early", ns=(-(10**18) - 1, -999_999_999))
    os.utime(directory / "file", ns=(1_700_000_000_000_000_001, 1_800_000_000_999_999_999))
    if os.geteuid() == 0:
        os.mknod(directory / "null", stat.S_IFCHR | 0o640, os.makedev(4095, 1048575))
        os.mknod(directory / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 3))
        (directory / "far").touch()
        os.chown(directory / "far", 0xFFFFFFFE, 0x80000001)
        (directory / "far").chmod(0o6751)


def ask(desk: Desk, node: int) -> int:
    """Send a GETATTR of a node."""
    unique = next(desk.uniques)
    desk.kernel.send(struct.pack("=IIQQIIII4x", 56, GETATTR, unique, node, 0, 0, 0, 0) + bytes(12))
    return unique


def listed(lists: Desk, place: Path, names: list[bytes], start: int = 0) -> list[Entry]:
    """List some names of a directory once, however many pages that takes."""
    found: list[Entry] = []
    while page := entries(lists.page_of(place, names, start)):
        found += [entry._replace(number=entry.number - 1) for entry in page]
        start = found[-1].number
    return found
