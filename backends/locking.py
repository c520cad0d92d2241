"""Lock a server's memory, mapping by mapping, and keep what it maps later locked too.

``mlockall(MCL_CURRENT)`` would also fault in and pin nbdkit's static buffers, 200 MB that it never touches,
and populate the whole segment. So each line of ``/proc/self/maps`` is locked by itself (mlock faults it in),
except that buffer and mappings that cannot be locked; then ``MCL_FUTURE`` covers the stacks and heaps still
to come. The segment is locked as far as it has been faulted (MLOCK_ONFAULT), and only where its file system
can be swapped out: locking costs nothing else there, and a ``noswap`` tmpfs does not need it.

Memory locks are lost by fork and exec: call this in the process that serves, after its last fork.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles

_MCL_FUTURE, _MCL_ONFAULT = 2, 4
MLOCK_ONFAULT = 1
_MADV_POPULATE_READ = 22  # Linux 5.14
_UNUSED_BSS_BYTES = 64 << 20
"""A zero-filled region of the executable above this size is nbdkit's table of buffers (201 MB in 1.32)."""

_UNLOCKABLE = ("[vvar", "[vdso]", "[vsyscall]")


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps: addresses, permissions such as ``rw-p``, the name (may be empty), and which
    file it is: (major, minor, inode), zeros for none. A name changes when the file is renamed or removed."""

    start: int
    end: int
    permissions: str
    name: str
    file: tuple[int, int, int]

    @property
    def size_bytes(self) -> int:
        """The size of the mapping."""
        return self.end - self.start


@dataclass(frozen=True)
class LockReport:
    """What came of locking: bytes in the locked mappings, and what the kernel refused (one line each)."""

    locked_bytes: int
    refused: tuple[str, ...]


def parse_maps(text: str) -> list[Mapping]:
    """Parse the text of /proc/PID/maps."""
    mappings = []
    for line in procfiles.lines_of(text):
        addresses, permissions, _offset, device, inode, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        major, minor = (int(number, 16) for number in device.split(":"))
        mappings.append(Mapping(start, end, permissions, name[0] if name else "", (major, minor, int(inode))))
    return mappings


def to_lock(
    mappings: Iterable[Mapping], executable: str, segment: tuple[int, int, int] | None
) -> Iterator[Mapping]:
    """Yield the mappings worth locking, those of the file `segment` not among them."""
    previous: Mapping | None = None
    for mapping in mappings:
        # The static zero-filled data of a program is the nameless mapping right behind its data segment.
        bss = (
            previous is not None
            and not mapping.name
            and previous.name == executable
            and previous.end == mapping.start
            and mapping.size_bytes > _UNUSED_BSS_BYTES
        )
        previous = mapping
        accessible = any(mode in mapping.permissions[:3] for mode in "rwx")
        if accessible and not bss and mapping.file != segment and not mapping.name.startswith(_UNLOCKABLE):
            yield mapping


def lock_process(
    segment: Path | None,
    lock_segment: bool = False,
    future_on_fault: bool = False,
    anonymous_on_fault: bool = False,
) -> LockReport:
    """Lock this process's memory, the mapping of the segment (None: there is none yet) only if told to.

    What is mapped from now on is faulted in at once, or, with `future_on_fault`, locked page by page as it is
    touched: for who maps a segment later, all of which would be backed otherwise. With `anonymous_on_fault`
    so is what is mapped now and no file's (stacks, heaps), as far as nothing was ever written there. Before
    Linux 5.14 that is faulted in all the same.
    Never raises for what the kernel refuses: the report says it. OSError if there is no file `segment`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mappings = parse_maps(procfiles.text(Path("/proc/self/maps")))
    refused: list[str] = []

    def lock(mapping: Mapping, flags: int) -> int:
        size = ctypes.c_size_t(mapping.size_bytes)
        if libc.mlock2(ctypes.c_void_p(mapping.start), size, ctypes.c_uint(flags)) == 0:
            return mapping.size_bytes
        # A mapping can be gone since (a buffer that reading the list freed): that is ENOMEM, and no loss.
        reason = os.strerror(ctypes.get_errno())
        refused.append(f"{mapping.name or 'anonymous'} {mapping.size_bytes >> 10} kB: {reason}")
        return 0

    def lock_used(mapping: Mapping) -> int:
        address, size = ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size_bytes)
        locked = libc.mlock2(address, size, ctypes.c_uint(MLOCK_ONFAULT)) == 0
        # What is swapped out by now comes back; where there is nothing yet, zeros are shared.
        there = locked and libc.madvise(address, size, _MADV_POPULATE_READ) == 0
        return mapping.size_bytes if there else lock(mapping, 0)

    executable = str(Path("/proc/self/exe").readlink())
    file = _file(segment) if segment is not None else None
    locked_bytes = 0
    for mapping in to_lock(mappings, executable, file):
        by_page = anonymous_on_fault and not mapping.file[2]
        locked_bytes += lock_used(mapping) if by_page else lock(mapping, 0)
    if lock_segment:
        locked_bytes += sum(lock(mapping, MLOCK_ONFAULT) for mapping in mappings if mapping.file == file)
    if refused:
        # With the limit on locked memory reached, MCL_FUTURE would make every new thread fail.
        return LockReport(locked_bytes, tuple(refused))
    if libc.mlockall(_MCL_FUTURE | (_MCL_ONFAULT if future_on_fault else 0)) != 0:
        refused.append(f"future mappings: {os.strerror(ctypes.get_errno())}")
    return LockReport(locked_bytes, tuple(refused))


def _file(path: Path) -> tuple[int, int, int]:
    """Return which file it is, as `Mapping.file` has it."""
    status = path.stat()
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def swappable(path: Path, mountinfo: str | None = None) -> bool:
    """Return whether the kernel may swap out the pages of the file at `path`: on tmpfs without ``noswap``."""
    if mountinfo is None:
        mountinfo = procfiles.text(procfiles.MOUNTS)
    best = (-1, False)
    for line in procfiles.lines_of(mountinfo):
        left, _, right = line.partition(" - ")
        mount_point = Path(procfiles.unescape(left.split(" ")[4]))
        file_system, _source, *options = right.split(" ")
        with contextlib.suppress(ValueError):
            depth = len(path.relative_to(mount_point).parts)
            on_tmpfs = file_system == "tmpfs" and "noswap" not in (options[0] if options else "").split(",")
            # The last of several mounts on one point is the one on top, so it wins a tie.
            if best[0] < 0 or depth <= best[0]:
                best = (depth, on_tmpfs)
    return best[1]
