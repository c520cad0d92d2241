"""A lower that answers quickly is waited for by who reads requests; others do not wait for one that hangs."""

import fcntl
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.fs.reading import NOTHING
from tmem.types import PAGE_SIZE

from .faulty import Faulty
from .hanging import CONTENT, two_files
from .reader_desk import FH, READ, SETXATTR, Desk, make

INTERRUPT = 36
EINTR = -4
SLOW = FH + 1
OID = bytes(range(1, 25))
ANY_US, NONE_US = 100_000_000, 0
"""What counts as quick: also what has never been tried, and nothing."""


@dataclass
class Place:
    """A desk with a file `SLOW` of a lower that can hang."""

    desk: Desk
    lower: Faulty

    def ask(self, page: int, pid: int = 0) -> int:
        """Ask for a page that is not in the pool."""
        body = struct.pack("=QQIIQII", SLOW, page * PAGE_SIZE, PAGE_SIZE, 0, 0, 0, 0)
        return self.desk.request(READ, body, pid)


def placed(directory: Path, quick_us: int) -> Iterator[Place]:
    with two_files(directory) as lower:
        for desk in make(directory, away_ms=500, quick_us=quick_us):
            file = os.open(lower.point / "slow", os.O_RDONLY)
            gate = _native.Gate()
            gate.set(OID, len(CONTENT), True, True)
            desk.reader.open(SLOW, file, gate, False)
            yield Place(desk, lower)
            lower.heal()
            if not desk.reader.close_file(SLOW):  # else a thread has it, and closes it
                os.close(file)


def answered_elsewhere(place: Place) -> bool:
    """Ask for a page, and say whether another thread has waited for it."""
    place.ask(9)
    place.desk.serve()
    try:
        place.desk.answer_now()
    except BlockingIOError:
        place.desk.answer()
        return True
    return False


@pytest.mark.parametrize("quick_us", [ANY_US, NONE_US])
def test_the_right_bytes(tmp_path: Path, quick_us: int) -> None:
    for place in placed(tmp_path, quick_us):
        for page in (9, 2, 13):
            unique = place.ask(page)
            assert place.desk.serve() == NOTHING
            at = page * PAGE_SIZE
            assert place.desk.answer() == (unique, 0, CONTENT[at : at + PAGE_SIZE])
        assert place.desk.reader.counters()["miss_reads"] == 3


def test_it_is_answered_before_anything_else_is_done(tmp_path: Path) -> None:
    for place in placed(tmp_path, ANY_US):
        unique = place.ask(9)
        place.desk.serve()
        assert place.desk.answer_now()[0] == unique


@pytest.mark.parametrize("quick_us", [ANY_US, NONE_US])
def test_one_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, program: "subprocess.Popen[bytes]", eventually: Callable[..., None], quick_us: int
) -> None:
    for place in placed(tmp_path, quick_us):
        desk = place.desk
        place.lower.fail("read", hangs=True, name="slow")
        unique = place.ask(9, program.pid)
        with_event_loop = threading.Thread(target=desk.serve)
        with_event_loop.start()
        eventually(lambda place=place: place.lower.waiting() == ["read"])
        if quick_us == ANY_US:
            assert with_event_loop.is_alive()
        hit = desk.read(0, PAGE_SIZE)
        if quick_us == NONE_US:
            with_event_loop.join()
            desk.serve()
        assert desk.answer() == (hit, 0, desk.content[:PAGE_SIZE])
        program.send_signal(signal.SIGQUIT)
        desk.request(INTERRUPT, struct.pack("=Q", unique))
        if quick_us == NONE_US:
            desk.serve()
        assert desk.answer() == (unique, EINTR, b"")
        assert not desk.reader.quiet
        place.lower.heal()
        with_event_loop.join()
        eventually(lambda desk=desk: desk.reader.quiet)
        assert desk.silent()


def test_reads_that_threads_wait_for_let_it_sleep_in_read(tmp_path: Path) -> None:
    for place in placed(tmp_path, NONE_US):
        served = threading.Thread(target=place.desk.reader.serve, args=(-1, 60_000))
        served.start()
        for turn in range(50):
            place.ask((9, 2, 13, 5)[turn % 4])
            place.desk.answer()
            place.desk.pool.flush_object(OID)
        place.desk.request(SETXATTR, bytes(16))  # for libfuse
        served.join()
        assert place.desk.forwarded()[0] == SETXATTR
        assert place.desk.reader.counters()["read_sleeps"] > 0


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Have reader and programs share one: else it looks for the next request instead of sleeping."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


@pytest.mark.usefixtures("one_cpu")
def test_who_waits_leaves_the_device_as_it_is_until_another_one_reads(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """A device that blocks, as for a sleep in read(2), holds whoever reads a request that has gone."""

    def blocks(desk: Desk) -> bool:
        return not fcntl.fcntl(desk.device, fcntl.F_GETFL) & os.O_NONBLOCK

    for place in placed(tmp_path, ANY_US):
        desk = place.desk

        def hit(desk: Desk = desk) -> None:
            unique = desk.read(0, PAGE_SIZE)
            assert desk.answer() == (unique, 0, desk.content[:PAGE_SIZE])

        def sleeps(desk: Desk = desk, hit: Callable[[], None] = hit) -> bool:
            hit()
            return blocks(desk)

        served = threading.Thread(target=desk.reader.serve, args=(-1, 60_000))
        served.start()
        for _ in range(2):
            eventually(sleeps)
            place.lower.fail("read", hangs=True, name="slow")
            unique = place.ask(9)
            eventually(lambda place=place: place.lower.waiting() == ["read"])
            hit()  # by another one
            assert not blocks(desk)
            place.lower.heal()
            assert desk.answer()[0] == unique
            desk.pool.flush_object(OID)
        desk.request(SETXATTR, bytes(16))  # for libfuse
        served.join()
        assert not blocks(desk)


def test_one_slow_answer_is_soon_forgotten(tmp_path: Path, eventually: Callable[..., None]) -> None:
    """It counts as sixteen times what is quick, however long it took: nine quick ones make up for that."""

    def waits_here(place: Place, seconds: float) -> bool:
        """Have one take so long, and say whether it was waited for by the thread that serves."""
        place.lower.fail("read", hangs=True, name="slow")
        place.ask(7)
        served = threading.Thread(target=place.desk.serve)
        served.start()
        eventually(lambda: place.lower.waiting() == ["read"])
        served.join(seconds)
        here = served.is_alive()
        place.lower.heal()
        served.join()
        place.desk.answer()
        place.desk.pool.flush_object(OID)
        return here

    def miss_quickly(place: Place, count: int) -> None:
        for turn in range(count):
            place.ask((9, 2, 13, 5)[turn % 4])
            place.desk.serve()
            place.desk.answer()
            place.desk.pool.flush_object(OID)

    for place in placed(tmp_path, 20_000):
        for _ in range(5):  # on a busy machine others may be slow
            miss_quickly(place, 80)
            waits_here(place, 1.0)
            miss_quickly(place, 9)
            if waits_here(place, 0.2):
                break
        else:
            pytest.fail("a single slow answer has others waited for by threads for long")


def test_a_slow_answer_ends_it(tmp_path: Path, eventually: Callable[..., None]) -> None:
    for place in placed(tmp_path, 50_000):
        desk = place.desk
        while answered_elsewhere(place):  # until enough were quick
            desk.pool.flush_object(OID)
        place.lower.fail("read", hangs=True, name="slow")
        place.ask(1)
        with_event_loop = threading.Thread(target=desk.serve)
        with_event_loop.start()
        eventually(lambda place=place: place.lower.waiting() == ["read"])
        begun = time.monotonic()
        eventually(lambda begun=begun: time.monotonic() > begun + 0.5)  # an eighth of it counts
        place.lower.heal()
        with_event_loop.join()
        desk.answer()
        place.lower.fail("read", hangs=True, name="slow")
        place.ask(3)
        assert desk.serve() == NOTHING  # it waits elsewhere
        eventually(lambda place=place: place.lower.waiting() == ["read"])
        assert desk.silent()
