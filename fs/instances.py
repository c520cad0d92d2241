"""Which file system a device number means: numbers are used again, and images can be alike to the inode.

While a mount is there, the descriptor of its lower directory keeps that file system, and so its device
number means it. A shared pool outlives mounts: another image on the same loop device would have the same
numbers, the same handles, and, if it was made by a reproducible build, the same time stamps. So the mounts
that share a pool agree on a random *mark* of each device that they cache: it lies beside the segment, and
each of them holds a lock on it for as long as it keeps the file system. Who finds nobody there makes a new
mark.

File systems that are mounted below the lower directory can be replaced while the mount is there. Their mark
is the number of that mount, which the kernel never uses again (6.8 and later); other tmem mounts do not
share their pages. Threading: the event loop's thread.
"""

import contextlib
import fcntl
import logging
import os
import struct
import time
from pathlib import Path

from tmem.fs import syscalls

log = logging.getLogger(__name__)

_MARK_BYTES = 16
_PATIENCE_SECONDS = 2.0


class Instances:
    """The marks of the file systems of a mount, whose lower directory is on `device`.

    `directory` is where mounts that share a pool agree on marks; None: the pool is the mount's own.
    """

    def __init__(self, device: int, directory: Path | None) -> None:
        self._device = device
        self._shared = directory is not None
        self._lock = -1
        self._alone = False
        self.mark = b""
        """Of the lower directory's file system."""
        if directory is None:
            return
        self._own = self.mark = os.urandom(_MARK_BYTES)
        try:
            self._agree(directory / f"lower-{device:x}")
        except OSError as error:
            log.warning("cannot share what is cached with other mounts: %s", error)

    def mark_of(self, device: int, descriptor: int) -> bytes:
        """Return the mark of the file system that the file open at `descriptor` (O_PATH will do) is on."""
        if device == self._device:
            return self.mark
        return (self._own if self._shared else b"") + syscalls.mount_number(descriptor).to_bytes(8, "little")

    def keep(self, mark: bytes) -> None:
        """Go on with the mark of the code before this, which has kept the file system until now."""
        if self._alone and mark:
            os.pwrite(self._lock, mark, 0)
        self.mark = mark

    def close(self) -> None:
        """Let others make a new mark."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _agree(self, path: Path) -> None:
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if _locked(self._lock, fcntl.F_WRLCK):
                self._alone = True
                os.pwrite(self._lock, self.mark, 0)
                _locked(self._lock, fcntl.F_RDLCK)
                return
            if _locked(self._lock, fcntl.F_RDLCK):
                self.mark = os.pread(self._lock, _MARK_BYTES, 0)
                return
            time.sleep(0.01)
        raise TimeoutError(f"another mount keeps {path} locked")


def _locked(descriptor: int, kind: int) -> bool:
    with contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 1, 0))
        return True
    return False
