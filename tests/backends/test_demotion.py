"""The policy of demotion: when it begins, how far it goes, and what happens when a tier refuses or ends."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import _native, demotion, tiering
from tmem.backends.demotion import Demotion, Marks
from tmem.backends.paths import SegmentPaths
from tmem.backends.tiers import spill
from tmem.backends.tiers.contract import TierIdentity
from tmem.backends.tiers.spill import SpillFile
from tmem.types import PAGE_SIZE

from ..waiting import wait_until
from .pages import stamped

if TYPE_CHECKING:
    from typing_extensions import Buffer
from .demoting import MIB, OID, Bench


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
