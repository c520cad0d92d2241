"""Processes that outlive whoever started them: start one, name it for good, wait for it.

A pid alone is reused; with the start time (clock ticks since boot, field 22 of ``/proc/PID/stat``) it names
one process until the next boot, and a pidfd waits for a process that need not be our child. Not for
restarting anything: `supervisor`. Threading: plain functions, callable from any thread.
"""

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles
from tmem.errors import ServiceError


@dataclass(frozen=True)
class Process:
    """One process: `pid` together with `start_ticks`, its start time."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """Return the process that has `pid` now, or None."""
        ticks = start_ticks(pid)
        return None if ticks is None else cls(pid, ticks)

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return start_ticks(self.pid) == self.start_ticks

    def open_pidfd(self) -> int | None:
        """Return a pidfd, which is readable once the process has ended; None if it has ended already."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Only now is the pid pinned, so only now does the start time say whose pidfd this is.
        if self.alive:
            return descriptor
        os.close(descriptor)
        return None


def start_ticks(pid: int) -> int | None:
    """Return the start time of the running process `pid`, or None if there is none or it is a zombie."""
    try:
        text = procfiles.text(Path(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the command before it may contain anything
    return None if fields[0] in "ZXx" else int(fields[19])


def spawn(argv: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
    """Start `argv` in a session of its own, both outputs appended to `output`; return its pid.

    In its own session a Ctrl-C at our terminal does not reach it, and writing to a file it does not die of a
    broken pipe when we end. Raises `ServiceError` if the program cannot be started.
    """
    program = shutil.which(argv[0], path=environment.get("PATH"))
    if program is None:
        raise ServiceError(
            f"cannot start {argv[0]}: no such program on PATH; 'tmem doctor' says what to install"
        )
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        return os.posix_spawn(
            program,
            list(argv),
            dict(environment),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.fspath(output), append, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGPIPE],
        )
    except OSError as error:
        raise ServiceError(f"cannot start {program}: {error.strerror}") from error


def reap(pid: int) -> int | None:
    """Collect `pid` if it is an ended child of ours: its exit code (negative: a signal), else None."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if ended else None


def last_line(output: Path) -> str:
    """Return the last line that a process has written to `output`, or an empty string."""
    try:
        with output.open("rb") as file:
            file.seek(max(output.stat().st_size - 4096, 0))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
