"""Reading and writing lower files: whole ranges, whatever single calls return.

Threading: plain functions that may block, except `read_cached`, which never does.
"""

import contextlib
import errno
import mmap
import os
import time

from tmem.types import PAGE_SIZE

_MAX_FOLIO = 2 << 20
_DAY_NS = 24 * 3600 * 10**9
_CANNOT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL)


def read_until_error(descriptor: int, start: int, buffer: memoryview) -> tuple[int, OSError | None]:
    """Fill `buffer` from `start` on; the bytes read, fewer at the end of the file or before an error."""
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if not count:
                break
            done += count
    except OSError as error:
        return done, error
    return done, None


def read_fully(descriptor: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from `start` on; the bytes read, fewer only at the end of the file."""
    done, failure = read_until_error(descriptor, start, buffer)
    if failure is not None:
        raise failure
    return done


def whole_pages(start: int, count: int, size: int) -> int:
    """Return how many pages are known to their ends when `count` bytes were read from `start` on.

    `size` is the file's: its last page is known if the bytes end where the file does. Where they end earlier,
    because of an error or a lower that says otherwise than it does, the rest of a page cannot be told.
    """
    if start + count == size:
        return -(-count // PAGE_SIZE)
    return max(min(start + count, size) - start, 0) // PAGE_SIZE


def read_cached(descriptor: int, start: int, buffer: memoryview) -> int:
    """Read what the kernel has in its page cache from `start` on, up to the first page it has not."""
    try:
        return os.preadv(descriptor, [buffer], start, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise


def write_fully(descriptor: int, start: int, data: memoryview) -> int:
    """Write all of `data`; fewer bytes only if an error follows a part that was written."""
    done = os.pwrite(descriptor, data, start)
    with contextlib.suppress(OSError):
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], start + done)
    return done


def drop_cached(descriptor: int, start: int, end: int, put_from: int, size: int) -> None:
    """Have the kernel drop its copy of the bytes from `start` to `end`; the pool has them from `put_from` on.

    The kernel drops only whole folios, which can be as large as 2 MiB and straddle two requests: so each
    request of a stream reaches back to where such a folio can begin, and the last one to the end of the file.
    """
    start = max(put_from, start // _MAX_FOLIO * _MAX_FOLIO)
    with contextlib.suppress(OSError):  # the bytes were read: a copy that stays is no reason to fail
        os.posix_fadvise(descriptor, start, 0 if end >= size else end - start, os.POSIX_FADV_DONTNEED)


def read_exactly(descriptor: int, exactly: bool) -> None:
    """Have the kernel read of a file just what it is asked for, or else as far ahead as it likes.

    What it reads ahead by itself would stay in the page cache if nobody came for it.
    """
    advice = os.POSIX_FADV_RANDOM if exactly else os.POSIX_FADV_NORMAL
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, advice)


def prefetch(descriptor: int, ranges: list[tuple[int, int]]) -> None:
    """Have the kernel begin to read the pages in `ranges` (first, beyond the last), all of them at once."""
    for first, last in ranges:
        os.posix_fadvise(descriptor, first * PAGE_SIZE, (last - first) * PAGE_SIZE, os.POSIX_FADV_WILLNEED)


def was_accessed(status: os.stat_result) -> bool:
    """Say whether a further access need not show: relatime's rule."""
    return status.st_atime_ns > max(status.st_mtime_ns, status.st_ctime_ns, time.time_ns() - _DAY_NS)


def note_access(descriptor: int) -> None:
    """Have the file's access time say that it was read now, by the rules of its file system, reading nothing.

    Mapping counts as an access. Setting the time would change the ctime.
    """
    with contextlib.suppress(OSError, ValueError):  # it cannot be mapped, or is empty by now
        mmap.mmap(descriptor, 1, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ).close()
