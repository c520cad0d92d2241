"""The native reader where requests follow each other closely: answered together, or looked for."""

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tmem.fs.reading import NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .reader_desk import OID, READ, SETXATTR, Desk, make

GONE = 20
"""A page that the pool does not have."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


def test_many_that_wait_get_each_its_own_bytes(desk: Desk) -> None:
    """Small hits are answered together; what is large, missing, or no READ comes in between."""
    chosen = random.Random(2)
    desk.pool.flush(OID, GONE, 1)
    wanted: dict[int, bytes] = {}
    passed_on: list[tuple[int, int]] = []
    for _ in range(200):
        size = chosen.choice([1, 10, 4096, 5000, 16384, 18 * PAGE_SIZE])
        start = chosen.randrange(GONE * PAGE_SIZE - size)
        kind = chosen.randrange(6)
        if kind == 0:
            passed_on.append((SETXATTR, desk.request(SETXATTR, bytes(16))))
        elif kind == 1:
            passed_on.append((READ, desk.read(GONE * PAGE_SIZE, size)))
        else:
            wanted[desk.read(start, size)] = desk.content[start : start + size]
    seen: list[tuple[int, int]] = []
    while len(seen) < len(passed_on) or desk.reader.counters()["hit_reads"] < len(wanted):
        if desk.serve() == REQUEST:
            seen.append(desk.forwarded())
    assert seen == passed_on
    answers = [desk.answer_now() for _ in wanted]
    assert not any(error for _, error, _ in answers)
    assert {unique: data for unique, _, data in answers} == wanted
    assert desk.silent()


def test_the_next_is_looked_for_before_anybody_sleeps(tmp_path: Path) -> None:
    def one_was_found() -> bool:
        """Try it with a new reader: one that has looked in vain does not look for longer and longer."""
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        with contextmanager(make)(directory) as desk, serving(desk):
            for page in range(10):
                unique = desk.read(page * PAGE_SIZE, PAGE_SIZE)
                assert desk.answer() == (unique, 0, desk.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
            return desk.reader.counters()["found_awake"] > 0

    wait_until(one_was_found, what="a request that came while it was looked for")


@contextmanager
def serving(desk: Desk) -> Iterator[None]:
    """Serve in a thread."""
    ends = threading.Event()

    def serve() -> None:
        while not ends.is_set():
            desk.reader.serve(-1, 20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def test_it_sleeps_when_nothing_comes(desk: Desk) -> None:
    desk.read(0, PAGE_SIZE)
    began = time.thread_time()
    assert desk.reader.serve(-1, 300) == NOTHING
    assert time.thread_time() - began < 0.1
    assert desk.answer()[1] == 0
