"""The native reader between a kernel and a libfuse that are ends of sockets here: what it answers."""

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.fs.reading import ASKED, GONE, NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .reader_desk import CREATE, FH, GETATTR, OID, OPEN, OPENDIR, READ, Desk, make

CACHE_DIR, KEEP_CACHE, DIRECT_IO, NOFLUSH, PASSTHROUGH = 1 << 3, 1 << 1, 1 << 0, 1 << 5, 1 << 7


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 4096),
        (4096, 16 * 4096),
        (5, 10),
        (4090, 12),
        (3000, 9 * 4096),
        (39 * 4096, 4096),
        (38 * 4096 + 1, 1 << 20),
        (40 * 4096 - 1001, 1),
        (40 * 4096 - 1000, 1),
        (1 << 30, 4096),
    ],
)
def test_a_hit_is_answered_with_exactly_its_bytes(desk: Desk, offset: int, size: int) -> None:
    unique = desk.read(offset, size)
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, 0, desk.content[offset : offset + size])
    counted = desk.reader.counters()
    assert counted["hit_bytes"] == len(desk.content[offset : offset + size])
    assert counted["forwarded"] == 0


def test_what_is_not_all_there_is_for_libfuse(desk: Desk) -> None:
    desk.pool.flush(OID, 12, 1)
    unique = desk.read(10 * PAGE_SIZE, 4 * PAGE_SIZE)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)
    assert desk.silent()
    unique = desk.read(10 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, 0, desk.content[10 * PAGE_SIZE : 12 * PAGE_SIZE])


def test_what_is_not_a_read_of_a_known_file_is_for_libfuse(desk: Desk) -> None:
    for unique, opcode in (
        (desk.request(GETATTR, bytes(16)), GETATTR),
        (desk.read(0, 4096, fh=8), READ),
        (desk.request(READ, bytes(8)), READ),  # cut off
        (desk.read((1 << 64) - 4096, 8192), READ),
        (desk.read(0, (1 << 20) + 1), READ),
        (desk.read(1 << 44, 4096), READ),  # beyond the last index
    ):
        assert desk.serve() == REQUEST
        assert desk.forwarded() == (opcode, unique)
    desk.reader.close_file(FH)
    unique = desk.read(0, 4096)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)


def test_a_closed_gate(desk: Desk) -> None:
    for oid, size, is_open in ((OID, len(desk.content), False), (OID[::-1], len(desk.content), True)):
        desk.gate.set(oid, size, is_open)
        unique = desk.read(0, 4096)
        assert desk.serve() == REQUEST
        assert desk.forwarded() == (READ, unique)
    desk.gate.set(OID, len(desk.content), True)
    desk.read(0, 4096)
    assert desk.serve() == NOTHING


def test_a_file_whose_size_has_changed(desk: Desk, tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", 5 * PAGE_SIZE)
    unique = desk.read(39 * PAGE_SIZE, PAGE_SIZE)  # reaches the end, so it asks where that is
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)


def test_where_a_file_ends_is_asked_by_a_thread_if_that_may_take_long(desk: Desk, tmp_path: Path) -> None:
    desk.reader.open(FH, desk.file, desk.gate, False)
    unique = desk.read(39 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, 0, desk.content[39 * PAGE_SIZE :])
    desk.read(0, 4096)
    assert desk.serve() == NOTHING  # a hit needs nobody
    os.truncate(tmp_path / "file", 5 * PAGE_SIZE)
    unique = desk.read(39 * PAGE_SIZE, PAGE_SIZE)
    assert desk.reader.serve(-1, 10_000) == REQUEST  # the thread passes it on
    assert desk.forwarded() == (READ, unique)


def test_without_a_pool(desk: Desk) -> None:
    desk.reader.set_pool(None)
    unique = desk.read(0, 4096)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)
    desk.reader.set_pool(desk.pool)
    desk.pool.destroy()
    desk.read(0, 4096)
    assert desk.serve() == REQUEST


def test_a_mark_passes_one_read_on(desk: Desk) -> None:
    desk.reader.stream(FH, 4 * PAGE_SIZE)
    desk.reader.mark(FH, 8 * PAGE_SIZE, 16 * PAGE_SIZE)
    desk.read(4 * PAGE_SIZE, 4 * PAGE_SIZE)
    assert desk.serve() == NOTHING
    assert desk.reader.position(FH) == 8 * PAGE_SIZE
    unique = desk.read(8 * PAGE_SIZE, 4096)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)
    desk.read(9 * PAGE_SIZE, 4096)
    assert desk.serve() == NOTHING


CHUNK = 8 * PAGE_SIZE


def read_in_order(desk: Desk, chunks: range) -> None:
    for number in chunks:
        unique = desk.read(number * CHUNK, CHUNK)
        assert desk.serve() == NOTHING
        assert desk.answer() == (unique, 0, desk.content[number * CHUNK : (number + 1) * CHUNK])


def test_a_stream_is_fetched_ahead_of(desk: Desk) -> None:
    read_in_order(desk, range(3))
    assert desk.reader.counters()["ahead_reads"] == 1  # the first one begins it, the second one shows it
    desk.pool.flush(OID, 3 * CHUNK // PAGE_SIZE, 8)
    read_in_order(desk, range(3, 4))  # from what was fetched
    assert desk.reader.counters()["ahead_reads"] == 2


def test_a_daemon_with_one_cpu_fetches_ahead(desk: Desk) -> None:
    cpus = os.sched_getaffinity(0)  # who reads may have another one: that cannot be told from here
    os.sched_setaffinity(0, {min(cpus)})
    try:
        read_in_order(desk, range(3))
    finally:
        os.sched_setaffinity(0, cpus)
    assert desk.reader.counters()["ahead_reads"] == 1


def test_what_was_fetched_ahead_is_void_after_a_change(desk: Desk) -> None:
    read_in_order(desk, range(3))
    assert desk.reader.counters()["ahead_reads"] == 1
    changed = random.Random(2).randbytes(CHUNK)
    desk.gate.set(OID, len(desk.content), False)
    desk.pool.put(OID, 3 * CHUNK // PAGE_SIZE, changed)
    desk.gate.set(OID, len(desk.content), True)
    unique = desk.read(3 * CHUNK, CHUNK)
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, 0, changed)


def test_random_readers_are_not_read_ahead_of(desk: Desk) -> None:
    for number in (3, 1, 0, 2, 4, 1):
        read_in_order(desk, range(number, number + 1))
    assert desk.reader.counters()["ahead_reads"] == 0


def entry(fh: int, flags: int = 0) -> bytes:
    return struct.pack("=QIi", fh, flags, 0)


def test_replies_are_amended(desk: Desk) -> None:
    def amended(opcode: int, body: bytes, flags: int = os.O_RDWR) -> bytes:
        unique = desk.request(opcode, struct.pack("=II", flags, 0))
        assert desk.serve() == REQUEST
        assert desk.forwarded() == (opcode, unique)
        desk.reply(unique, body)
        got, error, data = desk.answer()
        assert (got, error) == (unique, 0)
        return data

    desk.reader.pass_through(5, 77)
    assert amended(OPENDIR, entry(5)) == entry(5)  # a directory of the same number
    assert amended(OPEN, entry(5, DIRECT_IO)) == struct.pack("=QIi", 5, PASSTHROUGH, 77)
    desk.reader.pass_through(6, 78)
    created = bytes(range(128))
    assert amended(CREATE, created + entry(6, KEEP_CACHE)) == created + struct.pack(
        "=QIi", 6, PASSTHROUGH, 78
    )
    desk.reader.pass_through(9, 79)
    assert amended(GETATTR, entry(9, DIRECT_IO)) == entry(9, DIRECT_IO)  # the same bytes in another reply


def test_who_only_reads_need_not_wait_at_close(desk: Desk) -> None:
    for flags, expected in (
        (os.O_RDONLY, NOFLUSH),
        (os.O_RDWR, 0),
        (os.O_WRONLY, 0),
        (os.O_RDONLY | os.O_NOATIME, NOFLUSH),
    ):
        unique = desk.request(OPEN, struct.pack("=II", flags, 0))
        assert desk.serve() == REQUEST
        desk.forwarded()
        desk.reply(unique, entry(3, DIRECT_IO))
        assert desk.answer() == (unique, 0, entry(3, DIRECT_IO | expected))
    unique = desk.request(OPEN, struct.pack("=II", os.O_RDONLY, 0))
    assert desk.serve() == REQUEST
    desk.reply(unique, error=-13)
    assert desk.answer() == (unique, -13, b"")


@pytest.mark.parametrize(("error", "told"), [(511, 511), (512, 5), (524, 5)])
def test_an_error_that_the_kernel_refuses_is_another_one(desk: Desk, error: int, told: int) -> None:
    """ENOTSUPP, say, which file systems have let out: the program would wait for ever."""
    opening = struct.pack("=II", os.O_RDONLY, 0)
    unique = desk.request(OPEN, opening)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (OPEN, unique)
    desk.reply(unique, error=-error)
    assert desk.answer() == (unique, -told, b"")
    desk.reader.open_shortcut()
    unique = desk.request(OPEN, opening)
    assert desk.serve() == ASKED
    assert desk.reader.asked() is not None
    desk.reader.reply(unique, error)
    assert desk.answer() == (unique, -told, b"")


def test_notifications_go_to_the_kernel(desk: Desk) -> None:
    attributes = struct.pack("=IiQQqq", 40, 2, 0, 1, -1, 0)
    desk.libfuse.send(attributes)
    desk.reader.drain()
    assert desk.kernel.recv(100) == attributes


def test_the_end_of_the_connection(desk: Desk) -> None:
    desk.kernel.close()
    assert desk.reader.serve(-1, 1000) == GONE


def test_it_returns_for_others(desk: Desk) -> None:
    reading, writing = os.pipe()
    try:
        assert desk.reader.serve(reading, 10) == NOTHING
        os.write(writing, b"x")
        assert desk.reader.serve(reading, 60_000) == NOTHING
    finally:
        os.close(reading)
        os.close(writing)


def test_helpers_serve_beside_and_can_be_paused(tmp_path: Path) -> None:
    """All requests are answered once, whoever does it; while paused nobody reads."""
    for desk in make(tmp_path, helpers=3):
        random_ = random.Random(2)
        wanted: dict[int, bytes] = {}
        got: dict[int, bytes] = {}

        def collect(desk: Desk = desk, got: dict[int, bytes] = got) -> None:
            while len(got) < 3000:
                unique, error, data = desk.answer()
                assert not error
                assert unique not in got
                got[unique] = data

        collector = threading.Thread(target=collect)
        serving = threading.Event()

        def serve(desk: Desk = desk, serving: threading.Event = serving) -> None:
            while not serving.is_set():
                assert desk.reader.serve(-1, 20) == NOTHING

        server = threading.Thread(target=serve)
        collector.start()
        server.start()
        for number in range(3000):
            while number - len(got) > 200:
                time.sleep(0.001)
            offset = random_.randrange(len(desk.content) - 1)
            size = random_.choice([1, 4096, 5000, 30 * 4096])
            wanted[desk.read(offset, size)] = desk.content[offset : offset + size]
        collector.join(60)
        serving.set()
        server.join()
        assert got == wanted
        desk.reader.pause(True)
        while not desk.reader.quiet:
            pass
        desk.read(0, 4096)
        assert desk.silent()
        desk.reader.pause(False)
        assert desk.serve() == NOTHING
        assert desk.answer()[2] == desk.content[:4096]


def test_a_pool_can_be_changed_while_it_is_read(tmp_path: Path) -> None:
    for desk in make(tmp_path, helpers=2):
        over = threading.Event()

        def serve(desk: Desk = desk, over: threading.Event = over) -> None:
            while not over.is_set():
                if desk.reader.serve(-1, 10) == REQUEST:
                    _, unique = desk.forwarded()
                    desk.libfuse.send(struct.pack("=IiQ", 16, -5, unique))

        server = threading.Thread(target=serve)
        server.start()
        for turn in range(300):
            unique = desk.read(0, 20 * PAGE_SIZE)
            desk.reader.set_pool(None if turn % 3 == 0 else desk.pool)
            got, error, data = desk.answer()
            assert got == unique
            assert (error, data) in ((0, desk.content[: 20 * PAGE_SIZE]), (-5, b""))
        over.set()
        server.join()


def test_misuse(tmp_path: Path) -> None:
    for desk in make(tmp_path):
        with pytest.raises(ValueError, match="24 bytes"):
            desk.gate.set(b"short", 1, True)
        with pytest.raises(TypeError):
            desk.reader.set_pool("pool")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="positive"):
            desk.reader.pass_through(1, 0)
        desk.reader.close()
        with pytest.raises(ValueError, match="closed"):
            desk.serve()
        desk.reader.close()
