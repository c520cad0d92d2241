"""The load of a mount: reads, writes, mapped reads and mapped writes of files whose bytes are known.

One request at a time. When the mount's daemon has died, every call on it fails; then all files are closed and
opened again, for as long as it takes until it is mounted anew, and what was under way is looked at: each page
is old or new. Runs in a process of its own, which may be killed.
"""

import contextlib
import errno
import math
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tmem.types import PAGE_SIZE

from .board import DEADLINE_S, Board, Clock, State, Wanted, Word, wait
from .ledger import Ledger, runs

PAGES = 64
"""Pages of each file."""
BATCH = 16
"""Pages of the largest request."""

_GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.EFAULT, errno.EIO}
"""What a mount answers whose daemon is dead (EFAULT: a mapped page of it), or that is just not there."""
_NOT_MAPPED = {errno.ENODEV}
"""Kernels before 6.6 do not map what is read past their cache."""


def make(directory: Path, files: int) -> Ledger:
    """Make the files, of zeros, and return what is known of them."""
    for number in range(files):
        (directory / f"file{number}").write_bytes(bytes(PAGES * PAGE_SIZE))
    return Ledger(files * PAGES)


class FileLoad:
    """Works on the files of `directory`, a mount point.

    `outstanding` says how many requests the mount's daemon has not answered yet.
    """

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        board: Board,
        seed: str,
        outstanding: Callable[[], int] = lambda: 0,
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._board = board
        self._rng = random.Random(seed)
        self._outstanding = outstanding
        self._clock = Clock(board)
        self._files: dict[int, int] = {}
        self._copy = os.memfd_create("copy")
        self.mapped = True

    def run(self) -> None:
        """Work until the board says to end."""
        self._rng.seed(f"{self._rng.random()} {self._board[Word.CONNECTIONS]}")  # not the same once more
        board = self._board
        self._clock.restart()
        wait(lambda: not self._outstanding(), "the daemon has done what a killed client had asked for")
        self._persist(self._open)
        while True:
            self._persist(self._settle)
            wanted = board[Word.WANTED]
            if wanted == Wanted.WORK:
                board[Word.STATE] = State.WORKING
                self._persist(self._work)
                continue
            self._persist(self._verify)
            if wanted == Wanted.END:
                return
            board[Word.STATE] = State.RESTING
            wait(lambda: board[Word.WANTED] != Wanted.REST, "the driver goes on", timeout_s=math.inf)
            self._clock.restart()

    def _persist(self, what: Callable[[], None]) -> None:
        """Do `what`, again on fresh files whenever the mount has gone."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if not self._files:
                    self._open()
                    self._settle()
                what()
                return
            except OSError as error:
                self._close()
                if error.errno not in _GONE or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def _open(self) -> None:
        for number in range(self._ledger.blocks // PAGES):
            self._files[number] = os.open(self._directory / f"file{number}", os.O_RDWR | os.O_CLOEXEC)
        self._board.add(Word.CONNECTIONS)

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._files.clear()

    def _work(self) -> None:
        """Do requests until the driver wants something else."""
        while self._board[Word.WANTED] == Wanted.WORK:
            count = self._rng.choice((1, 1, 2, 4, BATCH))
            number = self._rng.randrange(len(self._files))
            first = number * PAGES + self._rng.randrange(PAGES - count + 1)
            chance = self._rng.random()
            if chance < 0.5:
                self._ledger.verify(first, self._read(first, count))
            elif chance < 0.8:
                self._write(first, count)
            elif chance < 0.9:
                self._read_mapped(first, count)
            elif chance < 0.97:
                self._write_mapped(first, count)
            else:
                self._reopen(number)
            self._clock.answered()

    def _read(self, first: int, count: int) -> bytes:
        file, offset, size = self._place(first, count)
        data = os.pread(file, size, offset)
        assert len(data) == size, f"{len(data)} of {size} bytes read at block {first}"
        return data

    def _write(self, first: int, count: int) -> None:
        file, offset, size = self._place(first, count)
        assert os.pwrite(file, self._ledger.issue(first, count), offset) == size
        self._ledger.acknowledge(first, count)

    def _read_mapped(self, first: int, count: int) -> None:
        with self._map(first) as mapping:
            if mapping is not None:
                self._ledger.verify(first, self._look(mapping, first, count))

    def _write_mapped(self, first: int, count: int) -> None:
        """Write through a mapping; it is acknowledged when msync has returned."""
        with self._map(first) as mapping:
            if mapping is None:
                return
            data = self._ledger.issue(first, count)
            offset = first % PAGES * PAGE_SIZE
            os.pwrite(self._copy, data, 0)
            # By the kernel, which answers EFAULT where a store of our own would be a SIGBUS.
            with memoryview(mapping)[offset : offset + len(data)] as target:
                assert os.preadv(self._copy, [target], 0) == len(data)
            mapping.flush()
            self._ledger.acknowledge(first, count)

    @contextlib.contextmanager
    def _map(self, first: int) -> Iterator[mmap.mmap | None]:
        """Map the whole file of a block, or None where this kernel cannot."""
        try:
            mapping = mmap.mmap(self._place(first, 1)[0], PAGES * PAGE_SIZE)
        except OSError as error:
            if error.errno not in _NOT_MAPPED:
                raise
            self.mapped = False
            yield None
            return
        try:
            yield mapping
        finally:
            mapping.close()

    def _look(self, mapping: mmap.mmap, first: int, count: int) -> bytes:
        """Read mapped pages, by the kernel as above."""
        offset, size = first % PAGES * PAGE_SIZE, count * PAGE_SIZE
        with memoryview(mapping)[offset : offset + size] as source:
            assert os.pwrite(self._copy, source, 0) == size
        return os.pread(self._copy, size, 0)

    def _reopen(self, number: int) -> None:
        fresh = os.open(self._directory / f"file{number}", os.O_RDWR | os.O_CLOEXEC)
        os.close(self._files[number])
        self._files[number] = fresh

    def _settle(self) -> None:
        """Find out what became of the request that was under way when the mount, or the load, died."""
        for first, count in runs(self._ledger.doubtful(), 1):
            self._ledger.settle(first, self._read(first, count))

    def _verify(self) -> None:
        """Read every page, by read and, one file, through a mapping."""
        for first in range(0, self._ledger.blocks, BATCH):
            self._ledger.verify(first, self._read(first, BATCH))
        self._read_mapped(self._rng.randrange(len(self._files)) * PAGES, PAGES)

    def _place(self, first: int, count: int) -> tuple[int, int, int]:
        """Return descriptor, offset and size of blocks of one file."""
        return self._files[first // PAGES], first % PAGES * PAGE_SIZE, count * PAGE_SIZE
