"""Passthrough: files that the kernel reads and writes below the mount by itself (Linux 6.9).

A file that is not cached needs nobody between its programs and the lower file. The kernel is given a
*backing file* for it (a number), and the reply to each of its opens names that (`_native.Reader`); reads,
writes and mapped pages then go to the lower file in the program's own call. Opens, closes, attributes and
truncation still come here. The kernel demands that all opens of a file at a time are of one kind and name the
same backing file: `opening` decides at the first one and keeps the number until the last one is closed.

Who writes so is to the kernel who gave it the backing file, root. So that set-id bits go as they do when a
user writes, the file is given without the right to keep them.

Not to be had, and then 0 without further ado: older kernels, mounts of users, lower files on overlayfs or on
another mount that passes through. Threading: the event loop's thread.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct

from tmem.fs.acting import losing_set_ids

_MAP = struct.Struct("=iIQ")
_BACKING_OPEN = 1 << 30 | _MAP.size << 16 | 229 << 8 | 1
_BACKING_CLOSE = 1 << 30 | 4 << 16 | 229 << 8 | 2
_SET_IDS = stat.S_ISUID | stat.S_ISGID
_NEVER = (errno.ELOOP, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY)


class Backing:
    """The backing files of one connection, whose device is open at `fuse` and stays the caller's."""

    def __init__(self, fuse: int) -> None:
        self._fuse = fuse
        self._hopeless: set[int] = set()  # devices whose files cannot be passed through

    def open(self, path: str, status: os.stat_result) -> int:
        """Return the number of a new backing file for the lower file at `path`, 0 if it cannot have one."""
        # A set-id bit stays when root writes, so who writes must be asked each time.
        if status.st_dev in self._hopeless or status.st_mode & _SET_IDS or not stat.S_ISREG(status.st_mode):
            return 0
        try:
            # For reading: a descriptor that writes would make a writer of each reader. The kernel opens the
            # file once more for each open, as that one wants it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return 0
        try:
            with losing_set_ids():
                return int(fcntl.ioctl(self._fuse, _BACKING_OPEN, bytearray(_MAP.pack(descriptor, 0, 0))))
        except OSError as error:
            if error.errno in _NEVER:
                self._hopeless.add(status.st_dev)
            return 0
        finally:
            os.close(descriptor)

    def close(self, number: int) -> None:
        """Give a backing file back; who has it open keeps it."""
        with contextlib.suppress(OSError):  # the connection is over
            fcntl.ioctl(self._fuse, _BACKING_CLOSE, struct.pack("=I", number))
