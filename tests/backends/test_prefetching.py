"""Pages come back from their tier while there is plenty of memory: not too far, and none is lost."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tmem.backends import _native, tiering
from tmem.backends.demotion import Demotion, Marks
from tmem.backends.prefetching import QUIET_S, REST_S, Room
from tmem.errors import TierDownError
from tmem.types import PAGE_SIZE

from ..waiting import wait_until
from .demoting import MIB, OID, Bench
from .pages import stamp_of
from .test_manager import running

PLENTY = 1 << 40

BACK = """
import sys
from pathlib import Path
from tmem.backends import _native
from tmem.backends.demotion import Demotion
from tmem.backends.paths import SegmentPaths
path, now_s = Path(sys.argv[1]), 0.0
demotion = Demotion(SegmentPaths(path.name, path.parent), _native.attach(str(path)), clock=lambda: now_s,
                    room=lambda: 64 * 4096)
while True:
    demotion.round()
    now_s += 1
"""


class Back(Bench):
    """A bench whose demotion brings pages back, as far as `room_bytes` goes."""

    def __init__(self, segment: _native.Segment, directory: Path) -> None:
        super().__init__(segment, directory, 32 * MIB)
        self.room_bytes = PLENTY
        self.demotion = Demotion(self.paths, segment, Marks(), self.clock, lambda: self.room_bytes)

    def press(self) -> None:
        """Have pages leave memory until only a megabyte is in it."""
        self.client.cap_bytes = MIB
        self.rounds(20)
        self.client.cap_bytes = 0

    def flush(self, first: int, npages: int) -> None:
        self.pool.flush(OID, first, npages)
        for index in range(first, first + npages):
            self.pages.pop(index, None)
        self.segment.compact(4, 10**9)

    @property
    def in_tier(self) -> int:
        return self.client.statistics()["tier_pages"]

    def has_fewer_in_tier(self, pages: int) -> bool:
        return self.in_tier < pages

    @property
    def fetched(self) -> int:
        return self.pool.statistics()["pages_fetched"]


@pytest.fixture
def back(small: _native.Segment, tmp_path: Path) -> Iterator[Back]:
    made = Back(small, tmp_path)
    yield made
    made.demotion.close()


def test_they_come_back_once_memory_has_been_in_plenty_for_a_while(back: Back) -> None:
    stored = back.put(0, 10**6)
    back.rounds(6)
    demoted = back.demotion.demoted_pages
    assert back.in_tier == demoted > 100
    back.flush(stored // 2, stored - stored // 2)  # a program that ends
    left = back.in_tier
    assert left > 50
    back.rounds(4)
    assert back.in_tier == left
    back.rounds(30)
    assert back.in_tier == 0
    assert back.demotion.prefetched_pages == back.pool.statistics()["pages_prefetched"] == left
    assert back.demotion.prefetching_ns > 0
    back.file.rename(f"{back.file}.away")  # nobody needs it
    back.check()
    assert back.fetched == 0
    back.rounds(100)
    assert back.demotion.demoted_pages == demoted
    assert back.segment.check() == []


def test_they_come_as_far_as_there_is_room_and_do_not_go_again(back: Back) -> None:
    first = 0
    while first < 8000:
        stored = back.put(first, 500)
        first += stored
        if stored < 500:
            back.rounds(2)
    back.rounds(30)
    demoted = back.demotion.demoted_pages
    assert back.demotion.prefetched_pages == 0  # there is no plenty
    back.flush(first - 1500, 1500)
    back.rounds(60)
    came = back.demotion.prefetched_pages
    assert came > 100
    assert back.in_tier > 3000
    told = back.segment.statistics()
    used, limit = told["chunks_used"], told["chunks_total"]  # without the tables
    assert limit * 2 // 3 < used <= limit * 3 // 4
    back.rounds(100)
    assert (back.demotion.demoted_pages, back.demotion.prefetched_pages) == (demoted, came)
    back.check()


def test_after_a_shortage_there_must_be_plenty_again(back: Back) -> None:
    """Also if all came back the last time: it would take turns with demotion."""
    back.put(0, 1000)
    back.press()
    back.rounds(20)
    assert back.in_tier == 0
    index = 1000
    while back.segment.occupied[0] < back.segment.limits[0] * 0.7:  # between both marks
        index += back.put(index, 10)
    came = back.demotion.prefetched_pages
    back.client.cap_bytes = back.client.statistics()["used_bytes"]
    back.rounds(8)
    back.client.cap_bytes = 0
    back.put(index, 500)
    left = back.in_tier
    share = back.segment.occupied[0] / back.segment.limits[0]
    assert left > 20
    assert 10 / 16 < share < 12 / 16
    back.rounds(40)
    assert (back.in_tier, back.demotion.prefetched_pages) == (left, came)
    back.check()


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("nonsense")])
def test_demotion_goes_on_where_nobody_knows_what_there_is(back: Back, error: Exception) -> None:
    def room() -> int:
        raise error

    back.demotion.close()
    back.demotion = Demotion(back.paths, back.segment, Marks(), back.clock, room)
    back.put(0, 10**6)
    back.rounds(20)
    assert back.demotion.demoted_pages > 100


def test_no_more_comes_than_the_machine_can_spare(back: Back) -> None:
    back.put(0, 1500)
    back.press()
    left = back.in_tier
    assert left > 800
    back.room_bytes = 0
    back.rounds(30)
    assert back.in_tier == left
    back.room_bytes = 10 * PAGE_SIZE
    back.rounds(1)
    assert left - 80 < back.in_tier < left
    back.room_bytes = PLENTY
    back.rounds(30)
    assert back.in_tier == 0
    back.check()


def test_a_cap_stays_a_cap(back: Back) -> None:
    back.put(0, 1500)
    back.press()
    back.client.cap_bytes = MIB + MIB // 2
    back.rounds(60)
    used = back.client.statistics()["used_bytes"]
    assert MIB < used <= back.client.cap_bytes * 3 // 4
    assert back.in_tier > 0
    demoted = back.demotion.demoted_pages
    back.rounds(60)
    assert back.demotion.demoted_pages == demoted
    back.check()


def test_of_pages_that_are_merely_cold_only_those_near_used_ones_come(back: Back) -> None:
    back.put(0, 512)
    back.segment.tier_cold_s = 100
    back.rounds(230)
    assert back.in_tier == 512
    buffer = bytearray(PAGE_SIZE)
    assert back.pool.get(OID, 300, buffer) == 1
    back.rounds(2)
    came = back.demotion.prefetched_pages
    assert 1 < came <= 64
    back.pool.get(OID, 301, buffer)
    assert back.fetched == 1
    back.rounds(90)
    assert (back.in_tier, back.demotion.prefetched_pages) == (512 - came, came)
    back.rounds(150)
    assert back.in_tier == 512  # nobody used them
    back.segment.tier_cold_s = 0
    back.rounds(20)
    assert back.in_tier == 0
    back.check()


def test_a_tier_that_fails_loses_nothing_and_is_asked_again(back: Back) -> None:
    asked: list[int] = []

    def down(locations: list[int]) -> list[bytes | None]:
        asked.append(len(locations))
        raise TierDownError("no answer")

    back.put(0, 1000)
    back.press()
    left = back.in_tier
    back.client.attach_tier(down)
    back.rounds(30)
    assert back.in_tier == left
    assert 1 <= len(asked) <= 30 / REST_S + 1
    assert back.client.statistics()["unreachable_gets"] == 0
    back.client.attach_tier(str(back.file))
    back.rounds(30)
    assert back.in_tier == 0
    back.check()


def test_a_tier_that_hangs_is_waited_for_by_nobody(back: Back) -> None:
    asks, goes_on = threading.Event(), threading.Event()
    good = tiering.open_tier(f"file:{back.file}", tiering.identity(back.segment, back.client), writer=False)

    def hangs(locations: list[int]) -> list[bytes | None]:
        asks.set()
        assert goes_on.wait(60)
        return good.read(locations)

    back.put(0, 1000)
    back.press()
    left = back.in_tier
    back.client.attach_tier(hangs)
    back.rounds(int(QUIET_S) + 2)
    assert asks.is_set()
    assert back.in_tier == left
    other = _native.attach(back.segment.path)  # a server: it reads the file by itself
    pool = other.client("guest").pools()[0]
    buffer = bytearray(PAGE_SIZE)
    for index, version in back.pages.items():
        assert pool.get(OID, index, buffer) == 1
        assert stamp_of(bytes(buffer)) == index << 8 | version
    assert pool.flush(OID, 0, 10) == 10
    back.put(5, 5, version=2)
    for index in range(5):
        del back.pages[index]
    goes_on.set()

    def came() -> bool:
        back.rounds(1)
        return back.in_tier == 0

    wait_until(came, what="it goes on")
    back.check()
    other.close()
    good.close()


def test_who_brings_them_back_is_killed(back: Back) -> None:
    """SIGKILL at any moment: each page is in the tier or in memory, and another one goes on."""
    back.put(0, 1500)
    back.press()
    back.demotion.close()
    for kill in range(4):
        before = back.in_tier
        with subprocess.Popen([sys.executable, "-c", BACK, back.segment.path]) as process:
            wait_until(partial(back.has_fewer_in_tier, before), what="pages come back")
            if kill < 3:
                os.kill(process.pid, signal.SIGKILL)
            else:
                wait_until(lambda: back.in_tier == 0, what="all come back")
                process.terminate()
        back.segment.reap()
        back.check()
        assert back.segment.check() == []


def test_the_manager_does_it(
    segment: _native.Segment, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    made = Bench(segment, tmp_path, 32 * MIB)
    made.demotion.close()
    with running(made.paths, eventually):
        made.client.cap_bytes = MIB
        made.put(0, 10**6)
        wait_until(lambda: made.client.statistics()["tier_pages"] > 50, what="pages go to the tier")
        made.client.cap_bytes = 0
        wait_until(lambda: made.client.statistics()["tier_pages"] == 0, what="pages come back")
        made.check()
    assert made.pool.statistics()["pages_fetched"] == 0


@pytest.mark.parametrize(("available_mib", "spare_mib"), [(100, 0), (1000, 0), (3000, 1976)])
def test_two_margins_are_left_to_others(
    small: _native.Segment, tmp_path: Path, available_mib: int, spare_mib: int
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {8192 << 10} kB\nMemAvailable: {available_mib << 10} kB\n")
    room = Room(small, tmp_path)
    assert room() == spare_mib * MIB
    (tmp_path / "meminfo").write_text("")
    assert room() == 0  # which nobody knows
