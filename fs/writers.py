"""Whether anybody else has a lower file open for writing.

A write(2) stamps its file when it begins and copies its data afterwards, for as long as that takes; a store
to a mapped page stamps it at most once. So a version that is read while a writer is there says little about
the bytes. The kernel knows: it grants a read lease only on a file that nobody has open, or mapped, for
writing, and a write lease only on one that nobody else has open at all. Threading: plain functions, callable
from any thread.
"""

import contextlib
import errno
import fcntl
import os
import signal


def is_quiet(descriptor: int) -> bool | None:
    """Say whether nobody else has the file open for writing right now; None where this cannot be told.

    It cannot be told on file systems without leases, and for files of others without CAP_LEASE. False also
    if `descriptor` is open for writing and somebody else reads: prefer one that is open for reading only. An
    open that conflicts waits for the microsecond that this takes (with O_NONBLOCK it fails with EWOULDBLOCK).
    """
    try:
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        # The kernel tells us of such an open by a signal: one that is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK if writable else fcntl.F_RDLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
