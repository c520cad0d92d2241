"""Has the kernel read swapped-out pages of programs into RAM, a few at a time, without touching the programs.

``process_madvise(MADV_WILLNEED)`` (Linux 5.10) reads pages into the swap cache: there they are clean, their
slots stay as they are, and the kernel drops them again without writing if it needs the memory, so a step can
be regretted at no cost. Which pages of a process are swapped out its ``pagemap`` says. When nearly all of a
device is there, swapoff has next to nothing to read and takes moments.

At most `PAGES_PER_S`, and for a tenth of the time of a CPU. Pages of files on a tmpfs are not found this way,
nor memory of no process. Whose page lies on which device is not to be seen: those of all devices come. Needs
root; Linux only. Any thread; what it sleeps and how it reads is given, for tests.
"""

import ctypes
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tmem.types import PAGE_SIZE

BATCH_PAGES = 256
PAGES_PER_S = 2560
"""10 MiB a second: about a tenth of a CPU for the server."""
CPU_SHARE = 10
"""This part of a CPU's time is taken at most."""

_SYS_PROCESS_MADVISE, _MADV_WILLNEED = 440, 3
_WINDOW_ENTRIES = 8192
_ENTRY_BYTES = 8
_SWAPPED = re.compile(rb"\x01+")
# Of the last byte of an entry: bit 63 is "present", bit 62 "swapped".
_IS_SWAPPED = bytes(int(byte & 0xC0 == 0x40) for byte in range(256))

Range = tuple[int, int]
"""First page (its address divided by the page size) and number of pages."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


def swapped_runs(entries: bytes) -> Iterator[Range]:
    """Yield the runs of swapped-out pages in a piece of ``pagemap``, counted from its beginning."""
    for run in _SWAPPED.finditer(entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_IS_SWAPPED)):
        yield run.start(), run.end() - run.start()


def batches(runs: Iterator[Range]) -> Iterator[list[Range]]:
    """Put runs together, and apart, to `BATCH_PAGES` pages each; the last one has what is left."""
    batch: list[Range] = []
    room = BATCH_PAGES
    for first, count in runs:
        while count:
            some = min(count, room)
            batch.append((first, some))
            first, count, room = first + some, count - some, room - some
            if not room:
                yield batch
                batch, room = [], BATCH_PAGES
    if batch:
        yield batch


def swapping_processes(proc: Path = Path("/proc")) -> Iterator[tuple[int, int]]:
    """Yield processes with anonymous pages in swap, and how many bytes those are; most first."""
    found = []
    for directory in proc.glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "status").read_text(errors="replace").partition("\nVmSwap:")[2]
            if words and (size := int(words.split(maxsplit=1)[0])):
                found.append((size << 10, int(directory.name)))
    for size, pid in sorted(found, reverse=True):
        yield pid, size


def bring_in(
    go_on: Callable[[], bool],
    proc: Path = Path("/proc"),
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Read in what processes have swapped out, for as long as `go_on` says so, asked before each step.

    Returns how many pages were asked for. Raises `OSError` with ENOSYS if the kernel cannot.
    """
    pages = 0
    for pid, size in swapping_processes(proc):
        with suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            descriptor = os.pidfd_open(pid)
            try:
                pages += _bring_in_one(descriptor, proc / str(pid), size // PAGE_SIZE, go_on, sleep)
            finally:
                os.close(descriptor)
        if not go_on():
            break
    return pages


def _bring_in_one(
    pidfd: int, process: Path, npages: int, go_on: Callable[[], bool], sleep: Callable[[float], None]
) -> int:
    pages = 0
    spent = _Spent(sleep)
    runs = _runs(process, spent)
    for batch in batches(runs):
        if not go_on():
            break
        _will_need(pidfd, batch)
        count = sum(count for _, count in batch)
        pages += count
        spent.pause(count / PAGES_PER_S)
        if pages >= npages:
            break
    return pages


class _Spent:
    """Keeps this thread within its share of a CPU."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._from_s = time.thread_time()

    def pause(self, least_s: float = 0.0) -> None:
        """Sleep for so long, and for as long as what was spent since the last time asks for."""
        spent_s = time.thread_time() - self._from_s
        if least_s or spent_s > 0.002:
            self._sleep(max(least_s, spent_s * (CPU_SHARE - 1)))
            self._from_s = time.thread_time()


def _runs(process: Path, spent: _Spent) -> Iterator[Range]:
    """Yield the runs of swapped-out pages of a process."""
    with (process / "pagemap").open("rb", buffering=0) as pagemap:
        for line in (process / "maps").read_text(errors="replace").splitlines():
            begin, end = (int(word, 16) // PAGE_SIZE for word in line.split(maxsplit=1)[0].split("-"))
            if end * _ENTRY_BYTES >= 1 << 62:
                continue  # the kernel's own, which cannot be sought
            while begin < end:
                count = min(end - begin, _WINDOW_ENTRIES)
                entries = os.pread(pagemap.fileno(), count * _ENTRY_BYTES, begin * _ENTRY_BYTES)
                for first, length in swapped_runs(entries):
                    yield begin + first, length
                begin += count
                spent.pause()


def _will_need(pidfd: int, ranges: list[Range]) -> None:
    vector = (_Iovec * len(ranges))()
    for at, (first, count) in enumerate(ranges):
        vector[at].base, vector[at].bytes = first * PAGE_SIZE, count * PAGE_SIZE
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.syscall(
        ctypes.c_long(_SYS_PROCESS_MADVISE),
        ctypes.c_int(pidfd),
        vector,
        ctypes.c_size_t(len(ranges)),
        ctypes.c_int(_MADV_WILLNEED),
        ctypes.c_uint(0),
    )
    if done < 0 and (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EPERM, errno.ESRCH):
        # Others say that a mapping has changed meanwhile.
        raise OSError(number, os.strerror(number))
