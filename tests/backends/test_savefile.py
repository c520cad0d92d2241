"""The format of save files: what was written is read, and nothing else is believed."""

import io
import json
import struct
from collections.abc import Callable

import pytest

from tmem.backends import _native
from tmem.backends.savefile import (
    ALIGNMENT,
    HEAD_BYTES,
    MAGIC,
    MAX_FRAME_BYTES,
    PREAMBLE_BYTES,
    VERSION,
    FrameReader,
    Kind,
    new_buffer,
)
from tmem.backends.saverecords import ClientRecord, Header, PoolRecord, Totals
from tmem.errors import SaveFileError

from .streams import Stream, client, parts, pool, raw_record, reading

PAGE = bytes(range(256)) * 16
BUFFER = new_buffer(MAX_FRAME_BYTES)


def whole_file() -> bytes:
    """A whole save file of one client with two pages in two frames."""
    stream = Stream("one")
    stream.document(Kind.CLIENT, client())
    stream.data(raw_record(1, PAGE))
    stream.data(raw_record(2, PAGE))
    stream.document(Kind.CLIENT_END, client())
    return stream.end()


def read_all(stream: bytes) -> list[tuple[Kind, bytes]]:
    """Read a save file as `restore` does; SaveFileError unless it is sound to its end."""
    reader = FrameReader(reading(io.BytesIO(stream)), "the file")
    found: list[tuple[Kind, bytes]] = []
    while not found or found[-1][0] is not Kind.END:
        frame = reader.next(BUFFER)
        found.append((frame.kind, bytes(frame.payload)))
    reader.expect_end()
    return found


def test_what_was_written_is_read() -> None:
    kinds, payloads = zip(*read_all(whole_file()), strict=True)
    assert kinds == (Kind.HEADER, Kind.CLIENT, Kind.DATA, Kind.DATA, Kind.CLIENT_END, Kind.END)
    assert payloads[2] == raw_record(1, PAGE)
    assert json.loads(payloads[1]) == client()
    header = Header.parse(json.loads(payloads[0]))
    assert (header.purpose, header.page_size, header.segment) == ("save", 4096, "elsewhere")
    assert Totals.parse(json.loads(payloads[5])) == Totals(1, 5, 2 * (32 + 4096))


def places(stream: bytes) -> list[int]:
    """Return every byte that is not like its neighbours, and one in 61 of those that are."""
    return [at for at in range(len(stream)) if at % ALIGNMENT < 64 or at % ALIGNMENT > 4092 or at % 61 == 0]


def test_every_flipped_bit_is_noticed() -> None:
    whole = whole_file()
    for at in places(whole):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            with pytest.raises(SaveFileError, match="the file "):
                read_all(bytes(damaged))


def test_every_cut_is_noticed() -> None:
    whole = whole_file()
    for length in places(whole)[1:]:
        with pytest.raises(SaveFileError, match=f"ends early, at byte {length}: use another copy"):
            read_all(whole[:length])


def test_an_empty_file() -> None:
    with pytest.raises(SaveFileError, match="is empty: use another copy"):
        read_all(b"")


@pytest.mark.parametrize(
    "foreign",
    [b"#!/bin/sh\n", b"\x7fELF" + bytes(60), bytes(5000), MAGIC[:7] + b"\n" + bytes(100)],
    ids=["text", "ELF", "zeros", "almost"],
)
def test_a_foreign_file(foreign: bytes) -> None:
    with pytest.raises(SaveFileError, match=r"was not written by tmem \(it begins with b"):
        read_all(foreign)


def test_a_file_of_a_newer_version() -> None:
    fields = struct.pack("<8sI", MAGIC, VERSION + 1)
    newer = (fields + struct.pack("<I", _native.checksum(fields) & 0xFFFFFFFF)).ljust(8192, b"\0")
    with pytest.raises(SaveFileError, match=f"version {VERSION + 1} of the format, this tmem reads version"):
        read_all(newer)


def test_a_kind_of_frame_that_nobody_knows() -> None:
    stream = Stream("one")
    stream.document(99)  # type: ignore[arg-type]
    with pytest.raises(SaveFileError, match="kind 99"):
        read_all(stream.value)


def test_two_files_in_one() -> None:
    with pytest.raises(SaveFileError, match=r"goes on behind its end.*one at a time"):
        read_all(whole_file() * 2)


def test_one_byte_too_many() -> None:
    with pytest.raises(SaveFileError, match=f"at byte {len(whole_file())}"):
        read_all(whole_file() + b"\0")


def without(stream: bytes, number: int) -> bytes:
    part = parts(stream)[number]
    return stream[: part.start] + stream[part.end :]


def twice(stream: bytes, number: int) -> bytes:
    part = parts(stream)[number]
    return stream[: part.end] + stream[part.start :]


def swapped(stream: bytes, number: int) -> bytes:
    one, two = parts(stream)[number : number + 2]
    pieces = stream[: one.start], stream[one.end : two.end], stream[one.start : one.end], stream[two.end :]
    return b"".join(pieces)


@pytest.mark.parametrize("change", [without, twice, swapped])
@pytest.mark.parametrize("number", range(5))
def test_frames_are_a_chain(change: Callable[[bytes, int], bytes], number: int) -> None:
    with pytest.raises(SaveFileError, match="the file is damaged at byte"):
        read_all(change(whole_file(), number))


def test_a_frame_of_another_file() -> None:
    """The same client at the same place, but the header's identity differs."""
    other = Stream("one", identity="1" * 32)
    other.document(Kind.CLIENT, client())
    other.data(raw_record(1, PAGE))
    mine, theirs = whole_file(), other.value
    here, there = parts(mine)[2], parts(theirs)[2]
    with pytest.raises(SaveFileError, match="does not follow the one before"):
        read_all(mine[: here.start] + theirs[there.start : there.end] + mine[here.end :])


def test_a_frame_that_is_too_long_is_not_read() -> None:
    long = Stream("one")
    long.data(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(SaveFileError, match=f"a frame of {MAX_FRAME_BYTES + 1} bytes"):
        read_all(long.value)


FLAGS = 1 << 24 | 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"flags": 1}, "version 0 of the specification"),
        ({"flags": 2 << 24 | 1}, "version 2 of the specification"),
        ({"flags": FLAGS | 1 << 4}, "pages of 8192 bytes"),
        ({"flags": FLAGS | 0xF0}, "pages of 134217728 bytes"),
        ({"flags": FLAGS | 4}, "precompressed"),
        *(({"flags": FLAGS | 1 << bit}, "reserved flags") for bit in (3, 8, 15, 23)),
        ({"flags": FLAGS | 2, "uuid": "ab" * 16}, "persistent and shared"),
        ({"flags": 1 << 24 | 2}, "shared without a UUID"),
        ({"flags": 1 << 24, "uuid": "ab" * 16}, "shared without a UUID, or has one although"),
        ({"flags": 1 << 24 | 2, "uuid": "00" * 16}, "a UUID"),
        ({"flags": 1 << 24 | 2, "uuid": "ff" * 16}, "a UUID"),
        ({"flags": 1 << 24 | 2, "uuid": "g" * 32}, "a UUID"),
        ({"flags": 1 << 24 | 2, "uuid": "ab" * 16, "exclusive": True}, "shared and exclusive"),
        ({"id": 16}, "id is 16"),
        ({"id": -1}, "id is -1"),
        ({"id": True}, "id is True"),
        ({"id": "0"}, "id is '0'"),
        ({"flags": 2**32 | FLAGS}, "flags is"),
        ({"exclusive": 0}, "exclusive is 0"),
        ({"more": 1}, "more"),
    ],
    ids=str,
)
def test_a_pool_that_cannot_be(changes: dict[str, object], reason: str) -> None:
    PoolRecord.parse(pool())
    with pytest.raises(ValueError, match=reason):
        PoolRecord.parse(pool(**changes))


SHARED = {"id": 1, "flags": 1 << 24 | 2, "exclusive": False, "uuid": "ab" * 16}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": ""}, "a client called ''"),
        ({"name": "x" * 64}, "a client called"),
        ({"name": "a\0b"}, "a client called"),
        ({"name": 7}, "a client called"),
        ({"weight": 65536}, "weight"),
        ({"weight": 1.5}, "weight"),
        ({"cap_bytes": -1}, "cap_bytes"),
        ({"floor_bytes": None}, "floor_bytes"),
        ({"compress": "zstd"}, "compression 'zstd'"),
        ({"mode": "departed"}, "mode 'departed'"),
        ({"authorised": ["ab" * 16, "ab" * 16]}, "twice"),
        ({"authorised": [f"{n:032x}" for n in range(1, 18)]}, "17 UUIDs"),
        ({"authorised": ["ab"]}, "a UUID"),
        ({"authorised": "ab"}, "no list"),
        ({"pools": [pool(), pool()]}, "two pools of one number"),
        ({"pools": [SHARED]}, "not authorised"),
        ({"pools": [7]}, "no list of objects"),
        ({"pools": {}}, "no list of objects"),
        ({"pools": [{}]}, "PoolRecord"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_a_client_that_cannot_be(changes: dict[str, object], reason: str) -> None:
    ClientRecord.parse(client(authorised=["ab" * 16], pools=[pool(), SHARED]))
    with pytest.raises(ValueError, match=reason):
        ClientRecord.parse({**client(), **changes})


def test_records_of_a_client_say_what_it_is(small: _native.Segment) -> None:
    one = small.client("one")
    one.weight, one.cap_bytes, one.floor_bytes, one.compress = 7, 5 << 20, 1 << 20, "none"
    uuids = [bytes([n]) * 16 for n in (3, 1)]
    for uuid in uuids:
        one.authorise(uuid)
    one.new_pool(persistent=True, id=5)
    one.new_pool(persistent=False, uuid=uuids[0], id=9)
    one.new_pool(persistent=False, exclusive=False, id=0)
    one.mode = "frozen"
    found = ClientRecord.of(one)
    assert ClientRecord.parse(json.loads(json.dumps(found.document()))) == found
    assert (found.name, found.weight, found.cap_bytes, found.floor_bytes) == ("one", 7, 5 << 20, 1 << 20)
    assert (found.compress, found.mode) == ("none", "frozen")
    assert found.authorised == ("01" * 16, "03" * 16)
    pools = {one.id: (one.flags, one.exclusive, one.uuid) for one in found.pools}
    spec = 1 << 24
    assert pools == {5: (spec | 1, False, None), 9: (spec | 2, False, "03" * 16), 0: (spec, False, None)}


def test_the_preamble_is_what_the_documentation_says() -> None:
    assert HEAD_BYTES == 24
    stream = whole_file()
    assert stream[:12] == b"\x89TMEM\r\n\x1a\1\0\0\0"
    assert stream[16:PREAMBLE_BYTES] == bytes(PREAMBLE_BYTES - 16)
    assert [part.start % 4096 for part in parts(stream)] == [0] * 6
    assert parts(stream)[0].start == 4096
