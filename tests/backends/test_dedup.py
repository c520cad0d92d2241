"""Equal pages of a client are kept once, if it allows that: what it saves, and that nobody notices."""

import json
import mmap
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.condensing import ROUND_S
from tmem.backends.saverecords import Summary
from tmem.errors import CorruptPageError

from . import operations as op
from .pages import oid, page
from .saving import restored, saved
from .test_condensing import Machine

OID = oid(1)
KINDS = 40


def fill(pool: _native.Pool, npages: int) -> None:
    """Put pages of which only `KINDS` differ."""
    for index in range(npages):
        assert pool.put(OID, index, page("text", index % KINDS)) == 1


def intact(pool: _native.Pool, npages: int) -> bool:
    return all(op.page_at(pool, index) == page("text", index % KINDS) for index in range(npages))


@pytest.fixture
def willing(client: _native.Client) -> _native.Client:
    client.dedup = True
    return client


def test_equal_pages_that_nobody_wants_are_kept_once(
    small: _native.Segment, willing: _native.Client, persistent: _native.Pool
) -> None:
    machine = Machine(small)
    fill(persistent, 400)
    before = willing.statistics()["used_bytes"]
    machine.run(2 * ROUND_S - 1)
    assert small.statistics()["twin_pages"] == 0, "what was put a minute ago is warm"
    machine.run(3 * ROUND_S)
    counts, one = small.statistics(), willing.statistics()
    assert (counts["twin_pages"], counts["original_pages"]) == (400, KINDS)
    assert (one["twin_pages"], one["original_pages"]) == (400, KINDS)
    assert one["used_bytes"] == one["original_bytes"] <= before * KINDS / 400
    assert counts["dedup_pages"] == 400
    assert counts["dedup_ns"] > 0
    assert counts["dedup_bytes"] >= before * 0.85
    assert (counts["persistent_pages"], persistent.statistics()["twin_pages"]) == (400, 400)
    assert intact(persistent, 400)
    assert persistent.put(OID, 7, page("random", 7)) == 1
    assert op.page_at(persistent, 7) == page("random", 7)
    assert op.page_at(persistent, 7 + KINDS) == page("text", 7)
    assert persistent.flush(OID, 0, 400) == 400
    machine.run(ROUND_S + 1)
    assert (willing.statistics()["used_bytes"], small.statistics()["original_pages"]) == (0, 0)


def test_nothing_is_shared_unless_the_client_says_so(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool
) -> None:
    assert client.dedup is False
    fill(persistent, 100)
    assert op.dedup(small, warm=True)
    assert small.statistics()["dedup_pages"] == 0
    client.dedup = True
    other = small.client("other")
    other.dedup = True
    fill(other.new_pool(persistent=True), KINDS)
    assert op.dedup(small, warm=True)
    assert other.statistics()["twin_pages"] == 0, "its pages are equal only to another client's"
    assert client.statistics()["twin_pages"] == 100
    client.dedup = False
    assert op.dedup(small, warm=True)
    assert client.statistics()["twin_pages"] == 100, "what is kept once stays so until it is put"
    assert intact(persistent, 100)


def test_a_part_of_a_twin_is_written(
    small: _native.Segment, willing: _native.Client, persistent: _native.Pool
) -> None:
    device = _native.Device(persistent, OID, 100 * _native.PAGE_SIZE)
    fill(persistent, 100)
    assert op.dedup(small, warm=True)
    device.pwrite(None, b"x" * 512, 512, 0)
    expected = bytearray(page("text", 0))
    expected[512:1024] = b"x" * 512
    assert op.page_at(persistent, 0) == bytes(expected)
    assert op.page_at(persistent, KINDS) == page("text", 0)


def test_twins_are_saved_as_the_pages_that_they_are(
    small: _native.Segment, willing: _native.Client, persistent: _native.Pool
) -> None:
    fill(persistent, 100)
    assert op.dedup(small, warm=True)
    assert persistent.statistics()["twin_pages"] == 100
    before = op.export(small, op.Where("guest", persistent.id), False, 1 << 16)
    assert Summary.of(willing).data_bytes > len(before) * 0.9
    for number in range(15):
        assert willing.new_pool(persistent=True).id == number + 1  # it has as many pools as any other
    made = op.restore(small, "copy", [(0, False, before)], True)
    assert made == {0: 100}
    assert intact(small.client("copy", create=False).pool(0), 100)
    assert op.export(small, op.Where("copy", 0), False, 1 << 16) == before


def test_a_damaged_original_is_an_error_and_no_other_page(
    small: _native.Segment, willing: _native.Client, persistent: _native.Pool
) -> None:
    text = json.dumps({"needle": "in a haystack"}).encode() * 200
    data = text[: _native.PAGE_SIZE]
    willing.compress = "none"
    for index in range(3):
        assert persistent.put(OID, index, data) == 1
    assert op.dedup(small, warm=True)
    file = Path(small.path)
    with file.open("r+b") as out, mmap.mmap(out.fileno(), 0) as mapped:
        at = mapped.find(data)
        while at >= 0:  # also what the first ones have left in memory that is free now
            mapped[at + 100] ^= 1
            at = mapped.find(data, at + len(data))
    buffer = bytearray(_native.PAGE_SIZE)
    for index in range(3):
        with pytest.raises(CorruptPageError):
            persistent.get(OID, index, buffer)
    assert persistent.flush(OID, 0, 3) == 3
    assert op.dedup(small, warm=True)
    assert small.statistics()["original_pages"] == 0


def test_the_setting_is_saved(small: _native.Segment, willing: _native.Client) -> None:
    willing.new_pool(persistent=True)
    content = saved(small)
    willing.destroy()
    restored(small, content)
    assert small.client("guest", create=False).dedup
