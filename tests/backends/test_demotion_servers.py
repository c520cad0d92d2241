"""Demotion to servers, where batches overlap and whoever writes has no lock."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pytest

from tmem.backends import demotion, tiering
from tmem.backends.tiers.contract import Tier, TierIdentity, Written
from tmem.errors import TierDownError, TierError, TierFullError

from ..waiting import wait_until
from .overlapping import OverlappingTier, OverlappingWriting, Servers
from .tiers.memory import MemoryWorld

if TYPE_CHECKING:
    from typing_extensions import Buffer
from .demoting import MIB, Bench


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
