"""The policy of demotion: when it begins, how far it goes, and what happens when a tier refuses or ends."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from tmem.backends import _native, demotion, tiering
from tmem.backends.demotion import Demotion, Marks
from tmem.backends.paths import SegmentPaths
from tmem.backends.tiers import spill
from tmem.backends.tiers.contract import Tier, TierIdentity, Written
from tmem.backends.tiers.spill import SpillFile
from tmem.errors import TierDownError, TierError, TierFullError
from tmem.types import OID_SIZE, PAGE_SIZE

from ..waiting import wait_until
from .overlapping import OverlappingTier, OverlappingWriting, Servers
from .pages import stamp_of, stamped
from .tiers.memory import MemoryWorld

if TYPE_CHECKING:
    from typing_extensions import Buffer

OID = bytes(OID_SIZE)
MIB = 1 << 20


class Clock:
    """Time goes on by a hundredth of a second with each look, at first."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.look_s = 0.01

    def __call__(self) -> float:
        self.now_s += self.look_s
        return self.now_s


class Bench:
    """A segment of 8 MiB, its client with a spill file, and the demotion of it."""

    def __init__(self, segment: _native.Segment, directory: Path, size_bytes: int) -> None:
        self.segment = segment
        self.paths = SegmentPaths(Path(segment.path).name, Path(segment.path).parent)
        self.paths.state.mkdir(exist_ok=True)
        self.client = segment.client("guest")
        self.pool = self.client.new_pool(persistent=True)
        self.file = directory / "spill"
        tiering.assign(self.paths, segment, self.client, str(self.file), size_bytes)
        self.clock = Clock()
        self.demotion = Demotion(self.paths, segment, Marks(), self.clock)
        self.pages: dict[int, int] = {}

    def put(self, first: int, npages: int, version: int = 1) -> int:
        """Put pages one by one until one is refused; the number stored."""
        for index in range(first, first + npages):
            if not self.pool.put(OID, index, stamped(index << 8 | version), keep_old=True):
                return index - first
            self.pages[index] = version
        return npages

    def check(self) -> None:
        buffer = bytearray(PAGE_SIZE)
        for index, version in self.pages.items():
            assert self.pool.get(OID, index, buffer) == 1
            assert stamp_of(bytes(buffer)) == index << 8 | version

    def rounds(self, count: int = 10) -> None:
        for _ in range(count):
            self.demotion.round()
            self.clock.now_s += 1

    @property
    def free_share(self) -> float:
        return (self.segment.freeable_bytes() + self.segment.occupied[2]) / self.segment.limits[1]


@pytest.fixture
def bench(small: _native.Segment, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(small, tmp_path, 32 * MIB)
    yield made
    made.demotion.close()


def test_nothing_goes_while_there_is_memory(bench: Bench) -> None:
    bench.put(0, 500)
    bench.rounds()
    assert bench.demotion.demoted_pages == 0


def test_it_begins_below_the_one_mark_and_ends_above_the_other(bench: Bench) -> None:
    bench.put(0, 10**6)
    assert bench.free_share < 1 / 8
    bench.rounds()
    assert 3 / 16 <= bench.free_share < 1 / 3
    demoted = bench.demotion.demoted_pages
    assert demoted > 100
    bench.rounds()
    assert bench.demotion.demoted_pages == demoted
    bench.check()


def test_far_more_than_memory_goes_in(bench: Bench) -> None:
    first = 0
    while first < 12000:
        stored = bench.put(first, 500)
        first += stored
        if stored < 500:
            bench.rounds(2)
    assert bench.client.statistics()["tier_pages"] > 5000
    bench.check()
    for version in (2, 3):
        for start in range(0, 12000, 500):
            while bench.put(start, 500, version) < 500:
                bench.rounds(2)
    bench.check()
    assert bench.demotion.problems() == {}


def test_a_cap_is_a_shortage_too(bench: Bench) -> None:
    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    bench.rounds()
    used = bench.client.statistics()["used_bytes"]
    assert MIB * 2 // 3 < used < MIB * 7 // 8
    bench.check()


def test_pages_in_use_stay(bench: Bench) -> None:
    """Of many pages a few are read between any two looks: the others go."""
    first = 0
    while bench.free_share > 0.11:  # short, not urgent
        first += bench.put(first, 20)
    buffer = bytearray(50 * PAGE_SIZE)
    bench.pool.get(OID, 100, buffer)
    bench.demotion.round()
    for _ in range(6):
        bench.clock.now_s += 1.5
        before = bench.pool.statistics()["pages_fetched"]
        bench.pool.get(OID, 100, buffer)
        assert bench.pool.statistics()["pages_fetched"] == before
        bench.demotion.round()
    assert bench.demotion.demoted_pages > 100


def test_a_full_tier_refuses_and_is_shown_and_nothing_is_lost(small: _native.Segment, tmp_path: Path) -> None:
    bench = Bench(small, tmp_path, MIB)
    stored = bench.put(0, 10**6)
    for _ in range(20):
        bench.rounds(2)
        more = bench.put(stored, 10**6)
        stored += more
    assert "is full" in bench.demotion.problems()["guest"]
    assert bench.put(stored, 1) == 0
    bench.check()
    bench.pool.flush(OID, 0, stored // 2)
    for index in range(stored // 2):
        bench.pages.pop(index, None)
    before = bench.client.statistics()["tier_pages"]
    bench.put(stored, 10**6)
    bench.rounds()
    assert bench.client.statistics()["tier_pages"] > before + 100  # in the room of those that were flushed
    bench.check()
    bench.demotion.close()


def test_a_manager_that_comes_later_goes_on(bench: Bench) -> None:
    first = bench.put(0, 10**6)
    bench.rounds()
    bench.demotion.close()
    bench.demotion = Demotion(bench.paths, bench.segment, Marks(), bench.clock)
    while bench.put(first, 300):
        first += 300
        bench.rounds(3)
        if first > 5000:
            break
    bench.check()


def test_a_client_that_ends_takes_its_file_along(bench: Bench) -> None:
    bench.put(0, 10**6)
    bench.rounds()
    bench.client.destroy()
    assert bench.file.exists()
    bench.rounds(1)
    assert not bench.file.exists()
    assert not list(tiering.assigned_tiers(bench.paths))


def test_a_file_that_is_gone_is_shown(bench: Bench) -> None:
    bench.file.unlink()
    bench.put(0, 10**6)
    bench.rounds(2)
    assert "cannot be opened" in bench.demotion.problems()["guest"]
    assert bench.demotion.demoted_pages == 0
    bench.check()


def test_whatever_goes_wrong_is_shown_and_over_when_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what nobody has thought of, and what comes before there is anything to write to."""

    def fails(*args: object) -> list[int]:
        raise MemoryError

    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    for owner, name in ((demotion, "Errand"), (SpillFile, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            bench.rounds(3)
            assert bench.demotion.problems() == {"guest": "MemoryError"}
            assert bench.demotion.demoted_pages == 0
    bench.rounds(5)
    assert bench.demotion.problems() == {}
    assert bench.demotion.demoted_pages > 100
    bench.check()


def test_a_command_that_was_killed_is_shown(bench: Bench) -> None:
    """It took the client's tier away, or was about to give it: nothing goes there."""
    bench.client.tiered = False
    bench.rounds(1)
    said = bench.demotion.problems()["guest"]
    assert said.endswith(f"give it again: tmem --name {bench.paths.name} set guest --tier file:{bench.file}")
    assert (
        tiering.assign(bench.paths, bench.segment, bench.client, str(bench.file), 0) == f"file:{bench.file}"
    )
    bench.rounds(1)
    assert bench.demotion.problems() == {}


def test_a_client_with_a_problem_may_end(bench: Bench) -> None:
    """Between a round and the question what the problems are, of which the manager ended."""
    bench.file.unlink()
    bench.rounds(1)
    bench.client.destroy()
    assert "cannot be opened" in bench.demotion.problems()["guest"]
    bench.rounds(1)
    assert bench.demotion.problems() == {}


def test_withdrawn_the_manager_removes_the_file(bench: Bench) -> None:
    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    bench.rounds()
    bench.client.cap_bytes = 0
    tiering.withdraw(bench.paths, bench.segment, bench.client)
    assert bench.client.statistics()["tier_pages"] == 0
    assert bench.file.exists()
    bench.rounds(1)
    assert not bench.file.exists()
    bench.check()


def test_another_tier_between_two_looks(bench: Bench) -> None:
    """Pages go to the tier that readers know of, not to the one before."""
    bench.client.cap_bytes = MIB
    first = bench.put(0, 10**6)
    bench.rounds()
    bench.client.cap_bytes = 0
    tiering.withdraw(bench.paths, bench.segment, bench.client)
    tiering.assign(bench.paths, bench.segment, bench.client, f"{bench.file}2", 32 * MIB)
    bench.client.cap_bytes = MIB
    bench.put(first, 10**6)
    bench.rounds()
    assert bench.client.statistics()["tier_pages"] > 100
    assert not bench.file.exists()
    bench.check()
    bench.demotion.close()
    bench.demotion = Demotion(bench.paths, bench.segment, Marks(), bench.clock)
    bench.rounds(1)
    bench.check()


@pytest.mark.parametrize("another", [False, True])
def test_withdrawn_while_a_batch_is_written(
    bench: Bench, another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = SpillFile.write

    def slow(tier: SpillFile, records: "Sequence[Buffer]") -> list[int]:
        locations = write(tier, records)
        if not written:
            bench.client.cap_bytes = 0
            tiering.withdraw(bench.paths, bench.segment, bench.client)
            if another:
                tiering.assign(bench.paths, bench.segment, bench.client, f"{bench.file}2", 32 * MIB)
        written.append(len(locations))
        return locations

    monkeypatch.setattr(SpillFile, "write", slow)
    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    bench.rounds()
    assert written
    assert bench.client.statistics()["tier_pages"] == 0
    assert not bench.file.exists()
    bench.check()


def test_a_client_that_comes_while_the_manager_looks(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is assigned its tier after the manager has looked who lives: nobody takes that for a dead one's."""
    assigned = tiering.assigned_tiers
    made: list[_native.Client] = []

    def late(paths: SegmentPaths) -> Iterator[tiering.Assigned]:
        if not made:
            made.append(bench.segment.client("late"))
            made[0].new_pool(persistent=True)
            tiering.assign(paths, bench.segment, made[0], str(tmp_path / "late"), MIB)
        return assigned(paths)

    clients = [*bench.segment.clients()]
    monkeypatch.setattr(tiering, "assigned_tiers", late)
    assert len(clients) == 1
    bench.rounds(1)
    assert (tmp_path / "late").exists()
    assert tiering.of(bench.paths, made[0]) is not None


def test_a_complaint_about_a_tier_that_ended_is_not_for_ever(bench: Bench) -> None:
    bench.rounds(1)
    tiering.withdraw(bench.paths, bench.segment, bench.client)
    (ended,) = tiering.ended_tiers(bench.paths)
    other = (
        bench.paths.state / "ended-40-1-1"
    )  # the manager's own opening is let go of; somebody else's is not
    other.symlink_to(f"file:{bench.file}2")
    spill.create(Path(f"{bench.file}2"), TierIdentity(bench.segment.nonce, 40, 1), MIB)
    held = SpillFile(Path(f"{bench.file}2"), TierIdentity(bench.segment.nonce, 40, 1), writer=True)
    bench.rounds(1)
    assert not ended.link.is_symlink()
    assert "in use" in bench.demotion.problems()[other.name]
    held.close()
    bench.rounds(1)
    assert not other.is_symlink()
    assert bench.demotion.problems() == {}


def test_a_tier_that_hangs_delays_its_own_client_only(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = bench.segment.client("other")
    pool = other.new_pool(persistent=True)
    tiering.assign(bench.paths, bench.segment, other, str(tmp_path / "other"), 32 * MIB)
    goes_on = threading.Event()
    write = SpillFile.write

    def hanging(tier: SpillFile, records: "Sequence[Buffer]") -> list[int]:
        if tier.path == bench.file:
            goes_on.wait()
        return write(tier, records)

    monkeypatch.setattr(SpillFile, "write", hanging)
    bench.client.cap_bytes = other.cap_bytes = MIB
    bench.put(0, 10**6)
    index = 0
    while pool.put(OID, index, stamped(index << 8), keep_old=True):
        index += 1
    bench.rounds(20)
    before = bench.demotion.demoted_pages
    assert before > 50
    assert other.statistics()["tier_pages"] == before
    assert bench.client.statistics()["tier_pages"] == 0
    other.destroy()
    bench.rounds(2)
    assert not (tmp_path / "other").exists()
    assert bench.demotion.demoted_pages == before  # what it has done it has done
    goes_on.set()

    def goes() -> bool:  # rounds do not wait for one that was too slow before
        bench.rounds(1)
        return bench.client.statistics()["tier_pages"] > 50

    wait_until(goes)
    bench.check()


def test_a_server_has_one_writer_of_a_client_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client is given its tier again while the manager still waits for the servers: it is written for once
    that has ended. Files have a lock, servers have none."""
    world, goes_on, waits = MemoryWorld(10**6), threading.Event(), threading.Event()
    writers: list[int] = [0]

    class Counted:
        def __init__(self, inner: Tier) -> None:
            self.inner = inner
            writers.append(writers[-1] + 1)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def write(self, records: "Sequence[Buffer]") -> list[int]:
            if not goes_on.is_set():
                waits.set()
                goes_on.wait()
            return self.inner.write(records)

        def begin(self, records: "Sequence[Buffer]") -> Written:
            return Written(self.write(records))

        def destroy(self) -> None:
            self.inner.destroy()
            self.close()

        def close(self) -> None:
            writers.append(writers[-1] - 1)

    def opened(url: str, who: TierIdentity, writer: bool) -> Tier:
        inner = world.open(who, writer)
        return cast("Tier", Counted(inner)) if writer else inner

    tiering.withdraw(bench.paths, bench.segment, bench.client)
    url = "redis://server/0?replicas="
    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(tiering, "open_tier", opened)
        tiering.assign(bench.paths, bench.segment, bench.client, f"{url}1", 0)
        bench.rounds(1)
        bench.rounds(1)
        assert waits.wait(40)
        tiering.withdraw(bench.paths, bench.segment, bench.client)
        tiering.assign(bench.paths, bench.segment, bench.client, f"{url}0", 0)
        before = len(writers)
        bench.rounds(3)
        assert max(writers[before:], default=writers[-1]) == 1
        assert "replicas=1" in bench.demotion.problems()["guest"]
        goes_on.set()

        def goes() -> bool:
            bench.rounds(1)
            return bench.demotion.problems() == {} and bench.client.statistics()["tier_pages"] > 50

        wait_until(goes)
        assert max(writers[before:]) == 1
        bench.check()
        bench.client.cap_bytes = 0
        tiering.withdraw(bench.paths, bench.segment, bench.client)
        bench.rounds(1)


def test_cold_pages_go_although_there_is_memory(bench: Bench) -> None:
    """Those that nobody has used for so long, but not before that time; and none unless it is set."""
    bench.put(0, 500)
    bench.rounds(300)
    assert bench.demotion.demoted_pages == 0
    bench.segment.tier_cold_s = 100
    buffer = bytearray(PAGE_SIZE)
    since_s = bench.clock.now_s
    for second in range(240):
        for index in (0, 7, 499):  # in use, each within any 70 s
            if second % 60 == index % 60:
                assert bench.pool.get(OID, index, buffer) == 1
        bench.rounds(1)
        assert bench.clock.now_s > since_s + 100 or bench.demotion.demoted_pages == 0
    assert bench.demotion.demoted_pages == bench.demotion.cold_pages == 497
    assert bench.pool.statistics()["pages_fetched"] == 0
    bench.check()


def test_cold_pages_that_have_gathered_go_in_a_tenth_of_the_time(bench: Bench) -> None:
    """Many batches a round, or it would take hours; but one of a slow tier, whose reads wait for it."""
    bench.segment.tier_cold_s = 100
    bench.put(0, 2000)
    bench.rounds(105)
    assert bench.demotion.demoted_pages == 0
    bench.clock.now_s += 100
    bench.clock.look_s = 0.2
    bench.rounds(1)
    batch = bench.demotion.cold_pages
    assert 300 < batch < 1000
    bench.rounds(1)
    assert bench.demotion.cold_pages < 2 * batch + 300
    bench.clock.look_s = 0.001
    bench.rounds(1)
    assert bench.demotion.cold_pages == 2000
    bench.check()


def test_marks_that_pressure_took_away_make_nothing_cold(bench: Bench) -> None:
    bench.segment.tier_cold_s = 100
    bench.put(0, 300)
    bench.rounds(105)  # a lap for cold pages has taken the marks away
    bench.client.cap_bytes = MIB // 2
    bench.rounds(5)
    bench.client.cap_bytes = 0
    demoted = bench.demotion.demoted_pages
    assert demoted > 50
    assert bench.demotion.cold_pages == 0
    since_s = bench.clock.now_s
    while bench.clock.now_s < since_s + 90:
        bench.rounds(1)
    assert bench.demotion.cold_pages == 0
    bench.rounds(10)
    assert bench.demotion.cold_pages == 300 - demoted
    bench.check()


def test_a_tier_that_refuses_cold_pages_is_asked_again_after_that_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def full(tier: SpillFile, records: "Sequence[Buffer]") -> list[int]:
        asked.append(bench.clock.now_s)
        raise TierFullError("the tier is full")

    bench.segment.tier_cold_s = 100
    bench.put(0, 300)
    with monkeypatch.context() as patch:
        patch.setattr(SpillFile, "write", full)
        bench.rounds(500)
        assert len(asked) in (3, 4)
        assert bench.demotion.problems() == {}  # nobody waits for memory
    bench.rounds(110)
    assert bench.demotion.cold_pages == 300
    bench.check()


class Busy(OverlappingTier):
    """A tier in servers; notes how many batches were on their way at a time."""

    most = 0

    def begin(self, records: "Sequence[Buffer]") -> OverlappingWriting:
        writing = super().begin(records)
        Busy.most = max(Busy.most, len(self.begun))
        return writing


@pytest.fixture
def servers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """The bench's client has a tier in servers, where batches overlap."""
    made = Servers()
    monkeypatch.setattr(tiering, "open_tier", lambda url, who, writer: Busy(made))
    monkeypatch.setattr(Busy, "most", 0)
    tiering.withdraw(bench.paths, bench.segment, bench.client)
    tiering.assign(bench.paths, bench.segment, bench.client, "redis://server/0", 0)
    return made


def test_while_servers_work_on_a_batch_the_next_is_collected(bench: Bench, servers: Servers) -> None:
    """And what is under way counts: no more goes than is wanted."""
    bench.put(0, 10**6)
    bench.rounds()
    assert Busy.most == 2
    assert 3 / 16 <= bench.free_share < 1 / 3
    assert bench.demotion.problems() == {}
    bench.check()


@pytest.mark.parametrize("complaint", [TierDownError("no answer"), TierFullError("it is full")])
def test_servers_that_fail_with_a_batch_acknowledged(
    bench: Bench, servers: Servers, complaint: TierError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged is there, the rest stays; what failed arrives all the same, and names nothing."""
    ended: list[int] = []
    end = OverlappingWriting.end

    def fails_later(writing: OverlappingWriting) -> list[int]:
        if len(ended) > 0:
            servers.fail.append(complaint)
        locations = end(writing)
        ended.append(len(locations))
        return locations

    bench.put(0, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(OverlappingWriting, "end", fails_later)
        bench.rounds(3)
    assert bench.demotion.problems() == {"guest": str(complaint)}
    assert bench.client.statistics()["tier_pages"] == bench.demotion.demoted_pages == ended[0]
    servers.fail.clear()
    for writing in servers.late:
        writing.arrive()
    bench.check()
    bench.rounds()
    assert bench.demotion.problems() == {}
    assert bench.free_share >= 3 / 16
    bench.check()


@pytest.mark.parametrize("end", ["withdrawn", "given another", "destroyed"])
def test_a_client_whose_tier_ends_with_batches_under_way(
    bench: Bench, servers: Servers, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = Busy.begin, 0
    writings: list[OverlappingWriting] = []

    def ends(tier: Busy, records: "Sequence[Buffer]") -> OverlappingWriting:
        nonlocal begun
        begun += 1
        writing = begin(tier, records)
        writings.append(writing)
        if begun == 2 and end == "destroyed":
            bench.client.destroy()
        elif begun == 2:
            bench.client.cap_bytes = 0
            tiering.withdraw(bench.paths, bench.segment, bench.client)
            if end != "withdrawn":
                tiering.assign(bench.paths, bench.segment, bench.client, f"{bench.file}2", 32 * MIB)
        return writing

    bench.client.cap_bytes = MIB
    bench.put(0, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(Busy, "begin", ends)
        bench.rounds(1)
    assert begun == 2
    assert bench.demotion.demoted_pages == 0
    # What came to the servers after whoever took the tier away had removed everything.
    kept = {at for one in writings for at in one.locations} & servers.records.keys() - servers.forgotten
    assert not kept
    if end != "destroyed":
        assert bench.client.statistics()["tier_pages"] == 0
        bench.check()
    bench.rounds(2)
    assert not any(tiering.ended_tiers(bench.paths))


def test_what_lands_at_the_end_of_a_round_ends_a_problem(bench: Bench, servers: Servers) -> None:
    """A round that has time for one batch waits for it only once its time is up."""
    bench.put(0, 10**6)
    servers.refuse.append(TierDownError("no answer"))
    bench.rounds(1)
    assert bench.demotion.problems() == {"guest": "no answer"}
    bench.clock.look_s = demotion.ROUND_S * 0.6
    while not bench.demotion.demoted_pages:
        bench.rounds(1)
    assert bench.demotion.problems() == {}


def test_a_batch_that_lands_after_another_could_not_begin_ends_no_problem(
    bench: Bench, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Busy.begin

    def begins_one(tier: Busy, records: "Sequence[Buffer]") -> OverlappingWriting:
        if tier.begun:
            raise TierDownError("no answer")
        return begin(tier, records)

    monkeypatch.setattr(Busy, "begin", begins_one)
    bench.put(0, 10**6)
    while not bench.demotion.demoted_pages:
        bench.rounds(1)
    assert bench.demotion.problems() == {"guest": "no answer"}


def test_what_a_client_had_goes_once_nothing_is_on_its_way_there(
    bench: Bench, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers have no lock that says so, as files have. Who looked earlier has found nothing to remove."""
    goes_on, end = threading.Event(), OverlappingWriting.end

    def hanging(writing: OverlappingWriting) -> list[int]:
        goes_on.wait()
        return end(writing)

    monkeypatch.setattr(demotion, "PATIENCE_S", 0.05)
    monkeypatch.setattr(OverlappingWriting, "end", hanging)
    bench.put(0, 10**6)
    bench.rounds(3)
    bench.client.destroy()
    bench.demotion._remove_ended()  # before the next look
    bench.rounds(3)
    assert any(tiering.assigned_tiers(bench.paths))
    goes_on.set()

    def removed() -> bool:
        bench.rounds(1)
        return not any(tiering.assigned_tiers(bench.paths))

    wait_until(removed)
    assert servers.numbered
    assert servers.records == {}
