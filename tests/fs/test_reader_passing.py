"""What the native reader passes to libfuse and back: bytes by number, small messages, bounded room."""

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.fs.reading import GONE, NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .reader_desk import (
    BATCH_FORGET,
    FH,
    FORGET,
    GETATTR,
    GETXATTR,
    LARGEST_MESSAGE,
    MIB,
    READ,
    READDIR,
    READDIRPLUS,
    SETXATTR,
    WRITE,
    Desk,
    make,
)

OTHER = FH + 1
"""A file that the reader does not know, so all of its requests are for libfuse."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


@pytest.mark.parametrize(("start", "size"), [(0, 1), (0, MIB), (4095, 5), (17, MIB - 17)])
def test_a_read_is_answered_from_the_buffer_that_its_reply_names(desk: Desk, start: int, size: int) -> None:
    unique = desk.read(0, size, OTHER)
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (READ, unique)
    data = random.Random(size).randbytes(size)
    desk.reply_with(unique, data, start)
    assert desk.answer() == (unique, 0, data)
    assert desk.reader.quiet


def test_a_read_at_the_end_and_one_that_fails(desk: Desk) -> None:
    for body, error in ((b"", 0), (b"", -5)):
        unique = desk.read(0, 4096, OTHER)
        assert desk.serve() == REQUEST
        desk.forwarded()
        desk.reply(unique, body, error)
        assert desk.answer() == (unique, error, b"")


def test_replies_that_name_nothing_or_too_much_are_errors(desk: Desk) -> None:
    buffer = desk.reader.take(8192)
    longer = desk.reader.send(buffer, 0, 4097)
    with pytest.raises(ValueError, match="one reply"):
        desk.reader.send(buffer, 0, 1)
    with pytest.raises(ValueError, match="some bytes"):
        desk.reader.send(desk.reader.take(10), 5, 2 * MIB)
    for body in (longer, bytes(8), b"12345", bytes(4096)):
        unique = desk.read(0, 4096, OTHER)
        assert desk.serve() == REQUEST
        desk.forwarded()
        desk.reply(unique, body)
        assert desk.answer() == (unique, -5, b"")


@pytest.mark.parametrize("size", [1, 4096, MIB])
def test_a_write_is_passed_on_by_number(desk: Desk, size: int) -> None:
    data = random.Random(size).randbytes(size)
    unique = desk.write(4097, data)
    assert desk.serve() == REQUEST
    message = desk.forwarded_message()
    _, opcode, number = struct.unpack_from("=IIQ", message)
    fh, offset, told = struct.unpack_from("=QQI", message, 40)
    assert (opcode, number, fh, offset) == (WRITE, unique, FH, 4097)
    assert told == len(message) - 80
    payload = desk.reader.payload(message[80:])
    assert memoryview(payload) == data
    desk.write(0, b"another")  # goes elsewhere
    assert desk.serve() == REQUEST
    assert memoryview(payload) == data
    desk.reply(unique, struct.pack("=II", size, 0))
    assert desk.answer() == (unique, 0, struct.pack("=II", size, 0))
    with pytest.raises(ValueError, match="no write"):
        desk.reader.payload(message[80:])
    with pytest.raises(ValueError, match="no write"):
        desk.reader.payload(b"")
    assert memoryview(payload) == data


def test_a_write_that_says_more_than_it_brings(desk: Desk) -> None:
    unique = desk.request(WRITE, struct.pack("=QQIIQII", FH, 0, 100, 0, 0, 0, 0) + bytes(99))
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, -5, b"")
    assert desk.reader.quiet


def test_buffers_outlive_their_reader(desk: Desk) -> None:
    desk.write(0, b"payload")
    assert desk.serve() == REQUEST
    payload = desk.reader.payload(desk.forwarded_message()[80:])
    taken = memoryview(desk.reader.take(3 * MIB))
    assert len(taken) >= 3 * MIB
    desk.reader.send(desk.reader.take(1), 0, 1)  # never replied with
    desk.reader.close()
    taken[-1] = 1
    assert bytes(payload) == b"payload"


@pytest.mark.parametrize("opcode", [READDIR, READDIRPLUS])
def test_listings_come_in_small_messages(desk: Desk, opcode: int) -> None:
    unique = desk.request(opcode, struct.pack("=QQIIQII", FH, 0, MIB, 0, 0, 0, 0))
    assert desk.serve() == REQUEST
    (size,) = struct.unpack_from("=I", desk.forwarded_message(), 56)
    assert size == 65536
    listing = random.Random(1).randbytes(size)
    desk.reply(unique, listing)
    assert desk.answer() == (unique, 0, listing)


def test_many_nodes_are_forgotten_in_parts(desk: Desk) -> None:
    nodes = [(number, number % 7 + 1) for number in range(1, 30_001)]
    body = struct.pack("=II", len(nodes), 0) + b"".join(struct.pack("=QQ", *node) for node in nodes)
    desk.request(BATCH_FORGET, body)
    desk.serve()
    found: list[tuple[int, int]] = []
    while len(found) < len(nodes):
        message = desk.forwarded_message()
        (count,) = struct.unpack_from("=I", message, 40)
        assert len(message) == 48 + 16 * count
        found += list(struct.iter_unpack("=QQ", message[48:]))
    assert found == nodes
    assert desk.reader.quiet


def test_the_largest_attribute_fits(desk: Desk) -> None:
    value = random.Random(1).randbytes(65536)
    body = struct.pack("=IIII", len(value), 0, 0, 0) + b"user." + b"n" * 250 + b"\0" + value
    unique = desk.request(SETXATTR, body)
    assert desk.serve() == REQUEST
    assert desk.forwarded_message()[40:] == body
    desk.reply(unique)
    unique = desk.request(GETXATTR, struct.pack("=II", 65536, 0) + b"user.n\0")
    assert desk.serve() == REQUEST
    desk.forwarded()
    assert desk.answer()[1] == 0
    desk.reply(unique, value)
    assert desk.answer() == (unique, 0, value)
    unique = desk.request(99, bytes(LARGEST_MESSAGE))  # no such request is known
    assert desk.serve() == NOTHING
    assert desk.answer() == (unique, -5, b"")


def test_no_reply_ever_waits_for_room(tmp_path: Path) -> None:
    """Requests beyond what replies have room for stay where they are; all are answered in the end."""
    for desk in make(tmp_path, room_bytes=64 << 10):
        wanted = {desk.request(opcode, body) for opcode, body in [(GETATTR, bytes(16))] * 150}
        listing = struct.pack("=QQIIQII", FH, 0, 65536, 0, 0, 0, 0)
        wanted |= {desk.request(READDIR, listing) for _ in range(5)}
        answered: set[int] = set()
        rounds = 0
        while answered != wanted:
            rounds += 1
            taken = []
            while desk.serve() == REQUEST:
                taken.append(desk.forwarded())
            assert taken, "stuck"
            for opcode, unique in taken:  # all before any is passed on
                body = os.urandom(65536 if opcode == READDIR else 104)
                desk.libfuse.send(struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
            desk.reader.drain()
            answered |= {desk.answer()[0] for _ in taken}
        assert rounds >= 5  # one listing at a time
        assert not desk.reader.full
        assert desk.reader.quiet


def test_hits_go_on_while_many_reads_are_under_way(desk: Desk) -> None:
    """Reads beyond what buffers may be used for wait by themselves."""
    waiting = [desk.read(number * MIB, MIB, OTHER) for number in range(300)]
    under_way = []
    while desk.serve() == REQUEST:
        under_way.append(desk.forwarded()[1])
    assert under_way == waiting[: len(under_way)]
    assert 8 <= len(under_way) <= 64
    assert not desk.reader.full
    hit = desk.read(0, 4096)
    assert desk.serve() == NOTHING
    assert desk.answer()[0] == hit
    other = desk.request(GETATTR, bytes(16))
    assert desk.serve() == REQUEST
    assert desk.forwarded() == (GETATTR, other)
    desk.reply(other)
    answered = [desk.answer()[0]]
    while under_way:
        unique = under_way.pop(0)
        desk.reply_with(unique, unique.to_bytes(8, "big") * (MIB // 8))
        got, error, data = desk.answer()
        assert (got, error, data[-8:]) == (unique, 0, unique.to_bytes(8, "big"))
        answered.append(got)
        while desk.serve() == REQUEST:
            under_way.append(desk.forwarded()[1])
    assert answered[1:] == waiting
    assert desk.reader.quiet


def test_writes_under_way_are_bounded(desk: Desk) -> None:
    data = random.Random(1).randbytes(MIB)
    wanted, under_way = set(), []
    for _ in range(200):
        wanted.add(desk.write(0, data))
        if desk.serve() == REQUEST:
            under_way.append(desk.forwarded()[1])
    assert desk.reader.full
    assert 8 <= len(under_way) <= 128
    while under_way:
        desk.reply(under_way.pop(), struct.pack("=II", MIB, 0))
        wanted.remove(desk.answer()[0])
        while desk.serve() == REQUEST:
            under_way.append(desk.forwarded()[1])
    assert not wanted
    assert not desk.reader.full


def test_what_needs_no_answer_leaves_nothing(desk: Desk) -> None:
    for _ in range(1000):
        desk.request(FORGET, struct.pack("=Q", 1))
        assert desk.serve() == REQUEST
        desk.forwarded()
    assert desk.reader.quiet


def test_the_connection_ends_with_requests_under_way(desk: Desk) -> None:
    reads = [desk.read(0, MIB, OTHER) for _ in range(100)]
    write = desk.write(0, bytes(PAGE_SIZE))
    for _ in range(3):
        assert desk.serve() == REQUEST
        desk.forwarded()
    desk.kernel.close()
    while (event := desk.serve()) == REQUEST:
        desk.forwarded()
    assert event in (GONE, NOTHING)
    for unique in (*reads[:20], write):
        if unique != write:
            desk.reply_with(unique, bytes(PAGE_SIZE))
        else:
            desk.reply(unique, struct.pack("=II", PAGE_SIZE, 0))
    while (event := desk.serve()) == REQUEST:  # those that had to wait for others
        desk.forwarded()
    assert event == GONE
