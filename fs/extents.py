"""Where open files have data: holes are found (SEEK_DATA, SEEK_HOLE), made and filled (fallocate).

pyfuse3 has no such requests: they come past libfuse (`shortcuts`), with the native reader. With the other
loops the kernel takes a file for data as a whole, and refuses fallocate. Threading: the event loop's thread,
but what asks or changes the lower.
"""

import errno
import os

from tmem.fs import syscalls
from tmem.fs.acting import drop_set_ids, within_limits
from tmem.fs.openfile import OpenFile
from tmem.fs.opening import Opening


class Extents(Opening):
    """Handlers of what is allocated of open files."""

    async def seek(self, fh: int, offset: int, whence: int) -> int:
        """Return where data or a hole (os.SEEK_DATA, os.SEEK_HOLE) comes next. OSError."""
        file = self._files[fh]
        find = self._end_of_data if self._may_be_stored_to(file) else os.lseek
        with file.used():
            return await self.read_in_thread(file.inode, find, file.descriptor, offset, whence)

    def _may_be_stored_to(self, file: OpenFile) -> bool:
        """Say whether the kernel may have data of a file that its lower does not know of yet.

        Stores to mapped memory come when they are written back, at the latest before the last close of who
        has mapped it.
        """
        if file.inode.backing:
            return False
        return any(other.writable and other.inode is file.inode for other in self._files.values())

    @staticmethod
    def _end_of_data(descriptor: int, offset: int, whence: int) -> int:
        """Take the whole file for data, as the kernel does where it cannot ask."""
        size = os.fstat(descriptor).st_size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return size if whence == os.SEEK_HOLE else offset

    async def allocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Do what fallocate(2) does to the lower file, as a write does it. OSError."""
        file = self._files[fh]
        descriptor = file.descriptor
        limits = self.limits_of(file.inode, file.caller)
        lost = False

        def work() -> None:
            nonlocal lost
            with change.seen(descriptor):
                lost = drop_set_ids(descriptor, os.fstat(descriptor), file.caller)
                change.flush(offset, offset + length)
                try:
                    with within_limits(limits):
                        syscalls.fallocate(descriptor, mode, offset, length)
                finally:
                    change.flush(offset, offset + length)

        with self.change_of(file.state, descriptor, self.is_here(file.inode)) as change:
            try:
                await self.change_in_thread(work)
            finally:
                self.tell_lost(file.inode, lost)
                self.rewrites += 1
