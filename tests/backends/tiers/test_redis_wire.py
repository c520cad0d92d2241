"""Answers cut from a stream of bytes, against hiredis, which cuts them as well."""

from collections.abc import Iterable, Sequence

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import InvalidResponse

from tmem.backends import _native
from tmem.backends.tiers.redis_wire import SENT_BYTES, Inbox, Wire, Word, encoded

LINES = st.binary(max_size=40).filter(lambda raw: not {13, 10} & set(raw))
VALUES = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from([b"\r\n", b"$3", b"\0"])).map(b"".join))
ANSWERS = st.one_of(
    VALUES.map(lambda raw: b"$%d\r\n%b\r\n" % (len(raw), raw)),
    st.just(b"$-1\r\n"),
    st.integers(-(10**17), 10**17).map(lambda number: b":%d\r\n" % number),
    LINES.map(lambda line: b"+%b\r\n" % line),
    LINES.map(lambda line: b"-%b\r\n" % line),
)
CUTS = st.lists(st.integers(1, 60))


class Complaint(Exception):
    """An error that a server answers."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Complaint) and str(self) == str(other)

    __hash__ = Exception.__hash__


def cut(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    chunks = []
    for length in cuts:
        chunks.append(stream[:length])
        stream = stream[length:]
    return [chunk for chunk in (*chunks, stream) if chunk]


def ours(chunks: Sequence[bytes], most: int = 1000) -> tuple[list[object], int, bool]:
    """The answers, how many bytes belong to none yet, and whether it was refused."""
    inbox = Inbox(Complaint, most)
    found: list[object] = []
    try:
        for chunk in chunks:
            while chunk:
                room = inbox.room()
                read_bytes = min(len(room), len(chunk))
                room[:read_bytes], chunk = chunk[:read_bytes], chunk[read_bytes:]
                for answers in inbox.answers(read_bytes):
                    found += answers
    except InvalidResponse:
        return found, 0, True
    return found, len(inbox), False


def theirs(chunks: Sequence[bytes]) -> tuple[list[object], bool]:
    reader = hiredis.Reader(
        protocolError=InvalidResponse, replyError=Complaint, notEnoughData=NOTHING, errors="replace"
    )
    found: list[object] = []
    try:
        for chunk in chunks:
            reader.feed(chunk)
            while (answer := reader.gets()) is not NOTHING:
                found.append(answer)
    except InvalidResponse:
        return found, True
    return found, False


NOTHING = object()


@given(st.lists(ANSWERS), st.binary(max_size=3), CUTS)
def test_any_cut_gives_the_answers_that_hiredis_gives(
    answers: list[bytes], more: bytes, cuts: list[int]
) -> None:
    begun = b"$30\r\n" + more  # of one that is not whole
    found, kept, refused = ours(cut(b"".join(answers) + begun, cuts))
    assert (found, refused) == theirs(cut(b"".join(answers) + begun, cuts))
    assert len(found) == len(answers)
    assert kept == len(begun)


@given(st.lists(ANSWERS, max_size=3), st.lists(st.sampled_from(b"$:+-*_%0123456789\r\nx")).map(bytes), CUTS)
def test_garbage_is_refused_or_waited_for(answers: list[bytes], garbage: bytes, cuts: list[int]) -> None:
    """Never more than hiredis finds, and not less but where it knows kinds of answers that we never get."""
    stream = b"".join(answers) + garbage
    found, _, refused = ours(cut(stream, cuts))
    wanted, wrong = theirs([stream])
    assert found == wanted[: len(found)]
    assert len(found) >= len(answers)
    assert refused or (found == wanted and not wrong)


@pytest.mark.parametrize(
    "answer",
    [b"$99999999999\r\n", b"$-2\r\n", b"$3\r\nabcd\r\n", b"$ 3\r\nabc\r\n", b"$\r\n", b":1e3\r\n", b":\r\n",
     b"+a\nb\r\n", b"*1\r\n:1\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"+" + bytes(70_000)],
)  # fmt: skip
def test_no_answer(answer: bytes) -> None:
    assert ours([b"+OK\r\n", answer]) == ([b"OK"], 0, True)


@given(st.lists(ANSWERS, min_size=1), st.data())
def test_no_more_than_was_asked_for(answers: list[bytes], data: st.DataObject) -> None:
    most = data.draw(st.integers(0, len(answers) - 1))
    found, kept, refused = ours([b"".join(answers)], most)
    assert (found, refused) == (theirs([b"".join(answers[:most])])[0], False)
    assert kept == len(b"".join(answers[most:]))


@given(st.lists(ANSWERS), st.binary(max_size=40), st.integers(0, 50), st.integers(0, 50))
def test_the_core_cuts_what_is_whole_and_looks_at_nothing_else(
    answers: list[bytes], garbage: bytes, before: int, after: int
) -> None:
    """Whatever lies around what was read; and what it left is where it says."""
    stream = b"".join(answers) + garbage
    around = bytes([13]) * before + stream + b"\r\n" * after
    found, end = _native.resp_answers(around, before, before + len(stream), 1000, None)
    assert found == theirs([stream])[0][: len(found)]
    alone, alone_end = _native.resp_answers(stream, 0, len(stream), 1000, None)
    assert (found, end) == (alone, alone_end + before)
    if all(not answer.startswith(b"-") for answer in answers):
        assert len(found) >= len(answers)
    for start, last in ((-1, 2), (3, 2), (0, len(around) + 1)):
        with pytest.raises(ValueError, match="must lie in"):
            _native.resp_answers(around, start, last, 1, None)


def test_a_value_that_comes_in_crumbs_takes_no_more_than_its_length() -> None:
    """A value far longer than what is read at a time, ten bytes each."""
    value = bytes(range(256)) * 4000
    stream = b"$%d\r\n%b\r\n:7\r\n" % (len(value), value)
    found, kept, refused = ours([stream[at : at + 10] for at in range(0, len(stream), 10)])
    assert (found, kept, refused) == ([value, 7], 0, False)


def test_an_inbox_has_room_for_what_is_there() -> None:
    """A value and a little more at first, more than that once all the room was needed, and a large value."""
    inbox = Inbox(Complaint, 5)
    rooms = []
    for chunk in (b"$40000\r\n", bytes(40_000) + b"\r\n", b"$300000\r\n", bytes(300_000) + b"\r\n"):
        while chunk:
            room = inbox.room()
            rooms.append(len(room))
            read_bytes = min(len(room), len(chunk))
            room[:read_bytes], chunk = chunk[:read_bytes], chunk[read_bytes:]
            assert all(
                len(answer) in (40_000, 300_000) for run in inbox.answers(read_bytes) for answer in run
            )
    assert rooms == [33 << 10, 40_010 - 8, 256 << 10, 300_011 - 9]
    assert len(inbox) == 0


@given(st.binary(max_size=40), st.binary(max_size=20), st.binary(max_size=20))
def test_slots(plain: bytes, tag: bytes, rest: bytes) -> None:
    for key in (plain, b"{%b}%b" % (tag, rest), b"%b{%b}%b" % (plain, tag, rest), b"%b{%b" % (plain, tag)):
        assert _native.resp_slot(key) == key_slot(key)


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_what_is_sent_is_what_a_server_reads(kind: type[bytes] | type[memoryview]) -> None:
    value = kind(b"head" + bytes(range(256)) * 500 + b"tail")
    commands: list[tuple[Word, ...]] = [
        ("SET", b"key", value, "XX"),
        ("WAIT", 1, 20),
        *[("SET", b"k%d" % n, value) for n in range(5)],
        ("GET", "a name"),
    ]
    sent = encoded(commands)
    assert len(sent) > 1
    assert sum(part is value for parts in sent for part in parts) == 6  # from where it lies
    reader = hiredis.Reader()
    for chunk in map(b"".join, sent):
        assert len(chunk) < SENT_BYTES + 2 * len(value)
        reader.feed(chunk)
    for words in commands:
        assert reader.gets() == [shown(word) for word in words]
    assert not reader.has_data()


def shown(word: Word) -> bytes:
    return bytes(word) if isinstance(word, bytes | memoryview) else str(word).encode()


WORDS = st.one_of(
    st.binary(max_size=30),
    st.binary(max_size=30).map(lambda raw: memoryview(raw)),
    st.text(max_size=30),
    st.integers(),
    st.floats(allow_nan=False),
)


@given(st.lists(st.lists(WORDS, min_size=1).map(tuple)), st.integers(1, 200), st.integers(0, 30))
def test_any_words_are_sent(commands: list[tuple[Word, ...]], sent_bytes: int, copied_bytes: int) -> None:
    reader = hiredis.Reader()
    chunks = _native.resp_encode(list(commands), sent_bytes, copied_bytes)
    for chunk in map(b"".join, chunks):
        assert len(chunk) >= sent_bytes or chunk == b"".join(chunks[-1])
        reader.feed(chunk)
    for words in commands:
        assert reader.gets() == [shown(word) for word in words]
    assert not reader.has_data()


class Taker:
    """A connection whose kernel takes so many bytes at a time, or none now."""

    def __init__(self, takes: list[int]) -> None:
        self._takes = takes
        self.taken = bytearray()
        self._sock = self
        self._parser = self

    parse_error = Complaint

    def gettimeout(self) -> float:
        return 1.0

    def settimeout(self, seconds: float) -> None:
        pass

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        takes = self._takes.pop(0) if self._takes else 1 << 30
        if not takes:
            raise BlockingIOError
        some = b"".join(parts)[:takes]
        self.taken += some
        return len(some)


@given(
    st.lists(st.lists(WORDS | st.binary(min_size=1000, max_size=3000), min_size=1).map(tuple)),
    st.lists(st.integers(0, 5000)),
)
def test_however_little_the_kernel_takes(commands: list[tuple[Word, ...]], takes: list[int]) -> None:
    taker, refused = Taker(list(takes)), 0
    wire = Wire(taker, commands, None)
    while wire.sending:
        refused += not wire.send()
    assert taker.taken == b"".join(b"".join(parts) for parts in encoded(commands))
    assert refused <= takes.count(0) + 1


def test_more_pieces_than_the_kernel_takes() -> None:
    value = bytes(2000)
    chunks = _native.resp_encode([("SET", b"k", value)] * 2000, 1 << 40, 1000)
    assert [len(parts) <= 1024 for parts in chunks] == [True] * len(chunks)
    assert len(b"".join(b"".join(parts) for parts in chunks)) > 2000 * len(value)


def test_what_are_no_words_is_refused() -> None:
    for commands in ([1], ["GET"], [("GET", "\udc80")], [("GET", memoryview(b"every other")[::2])]):
        with pytest.raises((TypeError, UnicodeEncodeError, BufferError)):
            _native.resp_encode(commands, 10, 10)  # type: ignore[arg-type]
