"""Requests of programs that were killed are given up, others are not, and late replies do no harm."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tasks import of_threads
from tmem.backends import _native
from tmem.fs.inodes import InodeTable
from tmem.fs.reading import NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .reader_desk import (
    BATCH_FORGET,
    FH,
    FORGET,
    GETATTR,
    OID,
    OPEN,
    OPENDIR,
    READ,
    READDIRPLUS,
    SO_SNDBUFFORCE,
    WRITE,
    Desk,
    make,
)

LOOKUP, RELEASE, FSYNC, RELEASEDIR, INTERRUPT = 1, 18, 20, 29, 36
EINTR = -4
OWN_NUMBERS = 1 << 62
WRITEV = 20 if os.uname().machine == "x86_64" else 66
READ_BODY = struct.pack("=QQIIQII", FH + 1, 0, PAGE_SIZE, 0, 0, 0, 0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


def begin(desk: Desk, opcode: int, body: bytes, pid: int) -> int:
    unique = desk.request(opcode, body, pid)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (opcode, unique)
    return unique


def interrupt(desk: Desk, unique: int) -> None:
    desk.request(INTERRUPT, struct.pack("=Q", unique))
    assert desk.serve() == NOTHING  # not for libfuse


@pytest.mark.parametrize("opcode", [LOOKUP, GETATTR, OPEN, READ, FSYNC, OPENDIR, READDIRPLUS])
def test_a_dying_program_need_not_wait(desk: Desk, program: "subprocess.Popen[bytes]", opcode: int) -> None:
    unique = begin(desk, opcode, READ_BODY, program.pid)
    program.send_signal(signal.SIGQUIT)
    interrupt(desk, unique)
    assert desk.answer() == (unique, EINTR, b"")
    assert desk.reader.counters()["given_up"] == 1
    assert not desk.reader.quiet  # the handler is at it still
    desk.reply(unique, error=-5)
    assert desk.silent()
    assert desk.reader.quiet


def test_what_is_traced_may_be_spared_its_signal(desk: Desk) -> None:
    """A debugger decides what becomes of a signal, but for SIGKILL."""
    code = (
        "import ctypes, os, signal; libc = ctypes.CDLL(None); libc.ptrace(0, 0, 0, 0); "  # PTRACE_TRACEME
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    try:
        unique = begin(desk, READ, READ_BODY, child)
        os.kill(child, signal.SIGQUIT)
        interrupt(desk, unique)
        assert desk.silent()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("signals", [[], [signal.SIGCHLD], [signal.SIGWINCH, signal.SIGTERM]])
def test_a_program_that_goes_on_must_wait(
    desk: Desk, program: "subprocess.Popen[bytes]", signals: list[signal.Signals]
) -> None:
    unique = begin(desk, READ, READ_BODY, program.pid)
    for number in signals:  # SIGTERM does not end who is stopped
        program.send_signal(number)
    interrupt(desk, unique)
    assert desk.silent()
    desk.reply_with(unique, b"data")
    assert desk.answer() == (unique, 0, b"data")
    assert desk.reader.quiet


def test_a_later_fatal_signal_is_seen(tmp_path: Path, program: "subprocess.Popen[bytes]") -> None:
    """The kernel tells of the first signal only."""
    for desk in make(tmp_path, away_ms=20):
        unique = desk.request(READ, READ_BODY, program.pid)
        assert desk.reader.serve(-1, 5000) == REQUEST  # whoever has read it
        desk.forwarded()
        desk.request(INTERRUPT, struct.pack("=Q", unique))
        desk.reader.serve(-1, 0)
        assert desk.silent()
        program.send_signal(signal.SIGQUIT)
        assert desk.answer() == (unique, EINTR, b"")  # by a thread of the reader
        desk.reply_with(unique, b"data")
        assert desk.silent()


def test_somebody_stands_in_for_who_stays_away(tmp_path: Path) -> None:
    for desk in make(tmp_path, away_ms=20):
        unique = desk.read(0, PAGE_SIZE)
        assert desk.answer() == (unique, 0, desk.content[:PAGE_SIZE])
        unique = desk.read(0, PAGE_SIZE, FH + 1)
        assert desk.reader.serve(-1, 5000) == REQUEST
        assert desk.forwarded() == (READ, unique)
        desk.reply(unique)
        assert desk.answer()[0] == unique
        desk.reader.pause(True)
        while not desk.reader.quiet:
            pass
        desk.read(0, PAGE_SIZE)
        assert desk.silent()


def test_changes_are_waited_for(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    truncating = struct.pack("=II", os.O_RDWR | os.O_TRUNC, 0)
    writing = struct.pack("=QQIIQII", FH, 0, 4, 0, 0, 0, 0) + b"data"
    program.send_signal(signal.SIGQUIT)
    for opcode, body in (
        (OPEN, truncating),
        (WRITE, writing),
        (4, bytes(88)),
        (9, bytes(20)),
        (12, bytes(30)),
    ):
        unique = begin(desk, opcode, body, program.pid)
        interrupt(desk, unique)
        assert desk.silent()
        desk.reply(unique)
        assert desk.answer() == (unique, 0, b"")


def test_an_interrupt_that_comes_before_its_request(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    """Another thread may have the request in hand still."""
    program.send_signal(signal.SIGQUIT)
    interrupt(desk, 2)
    interrupt(desk, 1000)  # answered already, say
    unique = desk.request(READ, READ_BODY, program.pid)
    assert unique == 3
    assert desk.serve() == REQUEST
    desk.forwarded()
    assert desk.silent()
    interrupt(desk, 6)
    assert next(desk.uniques) == 5
    unique = begin(desk, READ, READ_BODY, program.pid)
    assert desk.answer() == (unique, EINTR, b"")


def test_a_read_that_waits_for_its_turn_is_taken_back(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    program.send_signal(signal.SIGQUIT)
    first = [desk.read(0, 1 << 20, FH + 1) for _ in range(40)]
    under_way = 0
    while desk.serve() == REQUEST:
        desk.forwarded()
        under_way += 1
    assert under_way < len(first)
    unique = desk.request(READ, READ_BODY, program.pid)
    assert desk.serve() == NOTHING
    interrupt(desk, unique)
    assert desk.answer() == (unique, EINTR, b"")
    for number in range(len(first)):
        desk.reply(first[number])
        assert desk.answer() == (first[number], 0, b"")
        while desk.serve() == REQUEST:
            assert desk.forwarded()[1] in first
    assert desk.reader.quiet


def given_up(desk: Desk, program: "subprocess.Popen[bytes]", opcode: int, body: bytes) -> int:
    program.send_signal(signal.SIGQUIT)
    unique = begin(desk, opcode, body, program.pid)
    interrupt(desk, unique)
    assert desk.answer() == (unique, EINTR, b"")
    return unique


def entry(node: int) -> bytes:
    return struct.pack("=Q", node) + bytes(120)


def test_a_late_lookup_is_forgotten(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    for body in (entry(0), entry(77)):
        desk.reply(given_up(desk, program, LOOKUP, b"name\0"), body)
    message = desk.forwarded_message()
    assert struct.unpack("=IIQQIIIIQ", message) == (48, FORGET, 0, 77, 0, 0, 0, 0, 1)
    with pytest.raises(BlockingIOError):
        desk.forwarded_message()
    assert desk.reader.quiet


def test_a_late_listing_is_forgotten(desk: Desk, program: "subprocess.Popen[bytes]") -> None:
    listing = b""
    for node, name in (
        (8, b"."),  # the kernel has counted no lookup of these two
        (9, b".."),
        (5, b"a"),
        (0, b"unknown"),
        (6, b"eight888"),
        (7, b"..."),
    ):
        one = entry(node) + struct.pack("=QQII", node, 1, len(name), 8) + name
        listing += one + bytes(-len(one) % 8)
    desk.reply(given_up(desk, program, READDIRPLUS, READ_BODY), listing)
    message = desk.forwarded_message()
    assert struct.unpack_from("=II", message) == (len(message), BATCH_FORGET)
    assert struct.unpack_from("=I", message, 40) == (3,)
    assert list(struct.iter_unpack("=QQ", message[48:])) == [(5, 1), (6, 1), (7, 1)]


def test_a_late_page_of_a_listing_is_forgotten(
    desk: Desk, program: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    """The same where the reader replies; "." is not counted, what could not be looked up does no harm."""
    table = InodeTable(os.open(tmp_path, os.O_RDONLY), quota=16)
    (tmp_path / "a").touch()
    listings = _native.Listings(table.nodes)
    desk.reader.set_nodes(table.nodes, True)
    desk.reader.set_listings(listings)
    directory = os.open(tmp_path, os.O_RDONLY)
    names = [b"-", b".", b"a", b"n" * 300, b"gone", b"file"]
    listings.restore(9, 1, directory, names)
    body = struct.pack("=QQIIQII", 9, 1, 4096, 0, 0, 0, 0)
    unique = given_up(desk, program, READDIRPLUS, body)
    desk.reader.list(unique, 9)
    for wrong in ((unique, 9), (unique, 8), (unique + 1, 9)):  # once, and what there is
        with pytest.raises(OSError, match=r"Invalid|Bad file"):
            desk.reader.list(*wrong)
    desk.reply(unique)
    message = desk.forwarded_message()
    assert struct.unpack_from("=II", message) == (len(message), BATCH_FORGET)
    a, file = ((tmp_path / name).stat().st_ino for name in ("a", "file"))
    assert list(struct.iter_unpack("=QQ", message[48:])) == [(a, 1), (1 << 63, 1), (file, 1)]
    assert desk.silent()
    assert desk.reader.quiet
    listings.close_all()
    table.close()


@pytest.mark.parametrize(("opcode", "closing"), [(OPEN, RELEASE), (OPENDIR, RELEASEDIR)])
def test_what_was_opened_late_is_closed(
    desk: Desk, program: "subprocess.Popen[bytes]", opcode: int, closing: int
) -> None:
    desk.reply(given_up(desk, program, opcode, bytes(8)), struct.pack("=QII", 99, 0, 0))
    message = desk.forwarded_message()
    length, told, unique = struct.unpack_from("=IIQ", message)
    assert (length, told) == (len(message), closing)
    assert unique >= OWN_NUMBERS
    assert struct.unpack_from("=Q", message, 40) == (99,)
    assert not desk.reader.quiet
    desk.reply(unique)
    assert desk.silent()
    assert desk.reader.quiet


def test_it_is_not_quiet_before_the_last_answer_has_left(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """Or a restart would end the thread that is about to answer, and the program would wait for ever."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, libfuse):
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 20)
    segment = _native.create(str(tmp_path / "segment"), 16 << 20)
    pool = segment.client("c").new_pool(persistent=False, exclusive=False)
    page = os.urandom(PAGE_SIZE)
    pool.put(OID, 0, page)
    (tmp_path / "file").write_bytes(page)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    gate = _native.Gate()
    gate.set(OID, PAGE_SIZE, True)
    reader = _native.Reader(device.fileno(), ours.fileno(), libfuse.fileno(), 0, away_ms=0)
    reader.set_pool(pool)
    reader.open(FH, file, gate)  # not local: where it ends may have to be waited for

    def answering() -> bool:
        return any(call.split()[0] == str(WRITEV) for call in of_threads(os.getpid(), "syscall"))

    with kernel, device, ours, libfuse:
        with contextlib.suppress(BlockingIOError):
            while True:  # until it takes no answer
                device.send(b"x", socket.MSG_DONTWAIT)
        kernel.send(
            struct.pack("=IIQQIIII", 80, READ, 2, 1, 0, 0, 0, 0)
            + struct.pack("=QQIIQII", FH, 0, 2 * PAGE_SIZE, 0, 0, 0, 0)
        )
        assert reader.serve(-1, 0) == NOTHING
        eventually(answering)
        assert not reader.quiet
        while (answer := kernel.recv(1 << 21)) == b"x":
            pass
        assert answer[16:] == page
        eventually(lambda: reader.quiet)
        reader.close()
    os.close(file)
    segment.close()
