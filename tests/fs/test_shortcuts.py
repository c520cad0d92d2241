"""Requests that take the short way past libfuse: answered once, undone if given up, and never out of turn."""

import contextlib
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tmem.fs.loop import Readers
from tmem.fs.reading import ASKED, NOTHING, REQUEST
from tmem.fs.shortcuts import Shortcuts
from tmem.types import PAGE_SIZE

from .reader_desk import FH, FORGET, GETATTR, OPEN, OPENDIR, READDIRPLUS, Desk, make

LOOKUP, RELEASE, RELEASEDIR, INTERRUPT = 1, 18, 29, 36
EINTR = -4
READ_ELSEWHERE = struct.pack("=QQIIQII", FH + 1, 0, PAGE_SIZE, 0, 0, 0, 0)
LISTING = struct.pack("=QQIIQII", FH + 1, 0, PAGE_SIZE, 0, 0, 0, 0)
CLOSE = struct.pack("=QIIQ", FH + 1, 0, 0, 0)
READ = 15


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    for one in make(tmp_path):
        one.reader.open_shortcut()
        yield one


def asked(desk: Desk) -> tuple[int, int, bytes]:
    """Return opcode, number and argument of what was put by."""
    request = desk.reader.asked()
    assert request is not None
    return request[0], request[1], request[6]


def interrupted(desk: Desk, unique: int) -> None:
    desk.request(INTERRUPT, struct.pack("=Q", unique))
    desk.serve()


def test_a_name_is_put_by(desk: Desk, tmp_path: Path) -> None:
    """So it is where there is no table of inodes, or another thread has read it."""
    unique = desk.request(LOOKUP, b"name\0", 77)
    assert desk.serve() == ASKED
    assert desk.reader.asked() == (LOOKUP, unique, 1, 0, 0, 77, b"name\0", 0)
    assert desk.reader.asked() is None
    assert desk.silent()
    assert not desk.reader.quiet
    with pytest.raises(ValueError, match="no nodes"):
        desk.reader.look_up(unique, 1, b"name\0", True)
    with pytest.raises(ValueError, match="ends with a zero"):
        desk.reader.look_up(unique, 1, b"name", True)
    desk.reader.reply(unique, 2)
    assert desk.answer() == (unique, -2, b"")
    assert desk.reader.quiet


def test_without_a_shortcut_all_is_for_libfuse(tmp_path: Path) -> None:
    for desk in make(tmp_path):
        unique = desk.request(LOOKUP, b"name\0")
        assert desk.serve() == REQUEST
        assert desk.forwarded() == (LOOKUP, unique)


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (LOOKUP, b"name"),  # without its end
        (OPEN, struct.pack("=II", os.O_RDWR | os.O_TRUNC, 0)),  # waits for the lower
        (OPEN, b"123"),
        (OPENDIR, b""),
        (RELEASE, bytes(23)),
        (GETATTR, bytes(16)),
    ],
)
def test_what_is_for_libfuse(desk: Desk, opcode: int, body: bytes) -> None:
    unique = desk.request(opcode, body)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (opcode, unique)
    assert desk.reader.asked() is None


def test_they_are_answered_in_any_order_each_once(desk: Desk) -> None:
    first = desk.request(OPENDIR, bytes(8))
    assert desk.serve() == ASKED
    second = desk.request(OPEN, struct.pack("=II", os.O_RDONLY, 0))
    assert desk.serve() == ASKED
    assert [asked(desk)[1], asked(desk)[1]] == [first, second]
    desk.reader.reply(second, 0, struct.pack("=QIi", 6, 0, 0))
    desk.reader.reply(first, 0, struct.pack("=QIi", 5, 0, 0))
    no_flush = 1 << 5
    assert desk.answer() == (second, 0, struct.pack("=QIi", 6, no_flush, 0))
    assert desk.answer() == (first, 0, struct.pack("=QIi", 5, 0, 0))
    with pytest.raises(ValueError, match="256 bytes"):
        desk.reader.reply(second, 0, bytes(257))


def test_forgotten_files_need_no_answer(desk: Desk) -> None:
    desk.request(FORGET, struct.pack("=Q", 12))
    assert desk.serve() == ASKED
    assert not desk.reader.quiet
    assert asked(desk)[::2] == (FORGET, struct.pack("=Q", 12))
    assert desk.reader.quiet
    assert desk.silent()


def test_who_stands_in_tells_the_event_loop(tmp_path: Path, eventually: Callable[..., None]) -> None:
    for desk in make(tmp_path, away_ms=1):
        event = desk.reader.open_shortcut()
        unique = desk.request(LOOKUP, b"name\0")
        eventually(lambda event=event: select.select([event], [], [], 0)[0])
        assert desk.serve() == ASKED
        assert asked(desk)[:2] == (LOOKUP, unique)
        assert desk.serve() == NOTHING
        desk.reader.reply(unique, 2)
        assert desk.answer() == (unique, -2, b"")


def test_neither_way_waits_for_the_other(tmp_path: Path, eventually: Callable[..., None]) -> None:
    for desk in make(tmp_path, away_ms=1):
        event = desk.reader.open_shortcut()
        desk.request(LOOKUP, b"name\0")
        desk.request(GETATTR, bytes(16))
        eventually(lambda event=event: select.select([event], [], [], 0)[0])
        eventually(lambda desk=desk: desk.reader.counters()["forwarded"])
        desk.reader.pause(True)
        assert {desk.serve() for _ in range(2)} == {ASKED, REQUEST}


def test_what_is_given_up_is_undone(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    lookup = desk.request(LOOKUP, b"name\0", program.pid)
    desk.serve()
    opened = desk.request(OPENDIR, bytes(8), program.pid)
    desk.serve()
    asked(desk), asked(desk)
    assert desk.silent()
    program.send_signal(signal.SIGQUIT)
    for unique in (lookup, opened):
        interrupted(desk, unique)
    answers = {desk.answer()[:2] for _ in range(2)}
    assert answers == {(lookup, EINTR), (opened, EINTR)}
    assert not desk.reader.quiet
    desk.reader.reply(lookup, 0, struct.pack("=Q120x", 99))
    desk.reader.reply(opened, 0, struct.pack("=QIi", 5, 0, 0))
    message = desk.forwarded_message()
    assert struct.unpack_from("=IQQ", message, 4)[::2] == (FORGET, 99)
    assert struct.unpack_from("=I", desk.forwarded_message(), 4) == (RELEASEDIR,)
    assert desk.silent()


def test_what_is_given_up_before_its_turn_is_not_done(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    """Its directory is closed by way of libfuse, and that may come first: the handle is gone then."""
    listing = desk.request(READDIRPLUS, LISTING, program.pid)
    assert desk.serve() == ASKED
    program.send_signal(signal.SIGQUIT)
    interrupted(desk, listing)
    assert desk.answer() == (listing, EINTR, b"")
    closing = desk.request(RELEASEDIR, CLOSE)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (RELEASEDIR, closing)
    desk.reply(closing)
    assert desk.answer() == (closing, 0, b"")
    assert desk.reader.asked() is None
    assert desk.silent()
    assert desk.reader.quiet
    closing = desk.request(RELEASEDIR, CLOSE)
    assert desk.serve() == ASKED
    assert asked(desk)[1] == closing


def test_a_file_is_not_closed_before_a_read_that_was_given_up(
    desk: Desk, program: "subprocess.Popen[bytes]"
) -> None:
    """Its handler may not have begun, and would look for the handle."""
    read = desk.request(READ, READ_ELSEWHERE, program.pid)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, read)
    program.send_signal(signal.SIGQUIT)
    interrupted(desk, read)
    assert desk.answer() == (read, EINTR, b"")
    closing = desk.request(RELEASE, CLOSE)
    assert desk.serve() == REQUEST
    assert desk.reader.asked() is None
    assert desk.forwarded() == (RELEASE, closing)
    desk.reply(read, b"")
    desk.reply(closing)
    assert desk.answer() == (closing, 0, b"")
    desk.request(RELEASE, CLOSE)
    assert desk.serve() == ASKED


def test_what_is_left_is_told_of_again(tmp_path: Path, eventually: Callable[..., None]) -> None:
    for desk in make(tmp_path, away_ms=1):
        desk.reader.open_shortcut()
        uniques = [desk.request(LOOKUP, b"name\0") for _ in range(3)]
        for unique in uniques:  # one at a time: there is other work
            eventually(lambda desk=desk: desk.serve() == ASKED)
            assert asked(desk)[1] == unique
            desk.reader.reply(unique, 2)
        assert desk.serve() == NOTHING


class Flood:
    """A native reader whose helpers bring `AT_A_TIME` requests whenever it is looked; `most` in all."""

    AT_A_TIME = 20

    def __init__(self, most: int) -> None:
        self.reader = self
        self.full = False
        self.left = most
        self.answered = self.since = self.longest = 0
        self._event = os.eventfd(1)

    def fileno(self) -> int:
        return self._event

    def awaited(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def serve(self, wake: int, timeout_ms: int) -> int:
        return ASKED if self.left > 0 else REQUEST

    def answer(self, start_soon: object) -> int:
        self.left -= self.AT_A_TIME
        self.since += self.AT_A_TIME
        self.longest = max(self.longest, self.since)
        return self.AT_A_TIME

    def before_io_wait(self, timeout: float) -> None:
        """Note that trio looks at its descriptors and deadlines."""
        self.since = 0


def test_trio_has_its_turn_however_many_come() -> None:
    flood = Flood(2000)

    async def main() -> None:
        readers = Readers()
        assert readers._find_trio(flood.fileno())
        readers._fast = True
        trio.lowlevel.add_instrument(flood)  # type: ignore[arg-type]  # the part that it looks at
        async with trio.open_nursery() as readers._nursery:
            await readers._read_natively(flood)  # type: ignore[arg-type]
        trio.lowlevel.remove_instrument(flood)  # type: ignore[arg-type]

    trio.run(main)
    os.close(flood.fileno())
    assert flood.left <= 0
    assert flood.longest <= 64


def test_a_slow_lower_ends_a_turn(tmp_path: Path) -> None:
    """Who brings results of worker threads need not wait for all that lies there."""

    class Slow:
        def take_back(self, node: int, count: int) -> None:
            began = time.monotonic()
            while time.monotonic() < began + 0.003:
                pass

    for desk in make(tmp_path, away_ms=1):
        desk.reader.open_shortcut()
        shortcuts = Shortcuts(Slow(), desk.reader)  # type: ignore[arg-type]
        for _ in range(3):
            desk.request(FORGET, struct.pack("=Q", 1))
        answered = 0
        while answered < 3:
            if desk.reader.serve(-1, 1000) == ASKED:
                assert shortcuts.answer(lambda *_: None) == 1
                answered += 1
        assert desk.reader.asked() is None
