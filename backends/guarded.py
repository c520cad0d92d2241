"""What a process in the path of local swap must have before its first thread exists: set it, then exec.

PR_SET_IO_FLUSHER and the scheduling policy belong to a thread and are inherited by the threads it makes, so a
launcher sets them and execs; the OOM score belongs to the process, and so does the control group in which
its memory is charged (`groups`). All of them survive exec, memory locks do not (`locking`). What the kernel
does not permit is skipped here and shown by `guards`.

SCHED_RR passes on to what a process starts: under a manager that has it, every server has it, too.

``python -m tmem.backends.guarded [--realtime] COMMAND [ARGUMENT ...]`` does so for programs not ours.
Only for a process with one thread.
"""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tmem.backends import groups
from tmem.errors import AttachError

PR_SET_PDEATHSIG = 1
PR_SET_IO_FLUSHER = 57
PR_GET_IO_FLUSHER = 58
STACK_BYTES = 512 << 10
"""Stack of each thread: locked memory, so not the customary 8 MiB."""

MALLOC_ENVIRONMENT = {
    # One arena that grows by 4 MiB at a time: a thread that begins must not map a heap of its own under
    # pressure, and what is locked stays at 30-36 MB.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": str(4 << 20),
}


def set_guards(realtime: bool) -> None:
    """Give this process and what it will exec the guards of local swap, as far as it may."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000", encoding="ascii")
    if realtime:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard == resource.RLIM_INFINITY or hard >= STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))


def drop_guards() -> None:
    """Give back what `set_guards` gave to who started us: this process is nothing that swap depends on."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0", encoding="ascii")
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def become(argv: Sequence[str], realtime: bool) -> NoReturn:
    """Exec `argv` in our control group, with the guards set. Raises `AttachError` if it cannot be started."""
    groups.enter()
    set_guards(realtime)
    try:
        os.execvpe(argv[0], list(argv), os.environ | MALLOC_ENVIRONMENT)
    except OSError as error:
        raise AttachError(f"{argv[0]} cannot be started: {error.strerror}") from None


def outlive_parent() -> None:
    """Take back what nbdkit 1.32 does unasked: it has the kernel send it SIGTERM when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


def io_flusher() -> bool:
    """Return whether the calling thread is an I/O flusher, read back from the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1)


def command(argv: Sequence[str], realtime: bool) -> list[str]:
    """Return the command that becomes `argv` with the guards set."""
    return [sys.executable, "-m", "tmem.backends.guarded", *(["--realtime"] if realtime else []), *argv]


def _main(arguments: list[str]) -> None:
    realtime = arguments[:1] == ["--realtime"]
    argv = arguments[realtime:]
    if not argv:
        raise SystemExit("usage: python -m tmem.backends.guarded [--realtime] COMMAND [ARGUMENT ...]")
    try:
        become(argv, realtime)
    except AttachError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    _main(sys.argv[1:])
