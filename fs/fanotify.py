"""The kernel's reports of changes on one file system: which file was changed, how, and by which process.

One mark covers the file system, whatever number of files is of interest: it costs nothing per file and misses
no name, link or directory. The price is paid by writers: each write(2) anywhere on the file system takes 0.7
us longer (0.9 to 1.6 us with 100 bytes; kernel 6.18, ext4 and tmpfs), as much as to an inode that inotify
watches, and reading a report takes 0.3 us. A watch for each inode would take 3 us and keep the inode in
memory. Reports of one file that are not read yet become one.

A change is reported before the system call that makes it returns, so who finds nothing `pending` has missed
nothing that was over before. Not reported are stores to mapped memory and writes of libaio (the file's last
close is), new access times, and what other machines do to a network file system. Needs CAP_SYS_ADMIN.
Threading: plain methods that do not block; one thread at a time.
"""

import array
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from typing import NamedTuple

from tmem.fs import syscalls

MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF = 0x400, 0x800
OVERFLOW = 0x4000
"""More happened than the queue of 16,384 reports held; what, is not known."""
NAMES = MOVED_FROM | MOVED_TO | CREATE | DELETE
"""Changes of a directory's entries; the file reported is the directory."""

_ON_DIRECTORIES = 0x40000000
_MASK = MODIFY | ATTRIB | CLOSE_WRITE | NAMES | DELETE_SELF | MOVE_SELF | _ON_DIRECTORIES
_CLOEXEC, _NONBLOCK, _REPORT_FID = 0x1, 0x2, 0x200
_ADD, _WHOLE_FILE_SYSTEM = 0x1, 0x100
_EVENT = struct.Struct("=IBBHQii")
_INFORMATION = struct.Struct("=BBH")
_HANDLE_SIZE = struct.Struct("=I")
_FSID_BYTES = 8
_FID = 1
_READ_BYTES = 64 << 10

_LOCAL = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
}
"""File systems that only this kernel changes. (Others may change behind its back, as NFS, or take the files
of one that does, as overlayfs.)"""


def is_local(directory: int) -> bool:
    """Say whether only this kernel changes the file system of `directory`, and answers for it by itself."""
    return syscalls.file_system_type(directory) in _LOCAL


class Event(NamedTuple):
    """What happened to one file."""

    mask: int
    """Kinds of changes, together since the last report was read."""
    pid: int
    """Who did it; 0 if in another PID namespace."""
    handle: bytes
    """The file's handle as `syscalls.file_handle` returns it."""


class Events:
    """The reports of one file system; `descriptor` is the fanotify group, owned from now on."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._pending = array.array("i", [0])

    @classmethod
    def of(cls, directory: int) -> "Events | None":
        """Return the reports of the file system that `directory` is on; None where there are none to rely on.

        They begin now.
        """
        descriptor = -1
        try:
            if not is_local(directory):
                return None
            descriptor = syscalls.fanotify_init(_CLOEXEC | _NONBLOCK | _REPORT_FID, os.O_RDONLY)
            syscalls.fanotify_mark(descriptor, _ADD | _WHOLE_FILE_SYSTEM, _MASK, directory, b".")
        except OSError:  # not permitted, not built in, or a subvolume
            if descriptor >= 0:
                os.close(descriptor)
            return None
        return cls(descriptor)

    def pending(self) -> int:
        """Return how many reports have not been read."""
        fcntl.ioctl(self.descriptor, termios.FIONREAD, self._pending)
        return self._pending[0] // _EVENT.size  # whatever comes with each of them, it counts this much

    def read(self) -> Iterator[Event]:
        """Yield the reports that are pending now; those that come meanwhile may be among them."""
        left = self.pending()
        while left > 0:
            try:
                content = os.read(self.descriptor, _READ_BYTES)
            except BlockingIOError:
                return
            for event in _events(content):
                left -= 1
                yield event

    def close(self) -> None:
        """End the reports."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _events(content: bytes) -> Iterator[Event]:
    at = 0
    while at < len(content):
        length, _, _, header, mask, _, pid = _EVENT.unpack_from(content, at)
        yield Event(mask & ~_ON_DIRECTORIES, pid, _handle(content, at + header, at + length))
        at += length


def _handle(content: bytes, at: int, end: int) -> bytes:
    """Return the handle among the pieces of information between `at` and `end`; empty if there is none."""
    while at < end:
        kind, _, length = _INFORMATION.unpack_from(content, at)
        if kind == _FID:
            start = at + _INFORMATION.size + _FSID_BYTES
            size = _HANDLE_SIZE.unpack_from(content, start)[0]
            return content[start + 4 : start + 8 + size]  # its type and its bytes
        at += length
    return b""
