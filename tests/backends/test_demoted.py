"""Pages in a tier: they come back whole to whoever reads them, and what is wrong with one is an error."""

import threading
import time
from array import array

import pytest

from tmem.backends import _native, tiering
from tmem.errors import CorruptPageError, PoolError, TierDownError
from tmem.types import PAGE_SIZE

from ..waiting import wait_until
from .departed import NPAGES, OID, data, demote, got
from .pages import page, pages
from .tiers.faulty import Faults, FaultyTier
from .tiers.memory import MemoryWorld


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def tier(client: _native.Client, small: _native.Segment, faults: Faults) -> FaultyTier:
    """A tier in memory that this process reads."""
    world = MemoryWorld(10**6)
    writer = world.open(tiering.identity(small, client), writer=True)
    writer.retain([])
    made = FaultyTier(writer, faults)
    client.tiered = True
    client.attach_tier(made.read)
    return made


@pytest.fixture
def demoted(persistent: _native.Pool, tier: FaultyTier) -> _native.Pool:
    """A pool whose pages are all in the tier."""
    assert persistent.put(OID, 0, b"".join(data())) == NPAGES
    assert demote(persistent.client, tier) == NPAGES
    return persistent


def test_they_take_no_memory_and_come_back(demoted: _native.Pool) -> None:
    counts = demoted.statistics()
    assert (counts["pages"], counts["tier_pages"], counts["bytes"]) == (NPAGES, NPAGES, 0)
    assert demoted.client.statistics()["used_bytes"] == 0
    assert got(demoted, 0, NPAGES) == data()
    assert got(demoted, 77, 1) == data()[77:78]
    assert demoted.statistics()["pages_fetched"] == NPAGES + 1
    assert demoted.present(OID, 0, 1000) == [(0, NPAGES)]


def test_nobody_waits_for_demotion_that_does_nothing(demoted: _native.Pool, tier: FaultyTier) -> None:
    """One write waits for room; what comes behind it, reads too, would wait for each of the others."""
    client = demoted.client
    device = _native.Device(demoted, OID, 1000 * PAGE_SIZE)

    def refused_after_s() -> float:
        begin = time.monotonic()
        with pytest.raises(OSError, match="No space"):
            device.pwrite(None, b"".join(pages("random", 1, 30)), 500 * PAGE_SIZE, 0)
        return time.monotonic() - begin

    client.cap_bytes = 10 * 4160
    assert refused_after_s() > 1.9
    assert refused_after_s() < 1
    assert demote(client, tier) > 0
    assert refused_after_s() > 1.9  # there is hope again
    client.cap_bytes = 0
    device.pwrite(None, b"".join(pages("random", 1, 30)), 500 * PAGE_SIZE, 0)
    assert got(demoted, 500, 30) == pages("random", 1, 30)


def test_a_write_that_waits_goes_on_where_it_was_refused(demoted: _native.Pool, tier: FaultyTier) -> None:
    """What has found memory is not written again with each try."""
    client, text = demoted.client, b"".join(pages("random", 1, 30))
    device = _native.Device(demoted, OID, 1000 * PAGE_SIZE)
    before = demoted.statistics()
    client.cap_bytes = 20 * 4160
    start = 500 * PAGE_SIZE + 100  # a part of a page at both ends
    writer = threading.Thread(target=device.pwrite, args=(None, text, start, 0))
    writer.start()
    try:
        tried = before["puts_refused"] + 3
        wait_until(lambda: demoted.statistics()["puts_refused"] >= tried, what="it tries")
    finally:
        assert demote(client, tier) == 20
        writer.join()
    counts = demoted.statistics()
    assert counts["puts_stored"] - before["puts_stored"] == 31
    assert counts["puts_replaced"] == before["puts_replaced"]
    buffer = bytearray(len(text))
    device.pread(None, buffer, start, 0)
    assert buffer == text


def test_the_cap_counts_memory(demoted: _native.Pool, tier: FaultyTier) -> None:
    demoted.client.cap_bytes = 40 * 4160
    assert demoted.put(OID, 1000, b"".join(pages("random", 1, 30))) == 30
    assert demote(demoted.client, tier) == 30
    assert demoted.put(OID, 2000, b"".join(pages("random", 1, 30))) == 30
    assert got(demoted, 1000, 30) == got(demoted, 2000, 30) == pages("random", 1, 30)


def test_puts_and_flushes_replace_them(demoted: _native.Pool) -> None:
    assert demoted.put(OID, 3, page("text", 999)) == 1
    assert demoted.flush(OID, 4, 2) == 2
    assert got(demoted, 3, 1) == [page("text", 999)]
    assert demoted.get(OID, 4, bytearray(PAGE_SIZE)) == 0
    assert got(demoted, 6, 1) == data()[6:7]
    assert demoted.statistics()["tier_pages"] == NPAGES - 3
    assert demoted.flush_object(OID) == NPAGES - 2
    assert demoted.statistics()["pages"] == 0


def test_a_refused_put_keeps_the_old_page_or_none(demoted: _native.Pool) -> None:
    demoted.client.cap_bytes = 1
    assert demoted.put(OID, 0, page("random", 5), keep_old=True) == 0
    assert got(demoted, 0, 1) == data()[:1]
    assert demoted.put(OID, 0, page("random", 5)) == 0
    assert demoted.get(OID, 0, bytearray(PAGE_SIZE)) == 0


@pytest.mark.parametrize(
    ("offset", "length"), [(0, NPAGES * PAGE_SIZE), (5000, 1), (4000, 200), (100, 300000)]
)
def test_devices_read_them(demoted: _native.Pool, offset: int, length: int) -> None:
    device = _native.Device(demoted, OID, NPAGES * PAGE_SIZE)
    buffer = bytearray(length)
    device.pread(None, buffer, offset, 0)
    assert buffer == b"".join(data())[offset : offset + length]


def test_parts_of_pages_are_written_to_them(demoted: _native.Pool) -> None:
    device = _native.Device(demoted, OID, NPAGES * PAGE_SIZE)
    whole = bytearray(b"".join(data()))
    for offset, text in (
        (10, b"a few bytes"),
        (3 * PAGE_SIZE - 5, b"across two"),
        (9 * PAGE_SIZE, b"x" * 9000),
    ):
        device.pwrite(None, text, offset, 0)
        whole[offset : offset + len(text)] = text
    device.zero(None, 300, 20 * PAGE_SIZE + 7, 0)
    whole[20 * PAGE_SIZE + 7 : 20 * PAGE_SIZE + 307] = bytes(300)
    buffer = bytearray(len(whole))
    device.pread(None, buffer, 0, 0)
    assert buffer == whole


def test_exports_have_them(demoted: _native.Pool) -> None:
    exporter, buffer, records = demoted.export(), bytearray(100_000), b""
    while n := exporter.fill(buffer):
        records += buffer[:n]
    other = demoted.client.new_pool(persistent=True)
    assert other.import_records(records) == NPAGES
    assert got(other, 0, NPAGES) == data()


def test_a_handoff_passes_them_on_once_and_their_changes(demoted: _native.Pool, tier: FaultyTier) -> None:
    """Uses of pages are noted in the bits that say what was exported: they must not be mixed up."""
    client, other = demoted.client, demoted.client.new_pool(persistent=True)
    assert demoted.put(OID, 1000, b"".join(pages("text", 1, 20))) == 20  # in memory, and marked as used
    client.handoff("copy")
    buffer = bytearray(2 << 20)
    exporter = demoted.export(changes=True)
    assert other.import_records(buffer[: exporter.fill(buffer)]) == NPAGES + 20
    assert client.collect(0, buffer, 100, True, client.tier_epoch)[1] == []  # not while it is copied
    assert got(demoted, 1000, 20) == pages("text", 1, 20)
    assert demoted.flush(OID, 7) == 1
    assert demoted.put(OID, 8, page("text", 4)) == 1
    exporter = demoted.export(changes=True)
    assert other.import_records(buffer[: exporter.fill(buffer)]) == 2
    client.handoff("end")
    assert got(other, 8, 1) == [page("text", 4)]
    assert other.get(OID, 7, bytearray(PAGE_SIZE)) == 0
    assert got(other, 9, NPAGES - 9) == data()[9:]
    assert demote(client, tier) == 21 + (NPAGES + 20 - 1)  # of the one pool, and of the other


def test_pages_in_use_are_not_cold(persistent: _native.Pool, tier: FaultyTier) -> None:
    client = persistent.client
    persistent.put(OID, 0, b"".join(data(60)))
    assert demote(client, tier, any=False) == 0  # just put
    got(persistent, 10, 5)
    persistent.put(OID, 20, page("text", 7))
    assert demote(client, tier, any=False) == 54
    assert persistent.present(OID, 0, 60) == [(0, 60)]
    assert demote(client, tier, any=False) == 6
    assert got(persistent, 10, 1) == data()[10:11]


def test_a_page_that_is_used_meanwhile_stays(persistent: _native.Pool, tier: FaultyTier) -> None:
    client, buffer = persistent.client, bytearray(1 << 20)
    persistent.put(OID, 0, b"".join(data(5)))
    client.collect(0, buffer, 100, False, client.tier_epoch)
    _, places, seen = client.collect(0, buffer, 100, False, client.tier_epoch)
    assert len(places) == 5
    got(persistent, 0, 1)
    persistent.flush(OID, 1)
    persistent.put(OID, 2, page("random", 9))
    locations = tier.write([bytes(buffer[at : at + length]) for at, length in places])
    assert client.demote(seen, array("Q", locations)) == 2
    assert client.demote(seen, array("Q", locations)) == 0
    assert got(persistent, 2, 1) == [page("random", 9)]


def test_same_filled_pages_stay(persistent: _native.Pool, tier: FaultyTier) -> None:
    persistent.put(OID, 0, bytes(10 * PAGE_SIZE))
    assert demote(persistent.client, tier) == 0


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_what_was_read_wrong_once_is_read_again(demoted: _native.Pool, faults: Faults, kind: str) -> None:
    setattr(faults, kind, 2)
    assert got(demoted, 3, 1) == data()[3:4]


def test_what_stays_wrong_is_an_error_and_nothing_else_is(demoted: _native.Pool, faults: Faults) -> None:
    faults.flipped = 1000
    device = _native.Device(demoted, OID, NPAGES * PAGE_SIZE)
    for read in (
        lambda: demoted.get(OID, 5, bytearray(PAGE_SIZE)),
        lambda: device.pread(None, bytearray(PAGE_SIZE), 5 * PAGE_SIZE, 0),
        lambda: device.pwrite(None, b"part", 5 * PAGE_SIZE, 0),
    ):
        with pytest.raises((CorruptPageError, OSError)):
            read()
    assert demoted.put(OID, 6, page("text", 1)) == 1
    assert got(demoted, 6, 1) == [page("text", 1)]
    faults.flipped = 0
    assert got(demoted, 5, 1) == data()[5:6]


def test_a_tier_that_is_down_is_waited_for(demoted: _native.Pool, faults: Faults) -> None:
    faults.down = 3
    assert got(demoted, 5, 1) == data()[5:6]


def test_a_page_that_is_put_anew_is_not_waited_for(demoted: _native.Pool, faults: Faults) -> None:
    """Its reader waits for a tier that is down; what is there now needs no tier."""
    faults.down = 10**6
    found: list[list[bytes]] = []
    reader = threading.Thread(target=lambda: found.append(got(demoted, 5, 1)))
    reader.start()
    left = faults.down
    wait_until(lambda: faults.down < left - 2, what="it tries")
    assert demoted.put(OID, 5, page("text", 7)) == 1
    reader.join(10)  # a third of the patience
    assert found == [[page("text", 7)]]


def test_a_tier_that_stays_down_is_an_error_until_it_is_back(
    demoted: _native.Pool, faults: Faults, small: _native.Segment
) -> None:
    """Never a miss: a page that was missed must not come back (get-get)."""
    small.tier_patience_ms = 50
    faults.down = 10**6
    for _ in range(3):
        with pytest.raises(TierDownError):
            got(demoted, 5, 1)
    assert demoted.client.statistics()["unreachable_gets"] == 3
    assert demoted.put(OID, 1000, page("text", 1)) == 1
    assert got(demoted, 1000, 1) == [page("text", 1)]
    faults.down = 0
    assert got(demoted, 0, NPAGES) == data()


def test_pages_before_the_lost_one_are_returned(demoted: _native.Pool, small: _native.Segment) -> None:
    demoted.put(OID, 0, b"".join(data(3)))
    demoted.client.attach_tier(lambda locations: [None] * len(locations))
    buffer = bytearray(10 * PAGE_SIZE)
    assert demoted.get(OID, 0, buffer) == 3
    with pytest.raises(CorruptPageError):
        demoted.get(OID, 3, buffer)


def test_room_is_not_used_again_under_a_reader(demoted: _native.Pool, tier: FaultyTier) -> None:
    reads, go = threading.Event(), threading.Event()

    def slow(locations: list[int]) -> list[bytes | None]:
        reads.set()
        assert go.wait(40)
        return tier.read(locations)

    client = demoted.client
    client.attach_tier(slow)
    thread = threading.Thread(target=got, args=(demoted, 3, 1))
    thread.start()
    try:
        assert reads.wait(40)
        demoted.flush(OID, 4)
        assert client.live(50) is None
    finally:
        go.set()
        thread.join()
    live = client.live(10_000)
    assert live is not None
    assert len(live) == 8 * (NPAGES - 1)


def test_pages_are_brought_back(demoted: _native.Pool) -> None:
    client, before = demoted.client, demoted.statistics()
    hand, came = client.promote(0, 50)
    assert came == 50
    assert client.promote(hand, 1000) == (0, NPAGES - 50)
    counts = demoted.statistics()
    assert counts["tier_pages"] == 0
    assert {name: counts[name] for name in ("puts", "puts_stored", "puts_replaced", "puts_refused")} == {
        name: before[name] for name in ("puts", "puts_stored", "puts_replaced", "puts_refused")
    }
    assert got(demoted, 0, NPAGES) == data()


def test_pages_without_room_stay_where_they_are(demoted: _native.Pool) -> None:
    demoted.client.cap_bytes = 20_000
    demoted.client.promote(0, 1000)
    with pytest.raises(PoolError, match="no memory"):
        demoted.client.promote(0, 1000)
    assert got(demoted, 0, NPAGES) == data()
    assert demoted.client.statistics()["used_bytes"] <= 20_000


def test_pools_and_clients_with_pages_there_end(demoted: _native.Pool, small: _native.Segment) -> None:
    client = demoted.client
    demoted.destroy()
    assert client.statistics()["tier_pages"] == 0
    client.destroy()
    assert small.check() == []
