"""Streams of large reads that hit, which two threads may fetch."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tmem.backends import _native
from tmem.fs.reading import NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .reader_desk import Desk, make

OTHER = bytes(range(1, 25))
FH = 8
READ = 256 << 10
READS = 24
"""Of the file: enough for a second thread to be tried."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


@pytest.fixture
def content(desk: Desk) -> bytes:
    """Open a file that is in the pool, and return what it has."""
    content = random.Random(3).randbytes(READS * READ)
    desk.pool.put(OTHER, 0, content)
    gate = _native.Gate()
    gate.set(OTHER, len(content), True)
    desk.reader.open(FH, desk.file, gate, True)
    return content


def read_all(desk: Desk, content: bytes) -> None:
    for offset in range(0, len(content), READ):
        unique = desk.read(offset, READ, FH)
        assert desk.serve() == NOTHING
        number, error, data = desk.answer()
        assert (number, error, data == content[offset : offset + READ]) == (unique, 0, True)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_stream_that_two_fetch_has_its_bytes(desk: Desk, content: bytes) -> None:
    before = threads()
    for _ in range(4):
        read_all(desk, content)
    assert threads() == before + 1
    assert desk.reader.counters()["hit_reads"] == 4 * READS
    assert (
        desk.reader.counters()["ahead_reads"] > 2 * READS
    )  # the second thread may lose its CPU within a piece
    desk.reader.close()
    wait_until(lambda: threads() == before)  # the kernel has it for a moment after it was joined


def test_a_page_that_goes_while_two_fetch_is_missed(desk: Desk, content: bytes) -> None:
    read_all(desk, content[: 12 * READ])
    desk.pool.flush(OTHER, 14 * READ // PAGE_SIZE, 1)
    for number in (12, 13):
        unique = desk.read(number * READ, READ, FH)
        assert desk.serve() == NOTHING
        assert desk.answer() == (unique, 0, content[number * READ : (number + 1) * READ])
    unique = desk.read(14 * READ, READ, FH)
    assert desk.serve() == REQUEST
    assert desk.forwarded()[1] == unique


def test_a_daemon_with_one_cpu_fetches_alone(desk: Desk, content: bytes) -> None:
    cpus = os.sched_getaffinity(0)
    before = threads()
    os.sched_setaffinity(0, {min(cpus)})
    try:
        read_all(desk, content)
    finally:
        os.sched_setaffinity(0, cpus)
    assert threads() == before
    assert desk.reader.counters()["ahead_reads"] == READS - 2
