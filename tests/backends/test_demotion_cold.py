"""Pages that nobody has used for long go to the tier although there is memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from tmem.backends.tiers.spill import SpillFile
from tmem.errors import TierFullError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer
from .demoting import MIB, OID, Bench


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
