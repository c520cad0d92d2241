"""Pages in a tier: they come back whole to whoever reads them, and what is wrong with one is an error."""

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tmem.backends import _native, tiering
from tmem.backends.paths import SegmentPaths
from tmem.errors import CorruptPageError, PoolError, TierDownError, TierError
from tmem.types import OID_SIZE, PAGE_SIZE

from ..waiting import wait_until
from .pages import page, pages
from .tiers.faulty import Faults, FaultyTier
from .tiers.memory import MemoryWorld

OID = bytes(OID_SIZE)
NPAGES = 200


def data(npages: int = NPAGES) -> list[bytes]:
    return [page(("text", "random", "tail")[n % 3], n) for n in range(npages)]


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


def demote(client: _native.Client, tier: FaultyTier, any: bool = True) -> int:
    """Let everything that is cold (or any page) leave memory."""
    buffer, hand, demoted = bytearray(1 << 20), 0, 0
    while True:
        hand, places, pages = client.collect(hand, buffer, 100, any, client.tier_epoch)
        locations = tier.write([bytes(buffer[at : at + length]) for at, length in places])
        demoted += client.demote(pages, array("Q", locations))
        if not hand:
            return demoted


@pytest.fixture
def demoted(persistent: _native.Pool, tier: FaultyTier) -> _native.Pool:
    """A pool whose pages are all in the tier."""
    assert persistent.put(OID, 0, b"".join(data())) == NPAGES
    assert demote(persistent.client, tier) == NPAGES
    return persistent


def got(pool: _native.Pool, first: int, npages: int) -> list[bytes]:
    buffer = bytearray(npages * PAGE_SIZE)
    assert pool.get(OID, first, buffer) == npages
    return [bytes(buffer[at : at + PAGE_SIZE]) for at in range(0, len(buffer), PAGE_SIZE)]


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


class Wrapped:
    """A client, of which tests replace methods."""

    def __init__(self, client: _native.Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)

    @property
    def tiered(self) -> bool:
        return self.client.tiered

    @tiered.setter
    def tiered(self, value: bool) -> None:
        self.client.tiered = value

    @property
    def itself(self) -> _native.Client:
        return cast("_native.Client", self)


class TestFiles:
    """With a spill file, found by everybody who attaches the segment."""

    @pytest.fixture
    def paths(self, small: _native.Segment) -> SegmentPaths:
        path = Path(small.path)
        paths = SegmentPaths(path.name, path.parent)
        paths.state.mkdir()
        return paths

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "a spill.file"

    @pytest.fixture
    def spilled(
        self, persistent: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
    ) -> Iterator[_native.Pool]:
        tiering.assign(paths, small, persistent.client, str(file), 4 << 20)
        persistent.put(OID, 0, b"".join(data()))
        url = tiering.of(paths, persistent.client)
        assert url is not None
        writer = tiering.open_tier(url, tiering.identity(small, persistent.client), writer=True)
        writer.retain([])
        assert demote(persistent.client, FaultyTier(writer, Faults())) == NPAGES
        yield persistent
        writer.close()

    def test_every_mapping_finds_it(self, spilled: _native.Pool, small: _native.Segment) -> None:
        other = _native.attach(small.path)
        assert got(other.client("guest").pools()[0], 0, NPAGES) == data()
        other.close()
        assert got(spilled, 0, NPAGES) == data()

    def test_a_file_that_was_cut_off_is_an_error(self, spilled: _native.Pool, file: Path) -> None:
        assert got(spilled, 0, NPAGES) == data()
        os.truncate(file, 20 * 4096)
        with pytest.raises(CorruptPageError):
            got(spilled, NPAGES - 1, 1)
        assert got(spilled, 0, 5) == data()[:5]

    def test_a_file_that_was_written_over_is_an_error(self, spilled: _native.Pool, file: Path) -> None:
        with file.open("r+b") as opened:
            opened.seek(8192)
            opened.write(os.urandom(file.stat().st_size - 8192))
        os.sync()
        bad = 0
        for n in range(NPAGES):
            try:
                assert got(spilled, n, 1) == data()[n : n + 1]
            except CorruptPageError:
                bad += 1
        assert bad > NPAGES - 10

    def test_a_file_that_is_no_more_is_an_error_for_who_comes_late(
        self, spilled: _native.Pool, small: _native.Segment, file: Path
    ) -> None:
        assert got(spilled, 0, 1) == data()[:1]
        file.unlink()
        assert got(spilled, 1, NPAGES - 1) == data()[1:]  # who has it open still reads
        other = _native.attach(small.path)
        other.tier_patience_ms = 50
        with pytest.raises(TierDownError):
            got(other.client("guest").pools()[0], 0, 1)
        other.close()

    def test_a_file_in_use_is_not_given_to_another(
        self, spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
    ) -> None:
        other = small.client("other")
        with pytest.raises(TierError, match="pages of another client"):
            tiering.assign(paths, small, other, str(file), 1 << 20)
        with pytest.raises(TierError, match="has the tier"):
            tiering.assign(paths, small, spilled.client, f"{file}2", 1 << 20)
        assert tiering.assign(paths, small, spilled.client, str(file), 1) == tiering.of(paths, spilled.client)
        assert got(spilled, 0, NPAGES) == data()

    def test_withdrawn_it_is_gone_and_another_may_come(
        self, spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
    ) -> None:
        left: list[int] = []
        tiering.withdraw(paths, small, spilled.client, left.append)
        assert left[0] == NPAGES
        assert spilled.statistics()["tier_pages"] == 0
        assert tiering.of(paths, spilled.client) is None
        (ended,) = tiering.ended_tiers(paths)  # the writer still has it
        assert file.exists()
        tiering.assign(paths, small, spilled.client, f"{file}2", 4 << 20)
        url = tiering.of(paths, spilled.client)
        assert url is not None
        writer = tiering.open_tier(url, tiering.identity(small, spilled.client), writer=True)
        writer.retain([])
        assert demote(spilled.client, FaultyTier(writer, Faults())) == NPAGES
        assert got(spilled, 0, NPAGES) == data()
        writer.close()
        assert ended.link.is_symlink()

    def test_another_client_has_the_file_of_one_that_is_no_more(
        self,
        spilled: _native.Pool,
        small: _native.Segment,
        paths: SegmentPaths,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """But not while its writer still has it, for which the manager gets some time."""
        monkeypatch.setattr(tiering, "_ENDING_S", 0.2)
        spilled.client.destroy()
        again = small.client("guest")
        with pytest.raises(TierDownError, match="in use by another manager"):
            tiering.assign(paths, small, again, str(file), 1 << 20)
        assert file.exists()
        assert not again.tiered

    def test_the_same_file_again_without_a_manager(
        self, small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
    ) -> None:
        tiering.assign(paths, small, client, str(file), 1 << 20)
        client.destroy()
        again = small.client("guest")
        tiering.assign(paths, small, again, str(file), 2 << 20)
        assert file.stat().st_size == 2 << 20
        assert [one.serial for one in tiering.assigned_tiers(paths)] == [again.serial]

    def test_two_withdrawn_one_after_the_other_are_both_removed(
        self,
        spilled: _native.Pool,
        small: _native.Segment,
        paths: SegmentPaths,
        file: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        client, second = spilled.client, file.with_name("second")
        tiering.withdraw(paths, small, client)
        tiering.assign(paths, small, client, str(second), 1 << 20)
        writer = tiering.open_tier(f"file:{second}", tiering.identity(small, client), writer=True)
        tiering.withdraw(paths, small, client)
        assert len(list(tiering.ended_tiers(paths))) == 2
        writer.close()
        tiering.end_all(paths, small.nonce)
        assert not second.exists()
        assert file.exists()  # whose writer still has it
        assert len(list(tiering.ended_tiers(paths))) == 1
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.endswith(
            f"what was stored in file:{str(file).replace(' ', '%20')} stays there, and "
            "nobody needs it: remove it by hand"
        )

    def test_another_tier_comes_while_one_is_opened(
        self, spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
    ) -> None:
        """A server has read where the tier is and is slow to open it, and that is not where the pages are."""
        client = spilled.client
        second = file.with_name("second")

        class Slow(Wrapped):
            """The client, whose tier is another one when it is opened."""

            def attach_tier(self, found: str, *epoch: int) -> None:
                tiering.withdraw(paths, small, client)
                tiering.assign(paths, small, client, str(second), 4 << 20)
                writer = tiering.open_tier(f"file:{second}", tiering.identity(small, client), writer=True)
                writer.retain([])
                assert demote(client, FaultyTier(writer, Faults())) == NPAGES
                writer.close()
                client.attach_tier(found, *epoch)

        assert tiering.attach(small, Slow(client).itself)
        assert got(spilled, 0, NPAGES) == data()

    @pytest.mark.parametrize("other", ["fails", "again"])
    def test_nothing_goes_there_between_the_last_look_and_the_end(
        self,
        persistent: _native.Pool,
        small: _native.Segment,
        paths: SegmentPaths,
        file: Path,
        other: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A command has found nothing in the tier; before it takes that away, another one gives it back, and
        the manager goes on."""
        monkeypatch.setattr(tiering, "_ALONE_S", 0.1)
        client = persistent.client
        tiering.assign(paths, small, client, str(file), 4 << 20)
        writer = tiering.open_tier(f"file:{file}", tiering.identity(small, client), writer=True)
        writer.retain([])
        persistent.put(OID, 0, b"".join(data()))

        class Failing(Wrapped):
            """For a command that cannot bring back all that is there."""

            def live(self, timeout_ms: int) -> bytes:
                return bytes(8)

            def promote(self, hand: int, most: int) -> tuple[int, int]:
                raise TierDownError("it does not answer")

        class Slow(Wrapped):
            """For one that is stopped just as it has found nothing any more."""

            looks = 0

            def live(self, timeout_ms: int) -> bytes | None:
                found = client.live(timeout_ms)
                self.looks += 1
                if self.looks > 2:
                    return found
                with contextlib.suppress(TierDownError):
                    if other == "fails":
                        tiering.withdraw(paths, small, Failing(client).itself)
                    else:
                        tiering.assign(paths, small, client, str(file), 4 << 20)
                if client.tiered:
                    demote(client, FaultyTier(writer, Faults()))
                return found

        tiering.withdraw(paths, small, Slow(client).itself)
        writer.close()
        assert client.statistics()["tier_pages"] == 0
        assert not client.tiered
        again = _native.attach(small.path)
        assert got(again.client("guest").pools()[0], 0, NPAGES) == data()
        again.close()

    def test_interrupted_the_client_keeps_its_tier(
        self, spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths
    ) -> None:
        """With what came back in memory, and demotion going on."""

        def interrupt(left_pages: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiering.withdraw(paths, small, spilled.client, interrupt)
        assert spilled.client.tiered
        assert tiering.of(paths, spilled.client) is not None

    def test_an_end_that_comes_late_removes_nothing_else(
        self, small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
    ) -> None:
        """The manager has seen that a tier ended, and gets to it when the client has it again."""
        tiering.assign(paths, small, client, str(file), 1 << 20)
        held = tiering.open_tier(f"file:{file}", tiering.identity(small, client), writer=True)
        tiering.withdraw(paths, small, client)
        (ended,) = tiering.ended_tiers(paths)
        held.close()
        tiering.assign(paths, small, client, str(file), 1 << 20)
        tiering.end(small, ended)
        assert file.stat().st_size == 1 << 20

    def test_without_a_state_directory_nothing_is_made(
        self, small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
    ) -> None:
        paths.state.rmdir()
        with pytest.raises(TierError, match="start -d' makes it if it is gone"):
            tiering.assign(paths, small, client, str(file), 1 << 20)
        assert not file.exists()

    def test_a_link_that_is_gone_is_made_again(
        self, spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
    ) -> None:
        """The state directory was removed, with what told where the pages are; they wait to be found."""
        client = spilled.client
        (link,) = [one.link for one in tiering.assigned_tiers(paths)]
        link.unlink()
        with pytest.raises(TierError, match="has pages in another tier"):
            tiering.assign(paths, small, client, f"{file}2", 4 << 20)
        assert tiering.assign(paths, small, client, str(file), 1 << 20) == tiering.of(paths, client)
        assert got(spilled, 0, NPAGES) == data()

    def test_a_link_to_a_server_that_is_gone_is_made_again(
        self,
        persistent: _native.Pool,
        small: _native.Segment,
        paths: SegmentPaths,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        client, worlds = persistent.client, {"redis://one": MemoryWorld(), "redis://other": MemoryWorld()}
        monkeypatch.setattr(tiering, "open_tier", lambda url, who, writer: worlds[url].open(who, writer))
        tiering.assign(paths, small, client, "redis://one", 0)
        persistent.put(OID, 0, b"".join(data()))
        writer = tiering.open_tier("redis://one", tiering.identity(small, client), writer=True)
        assert demote(client, FaultyTier(writer, Faults())) == NPAGES
        (link,) = [one.link for one in tiering.assigned_tiers(paths)]
        link.unlink()
        with pytest.raises(TierError, match="has pages in another tier"):
            tiering.assign(paths, small, client, "redis://other", 0)
        tiering.assign(paths, small, client, "redis://one", 0)
        assert got(persistent, 0, NPAGES) == data()

    def test_two_clients_come_at_a_time_to_one_server(
        self, small: _native.Segment, paths: SegmentPaths, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody takes the one for dead who was not there yet when the other looked who lives."""
        world, url = MemoryWorld(), "redis://server"
        monkeypatch.setattr(tiering, "open_tier", lambda url, who, writer: world.open(who, writer))
        monkeypatch.setattr(tiering, "_ALONE_S", 0.1)

        class Slow:
            late: _native.Client | None = None

            def __getattr__(self, name: str) -> object:
                return getattr(small, name)

            def clients(self) -> list[_native.Client]:
                found = small.clients()
                self.late = small.client("late")
                with contextlib.suppress(TierDownError):
                    tiering.assign(paths, small, self.late, url, 0)
                return found

        slow = Slow()
        tiering.assign(paths, cast("_native.Segment", slow), small.client("early"), url, 0)
        assert slow.late is not None
        assert slow.late.tiered == (tiering.of(paths, slow.late) is not None)

    @pytest.mark.parametrize("off", [-NPAGES, -1, 1])
    def test_withdrawn_while_the_counter_is_off(
        self,
        spilled: _native.Pool,
        small: _native.Segment,
        paths: SegmentPaths,
        off: int,
    ) -> None:
        """Somebody was killed between a swap and its count: what is left the slots say."""

        class Miscounted(Wrapped):
            """The client, whose pages in the tier are counted wrong."""

            def statistics(self) -> dict[str, int]:
                counts = spilled.client.statistics()
                return {**counts, "tier_pages": counts["tier_pages"] + off}

        tiering.withdraw(paths, small, Miscounted(spilled.client).itself)
        assert spilled.statistics()["tier_pages"] == 0
        assert got(spilled, 0, NPAGES) == data()

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("file:relative", "no spill file"),
            ("/no/such/directory/x", "is no directory"),
            ("/tmp/x?colour=red", "no spill file"),
            ("ftp://somewhere", "is no tier"),
        ],
    )
    def test_what_is_no_tier_is_refused(
        self, small: _native.Segment, paths: SegmentPaths, client: _native.Client, url: str, words: str
    ) -> None:
        with pytest.raises(TierError, match=words):
            tiering.assign(paths, small, client, url, 1 << 20)
        assert not client.tiered
        assert not list(tiering.assigned_tiers(paths))
