"""What is told of tiers: up or down, how full, how old that is; and that nobody waits for one to be told."""

import shutil
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tmem.backends import _native
from tmem.backends.demotion import Demotion, Marks
from tmem.backends.tierlooks import LATE_S, LOOK_S, TierFigures
from tmem.backends.tiers.spill import BLOCK_BYTES, SpillFile

from ..waiting import wait_until
from .demoting import MIB, OID, Bench
from .machine import bounded


def told(bench: Bench) -> TierFigures:
    return bench.demotion.tiers()["guest"]


def looked(bench: Bench) -> TierFigures:
    """What is told after the next look."""
    bench.clock.now_s += LOOK_S
    bench.rounds(1)
    return told(bench)


def number(value: int | None) -> int:
    assert value is not None
    return value


def test_how_full_it_is(bench: Bench) -> None:
    bench.rounds(1)
    empty = told(bench)
    assert (empty.tier_up, empty.tier_down, empty.tier_records, empty.tier_used_bytes) == (True, "", 0, 0)
    assert empty.tier_free_bytes == empty.tier_capacity_bytes == 32 * MIB - BLOCK_BYTES
    bench.put(0, 10**6)
    bench.rounds()
    some = looked(bench)
    pages = bench.client.statistics()["tier_pages"]
    assert some.tier_records == some.tier_written_records == pages > 100
    assert number(some.tier_used_bytes) >= number(some.tier_written_bytes) > pages * 128
    assert number(some.tier_used_bytes) + number(some.tier_free_bytes) == some.tier_capacity_bytes
    assert some.tier_age_ns < 2 * LOOK_S * 1e9
    assert (some.tier_refused_batches, some.tier_failures) == (0, 0)


def test_a_manager_that_comes_later_knows_without_anything_going_there(bench: Bench) -> None:
    bench.put(0, 10**6)
    bench.rounds()
    before = looked(bench)
    bench.demotion.close()
    bench.demotion = Demotion(bench.paths, bench.segment, Marks(), bench.clock)
    bench.rounds(1)
    assert bench.demotion.demoted_pages == 0
    assert (told(bench).tier_records, told(bench).tier_used_bytes) == (
        before.tier_records,
        before.tier_used_bytes,
    )


def test_what_is_of_no_use_any_more_goes_although_nothing_comes(bench: Bench) -> None:
    """Else a tier would look full for as long as memory is in plenty."""
    bench.put(0, 10**6)
    bench.rounds()
    before = looked(bench)
    bench.pool.flush(OID, 0, 10**6)
    after = looked(bench)
    assert (after.tier_records, after.tier_used_bytes) == (0, 0)
    assert number(before.tier_used_bytes) > 0


def test_a_tier_that_is_being_taken_away_is_not_told_as_down(bench: Bench) -> None:
    """That may take minutes, and it is not looked at any more."""
    bench.put(0, 10**6)
    bench.rounds()
    looked(bench)
    bench.client.tiered = False
    for _ in range(int(LATE_S // LOOK_S) + 2):
        assert looked(bench).tier_up


def test_a_tier_that_is_down_is_told_though_nothing_goes_there(bench: Bench) -> None:
    bench.put(0, 10)
    bench.rounds(1)
    assert told(bench).tier_up
    away = bench.file.with_name("away")
    bench.file.rename(away)
    down = looked(bench)
    assert not down.tier_up
    assert str(bench.file) in down.tier_down
    assert down.tier_failures == 1
    assert down.tier_capacity_bytes == 32 * MIB - BLOCK_BYTES
    assert bench.demotion.problems() == {}  # nothing need go there
    away.rename(bench.file)
    assert looked(bench).tier_up


def test_one_that_cannot_be_opened_is_down_and_nothing_else_is_known(bench: Bench) -> None:
    bench.file.unlink()
    bench.rounds(1)
    down = told(bench)
    assert (down.tier_up, down.tier_used_bytes, down.tier_failures) == (False, None, None)
    assert "cannot be opened" in down.tier_down


def test_a_full_one_is_up(small: _native.Segment, tmp_path: Path) -> None:
    bench = Bench(small, tmp_path, MIB)
    stored = 0
    for _ in range(20):
        stored += bench.put(stored, 10**6)
        bench.rounds(2)
    full = looked(bench)
    assert full.tier_up
    assert number(full.tier_free_bytes) < MIB / 10
    assert number(full.tier_refused_batches) > 0
    bench.demotion.close()


def test_a_write_that_fails_is_told_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.rounds(1)

    def fails(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("tmem.backends.tiers.spill._write_all", fails)
        bench.put(0, 10**6)
        bench.rounds(2)
        assert not told(bench).tier_up
        assert "Input/output error" in told(bench).tier_down
    bench.rounds(3)
    assert told(bench).tier_up


def test_nobody_waits_for_one_that_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(0, 10)
    bench.rounds(1)
    hangs, goes_on = threading.Event(), threading.Event()
    check = SpillFile.check

    def hanging(tier: SpillFile) -> None:
        hangs.set()
        goes_on.wait()
        check(tier)

    monkeypatch.setattr(SpillFile, "check", hanging)
    try:
        bench.clock.now_s += LOOK_S
        bench.rounds(1)
        assert hangs.is_set()
        assert told(bench).tier_up, "it may only be slow"
        age_ns = told(bench).tier_age_ns
        bench.clock.now_s += LATE_S
        late = told(bench)
        assert not late.tier_up
        assert "not answered for" in late.tier_down
        assert late.tier_age_ns >= age_ns + LATE_S * 1e9
        assert late.tier_capacity_bytes == 32 * MIB - BLOCK_BYTES  # as it was seen last
    finally:
        goes_on.set()

    def up() -> bool:
        bench.rounds(1)
        return told(bench).tier_up

    wait_until(up)


def test_one_that_hangs_from_the_first_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    check = SpillFile.check
    monkeypatch.setattr(SpillFile, "check", lambda tier: goes_on.wait() and check(tier))
    try:
        bench.rounds(1)
        assert bench.demotion.tiers() == {}
        bench.clock.now_s += LATE_S
        assert not told(bench).tier_up
    finally:
        goes_on.set()


class LooksMachine(RuleBasedStateMachine):
    """One client and its spill file, which comes and goes; after every look all figures are right."""

    parent: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tmem-looks-", dir=self.parent))
        self.segment = _native.create(str(self.directory / "segment"), 8 << 20)
        self.bench = Bench(self.segment, self.directory, 2 * MIB)
        self.away = self.directory / "away"
        self.next = 0

    def teardown(self) -> None:
        self.bench.demotion.close()
        self.segment.close()
        shutil.rmtree(self.directory)

    @rule(count=st.sampled_from((1, 50, 2000)))
    def put(self, count: int) -> None:
        self.next += self.bench.put(self.next, count)

    @rule(share=st.sampled_from((0.1, 0.5, 1.0)))
    def flush(self, share: float) -> None:
        self.bench.pool.flush(OID, 0, int(self.next * share))

    @rule(count=st.integers(1, 4))
    def rounds(self, count: int) -> None:
        self.bench.rounds(count)

    @rule()
    def break_or_mend(self) -> None:
        source, target = self.bench.file, self.away
        if not source.exists():
            source, target = target, source
        source.rename(target)

    @rule()
    def another_manager(self) -> None:
        self.bench.demotion.close()
        self.bench.demotion = Demotion(self.bench.paths, self.segment, Marks(), self.bench.clock)

    @rule()
    def look(self) -> None:
        self.bench.clock.now_s += LOOK_S
        self.bench.rounds(1)
        figures, there = told(self.bench), self.bench.file.exists()
        assert figures.tier_up == there == (not figures.tier_down)
        assert figures.tier_age_ns <= LOOK_S * 1e9
        if not there:
            return
        pages = self.bench.client.statistics()["tier_pages"]
        assert pages <= number(figures.tier_records)
        assert number(figures.tier_records) * 3 <= pages * 4
        assert (
            number(figures.tier_used_bytes) + number(figures.tier_free_bytes) == figures.tier_capacity_bytes
        )
        assert figures.tier_capacity_bytes == 2 * MIB - BLOCK_BYTES


def test_random_use(tmp_path: Path) -> None:
    LooksMachine.parent = tmp_path
    run_state_machine_as_test(LooksMachine, settings=bounded(15, 20))
