"""Another process that changes lower files.

Reports of a daemon's own changes are left out, so tests that play the daemon need somebody else for
changes underneath. Each call returns when the change is over.
"""

import ctypes
import mmap
import multiprocessing as mp
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from tests.waiting import DEADLINE_S

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


def write(path: Path, offset: int, data: bytes) -> None:
    """Write, without truncating."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
    finally:
        os.close(descriptor)


def write_unnoticed(path: Path, data: bytes) -> None:
    """Write as many bytes as the file has, and give it its time of modification back."""
    before = path.stat()
    write(path, 0, data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def fallocate(descriptor: int, mode: int, offset: int, size: int) -> int:
    """Call fallocate(2), and return 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.fallocate(descriptor, mode, ctypes.c_longlong(offset), ctypes.c_longlong(size))
    return ctypes.get_errno() if failed else 0


def punch(path: Path, offset: int, size: int, mode: int = _KEEP_SIZE | _PUNCH_HOLE) -> None:
    """Make a hole."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert fallocate(descriptor, mode, offset, size) == 0
    finally:
        os.close(descriptor)


def zero(path: Path, offset: int, size: int) -> None:
    """Make zeros where the file has bytes."""
    punch(path, offset, size, _KEEP_SIZE | _ZERO_RANGE)


def replace(path: Path, data: bytes) -> None:
    """Put another file in its place, as editors and package managers do."""
    other = path.with_name("replacement")
    other.write_bytes(data)
    other.rename(path)


def copy_in(path: Path, source: Path) -> None:
    """Copy inside the kernel."""
    with source.open("rb") as there, path.open("r+b") as here:
        os.copy_file_range(there.fileno(), here.fileno(), source.stat().st_size)


def splice_in(path: Path, data: bytes) -> None:
    """Write from a pipe inside the kernel."""
    reading, writing = os.pipe()
    os.write(writing, data)
    with path.open("r+b") as here:
        os.splice(reading, here.fileno(), len(data))
    os.close(reading)
    os.close(writing)


def store(path: Path, data: bytes) -> None:
    """Store to mapped memory, then close."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[: len(data)] = data


def _work(pipe: Connection) -> None:
    while True:
        operation, arguments = pipe.recv()
        try:
            operation(*arguments)
            pipe.send(None)
        except OSError as error:
            pipe.send(error.errno)


class Underneath:
    """The process. ``underneath(os.truncate, path, 10)`` has it call that; OSError as the call raises it."""

    def __init__(self) -> None:
        context = mp.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, operation: Callable[..., object], *arguments: object) -> None:
        self._pipe.send((operation, arguments))
        assert self._pipe.poll(DEADLINE_S), "it does not answer"
        code = self._pipe.recv()
        if code is not None:
            raise OSError(code, os.strerror(code))

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
