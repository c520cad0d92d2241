"""Reading and writing lower files: whole ranges, whatever single calls return.

Threading: plain functions that may block, except `read_cached`, which never does.
"""

import contextlib
import errno
import os
import stat

_MAX_FOLIO = 2 << 20
_CANNOT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL)


def read_fully(descriptor: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from `start` on; the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if not count:
            break
        done += count
    return done


def read_cached(descriptor: int, start: int, buffer: memoryview) -> int:
    """Read what the kernel has in its page cache from `start` on, up to the first page it has not."""
    try:
        return os.preadv(descriptor, [buffer], start, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise


def write_fully(descriptor: int, start: int, data: bytes) -> int:
    """Write all of `data`; fewer bytes only if an error follows a part that was written."""
    view = memoryview(data)
    done = os.pwrite(descriptor, view, start)
    with contextlib.suppress(OSError):
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], start + done)
    return done


def drop_cached(descriptor: int, start: int, end: int, put_from: int, size: int) -> None:
    """Have the kernel drop its copy of the bytes from `start` to `end`; the pool has them from `put_from` on.

    The kernel drops only whole folios, which can be as large as 2 MiB and straddle two requests: so each
    request of a stream reaches back to where such a folio can begin, and the last one to the end of the file.
    """
    start = max(put_from, start // _MAX_FOLIO * _MAX_FOLIO)
    os.posix_fadvise(descriptor, start, 0 if end >= size else end - start, os.POSIX_FADV_DONTNEED)


def drop_privileges(descriptor: int) -> None:
    """Take set-user-id and set-group-id away from a file that was written.

    The kernel would, for writers without CAP_FSETID; ours is root's daemon, and FUSE does not say who writes.
    """
    mode = os.fstat(descriptor).st_mode
    drop = stat.S_ISUID
    if mode & stat.S_IXGRP:
        drop |= stat.S_ISGID
    if mode & drop:
        os.fchmod(descriptor, stat.S_IMODE(mode) & ~drop)
