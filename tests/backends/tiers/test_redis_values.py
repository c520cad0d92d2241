"""Packing of records into values, and their names."""

import random
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmem.backends import _native
from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.contract import MAX_LOCATION, MAX_RECORD_BYTES, MIN_RECORD_BYTES, TierIdentity

from .contract import IDENTITY, OTHERS, record, records

if TYPE_CHECKING:
    from typing_extensions import Buffer


def packed(records: Sequence["Buffer"]) -> list[memoryview]:
    """Return the values that hold the records, side by side, with nothing around them."""
    sizes = values.VALUE_BYTES, values.MAX_RECORDS
    room, starts, ends = _native.pack(list(records), *sizes, None, 0, 0)
    whole = memoryview(room)
    return [whole[start:end] for start, end in zip(starts, ends, strict=True)]


def unpacked(value: bytes | memoryview) -> list[bytes | None]:
    """The records of a value beside which others lie."""
    return values.unpack(b"before" + value + bytes(5000), 6, 6 + len(value))[0]


def test_records_come_back_in_order() -> None:
    batch = records(0, 300)
    found = packed([memoryview(array("B", one)) for one in batch])
    at = 0
    for value in found:
        group = batch[at : at + value[0]]
        at += len(group)
        assert len(value) <= values.VALUE_BYTES
        assert value == values.pack(group)
        assert unpacked(value) == group
        around = b"$9\r\n" + value + b"\r\n"
        assert values.unpack(bytearray(around), 4, 4 + len(value)) == (group, sum(map(len, group)), False)
    assert at == len(batch)


@pytest.mark.parametrize("length", [MIN_RECORD_BYTES, 1850, MAX_RECORD_BYTES])
def test_values_are_filled(length: int) -> None:
    found = packed([record(n, length) for n in range(200)])
    for value in found[:-1]:
        full = value[0] == values.MAX_RECORDS
        assert full or len(value) + length + 2 > values.VALUE_BYTES


def test_values_lie_where_others_did() -> None:
    """If there is room; and nothing is written beyond."""
    large, small = records(0, 60), records(100, 50)
    used = values.Packed(large).room
    assert values.Packed(small, used).room is used
    exact = bytearray(sum(len(value) + 130 for value in packed(large)))
    assert values.Packed(large, exact).room is exact
    short = exact[:-1]
    before = bytes(short)
    assert values.Packed(large, short).room is not short
    assert bytes(short) == before


def test_what_is_sent_stores_and_removes_values() -> None:
    """As whoever cuts commands sees it; numbers and values may have any length."""
    rng = random.Random(1)
    for start in map(values.prefix, (IDENTITY, TierIdentity(2**64 - 1, 63, 2**32 - 1))):
        room = None
        for count in (200, 0, 1, 30):
            batch = [record(n) for n in range(count)]
            stored = values.Packed(batch, room)
            room = stored.room
            wanted = packed(batch)
            numbers = [rng.choice((n + 1, values.MAX_NUMBER - n)) for n in range(len(wanted))]
            keys = [values.key(start, number) for number in numbers]
            assert cut(stored.sets(start, numbers)) == [
                [b"SET", key, bytes(value)] for key, value in zip(keys, wanted, strict=True)
            ]
            assert cut(values.unlinks(start, numbers)) == [[b"UNLINK", key] for key in keys]
            assert stored.sizes == list(map(len, wanted))
            assert stored.counts == [value[0] for value in wanted]


def cut(commands: Iterable[bytes | memoryview]) -> list[object]:
    found = []
    for command in commands:
        reader = hiredis.Reader()
        reader.feed(bytes(command))
        found.append(reader.gets())
        assert not reader.has_data()
    return found


def test_no_commands_without_room() -> None:
    room, start = bytearray(400), values.prefix(IDENTITY)
    assert _native.resp_sets(room, [100, 300], [150, 398], start, [1, 2], 4)[0] > 0
    for starts, ends, numbers in (
        ([10], [20], [1]), ([200], [399], [1]), ([100, 190], [150, 200], [1, 2]), ([100], [90], [1]),
        ([-5], [20], [1]), ([100], [120], [-1]), ([100], [120], [1, 2]), ([100, 200], [120], [1, 2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"room before|start, an end|no number"):
            _native.resp_sets(room, starts, ends, start, numbers, 4)
    with pytest.raises(ValueError, match="too long"):
        _native.resp_unlinks("x" * 130, [1], 4)


@given(st.lists(st.integers(0, 80)))
def test_runs_of_one_slot(numbers: list[int]) -> None:
    start = values.prefix(IDENTITY)
    runs = [numbers[run] for run in values.neighbours(numbers)]
    assert [number for run in runs for number in run] == numbers
    tags = [{values.key(start, number).split(b"}")[0] for number in run} for run in runs]
    assert all(len(tag) == 1 for tag in tags)
    assert all(one != other for one, other in pairwise(tags))


def test_what_no_value_can_hold_is_refused() -> None:
    assert packed([]) == []
    for wrong in (bytes(values.VALUE_BYTES - 2), bytes(70_000)):
        with pytest.raises(ValueError, match="longer than a value"):
            packed([b"a record", wrong, b"another"])
    assert len(packed([bytes(values.VALUE_BYTES - 3)])[0]) == values.VALUE_BYTES
    with pytest.raises(BufferError):  # not contiguous
        packed([b"a record", memoryview(b"every other")[::2]])
    for most in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            _native.pack([b"a record"], 100, most, None, 0, 0)


def test_dead_records_leave_their_places() -> None:
    sparse = values.pack([b"", b"one", b"", b"two"])
    assert unpacked(sparse) == [None, b"one", None, b"two"]
    assert values.unpack(sparse, 0, len(sparse))[2]
    assert unpacked(values.pack([])) == []


def test_damaged_values_give_no_foreign_bytes() -> None:
    rng = random.Random(3)
    batch = records(10, 12)
    packed = values.pack(batch)
    for end in [0, 1, 2, 24, 25, *rng.sample(range(len(packed)), 50)]:
        found = unpacked(packed[:end])
        assert found == batch[: len(found)]
        assert len(found) < 12
    for _ in range(200):  # whatever it is, it is no exception
        noise = rng.randbytes(rng.randrange(300))
        assert unpacked(noise) == unpacked_slowly(noise)
        values.lengths(rng.randbytes(rng.randrange(10)))
    for start, end in ((-1, 5), (3, 2), (0, 11)):
        with pytest.raises(ValueError, match="must lie in"):
            values.unpack(bytes(10), start, end)


def unpacked_slowly(value: bytes) -> list[bytes | None]:
    """What `unpack` finds, in Python."""
    found: list[bytes | None] = []
    at = 1 + 2 * value[0] if value else 0
    for length in values.lengths(value):
        if at + length > len(value):
            break
        found.append(value[at : at + length] or None)
        at += length
    return found


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 64))
def test_runs_of_neighbours(starts: list[int], most: int) -> None:
    locations = [location for start in starts for location in range(start, start + start % 5)]
    runs = _native.runs(locations, most)
    assert [number * most + place + n for _, number, place, count in runs for n in range(count)] == locations
    assert [at for at, _, _, _ in runs] == [sum(run[3] for run in runs[:n]) for n in range(len(runs))]
    assert all(0 <= place < place + count <= most for _, _, place, count in runs)
    for (_, number, place, count), (_, other, first, _) in pairwise(runs):
        assert (other, first) != (number, place + count)  # as long as they can be


def test_what_is_no_list_of_locations() -> None:
    for locations, most, why in (([1, -1], 64, "not negative"), ([1], 0, "at least one")):
        with pytest.raises(ValueError, match=why):
            _native.runs(locations, most)


def test_keys() -> None:
    start = values.prefix(IDENTITY)
    numbers = [1, 15, 16, 255, values.MAX_NUMBER]
    for number in numbers:
        name = values.key(start, number)
        assert name.startswith(start.encode())
        assert values.number_of(start, name) == number
        assert all(values.number_of(values.prefix(other), name) is None for other in OTHERS)
    assert values.number_of(start, values.counter_key(start)) is None
    assert values.number_of(start, b"") is None
    assert values.MAX_NUMBER << values.PLACE_BITS | (values.MAX_RECORDS - 1) == MAX_LOCATION


def test_neighbours_share_a_slot() -> None:
    start = values.prefix(IDENTITY)
    tags = {values.key(start, number).split(b"}")[0] for number in range(32, 48)}
    assert len(tags) == 1
    assert values.key(start, 48).split(b"}")[0] not in tags
