"""Answers cut from a stream of bytes, against hiredis, which cuts them as well."""

from collections.abc import Iterable, Sequence

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse

from tmem.backends.tiers.redis_wire import SENT_BYTES, Inbox, Word, encoded

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


def ours(chunks: Sequence[bytes]) -> tuple[list[object], int, bool]:
    """The answers, how many bytes belong to none yet, and whether it was refused."""
    inbox = Inbox(Complaint)
    found: list[object] = []
    try:
        for chunk in chunks:
            for answer in inbox.answers(chunk):
                found.append(answer)
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


def test_a_value_that_comes_in_crumbs_takes_no_more_than_its_length() -> None:
    """A value far longer than what is read at a time, ten bytes each."""
    value = bytes(range(256)) * 4000
    stream = b"$%d\r\n%b\r\n:7\r\n" % (len(value), value)
    found, kept, refused = ours([stream[at : at + 10] for at in range(0, len(stream), 10)])
    assert (found, kept, refused) == ([value, 7], 0, False)


def test_what_is_sent_is_what_a_server_reads() -> None:
    value = b"head" + bytes(range(256)) * 500 + b"tail"
    commands: list[tuple[Word, ...]] = [
        ("SET", b"key", value, "XX"),
        ("WAIT", 1, 20),
        *[("SET", b"k%d" % n, value) for n in range(5)],
        ("GET", "a name"),
    ]
    sent = list(encoded(commands))
    assert len(sent) > 1
    reader = hiredis.Reader()
    for chunk in map(b"".join, sent):
        assert len(chunk) < SENT_BYTES + 2 * len(value)
        reader.feed(chunk)
    for words in commands:
        assert reader.gets() == [w if isinstance(w, bytes) else str(w).encode() for w in words]
    assert not reader.has_data()
