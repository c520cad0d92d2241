"""Cold pages are stored smaller in the background: when, within what CPU time, and that nobody notices."""

import json
import os
import time
from pathlib import Path
from typing import cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tmem.backends import _native
from tmem.backends.condensing import MOST_PRESSURE, ROUND_S, Condenser, cpu_pressure

from . import operations as op
from .machine import bounded
from .pages import oid
from .saving import saved

OID = oid(1)
SECOND_NS = 10**9


def page(number: int) -> bytes:
    """Text as programs keep it: zstd makes much less of it than LZ4."""
    rows = ({"id": number * 31 + i, "name": f"user{i * number % 977}", "score": i / 7} for i in range(64))
    return json.dumps(list(rows)).encode().ljust(_native.PAGE_SIZE)[: _native.PAGE_SIZE]


def fill(pool: _native.Pool, npages: int) -> None:
    for index in range(npages):
        assert pool.put(OID, index, page(index)) == 1


def intact(pool: _native.Pool, npages: int) -> bool:
    buffer = bytearray(_native.PAGE_SIZE)
    return all(pool.get(OID, index, buffer) == 1 and buffer == page(index) for index in range(npages))


def everything(segment: _native.Segment) -> None:
    """Store all pages smaller, warm or not."""
    assert op.condense(segment, warm=True, loose=True)


class Machine:
    """A clock and a pressure that the test sets."""

    def __init__(self, segment: _native.Segment, packing: bool = False) -> None:
        segment.packing = packing
        self.now_s = 0.0
        self.pressure = 0.0
        self.condenser = Condenser(segment, lambda: self.pressure, lambda: self.now_s)

    def run(self, seconds: float, step_s: float = 1.0) -> int:
        """Let time pass; the CPU time that was spent, in nanoseconds."""
        spent = 0
        for _ in range(int(seconds / step_s)):
            self.now_s += step_s
            spent += self.condenser.step()
        return spent


@pytest.fixture
def machine(small: _native.Segment) -> Machine:
    return Machine(small)


def condensed(segment: _native.Segment) -> int:
    return segment.statistics()["condensed_pages"]


def test_pages_that_nobody_wants_become_smaller(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 800)
    before = persistent.statistics()["bytes"]
    machine.run(2 * ROUND_S + 10)
    assert condensed(small) == 0, "what was put a minute ago is warm"
    machine.run(ROUND_S + 30)
    counts = small.statistics()
    assert counts["condensed_pages"] == 800
    assert counts["condensed_bytes"] == before - persistent.statistics()["bytes"] > before * 0.25
    assert counts["condensing_ns"] > 0
    assert counts["condensed_pages"] == persistent.statistics()["compressed_pages"]
    assert intact(persistent, 800)
    expand = small.timing()["expand"]
    assert expand[0] > 5


def test_what_is_used_stays_as_it_is(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 300)
    for _ in range(12):
        assert intact(persistent, 300)
        machine.run(ROUND_S / 2)
    assert condensed(small) == 0
    everything(small)
    assert condensed(small) == 300
    for _ in range(8):
        assert intact(persistent, 300)
        machine.run(ROUND_S)
    assert small.statistics()["restored_pages"] == 300


def test_cpu_time_stays_within_the_share(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 900)
    machine.run(2 * ROUND_S)
    small.condense_percent = 1
    assert machine.run(ROUND_S + 1) < 0.5 * SECOND_NS
    seconds = 0
    while condensed(small) < 900 and seconds < 600:
        machine.run(10)
        seconds += 10
    assert small.statistics()["condensing_ns"] < (0.01 * (3 * ROUND_S + seconds) + 0.1) * SECOND_NS
    assert condensed(small) == 900


def test_nothing_is_done_while_cpus_are_wanted_or_if_nobody_wants_it(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 200)
    machine.pressure = MOST_PRESSURE + 1
    assert machine.run(20 * ROUND_S, step_s=5) == 0
    machine.pressure = 0.0
    assert small.condense_percent == 5
    small.condense_percent = 0
    assert machine.run(20 * ROUND_S, step_s=5) == 0
    assert condensed(small) == 0
    with pytest.raises(ValueError, match="condense_percent"):
        small.condense_percent = 101


class Slow:
    """A segment where moving pages together takes long."""

    def __init__(self, segment: _native.Segment, cpu_ns: int) -> None:
        self._segment, self._cpu_ns = segment, cpu_ns
        self.compacted = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._segment, name)

    def compact(self, holes: int, most_ns: int) -> int:
        self.compacted += 1
        until_ns = time.thread_time_ns() + self._cpu_ns
        while time.thread_time_ns() < until_ns:
            pass
        return 65_536


def test_moving_pages_after_a_round_is_counted_and_within_the_share(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 10)
    slow = Slow(small, SECOND_NS // 5)
    machine.condenser = Condenser(cast("_native.Segment", slow), lambda: 0.0, lambda: machine.now_s)
    machine.run(ROUND_S - 1)
    assert machine.run(1) >= SECOND_NS // 5
    assert slow.compacted == 1
    assert machine.run(3) == 0  # 5 % of these are 0.15 s
    assert machine.run(2) >= SECOND_NS // 5, "after the second half of the round"
    assert slow.compacted == 2
    moved = machine.condenser.statistics
    assert moved.compacted_bytes == 2 * 65_536
    assert moved.compacting_ns >= 2 * (SECOND_NS // 5)
    assert (moved + moved).compacted_bytes == 4 * 65_536


def test_what_is_condensed_now(small: _native.Segment, persistent: _native.Pool, machine: Machine) -> None:
    """Pages that go back and forth, or are no more, are not saved; what counts up counts on."""
    assert "condensed_now_pages" not in machine.condenser.figures()
    fill(persistent, 400)
    before = persistent.statistics()["bytes"]

    def now(seconds: float) -> tuple[int, int]:
        machine.run(seconds)
        figures = machine.condenser.figures()
        assert 0 <= figures["condensed_now_age_ns"] <= (ROUND_S + 30) * SECOND_NS
        return figures["condensed_now_pages"], figures["condensed_now_bytes"]

    assert now(2 * ROUND_S + 10) == (0, 0)
    saved = before - persistent.statistics()["bytes"]
    pages, saved = now(2 * ROUND_S)
    assert (pages, saved) == (400, before - persistent.statistics()["bytes"])
    again = Condenser(small, lambda: 0.0, lambda: machine.now_s)  # of a manager that comes later
    machine.condenser = again
    assert now(2 * ROUND_S) == (400, saved)
    for _ in range(6):
        assert intact(persistent, 400)
        machine.run(ROUND_S)
    counts = small.statistics()
    assert (counts["condensed_pages"], counts["restored_pages"]) == (400, 400)
    assert counts["condensed_bytes"] == counts["restored_bytes"] == saved
    assert now(ROUND_S) == (0, 0)
    assert now(5 * ROUND_S) == (400, saved)
    assert small.statistics()["condensed_bytes"] == 2 * saved
    persistent.flush(OID, 0, 200)
    pages, left = now(2 * ROUND_S)
    assert pages == 200
    assert saved / 3 < left < saved


def test_what_is_condensed_now_saves_what_others_take_more(tmp_path: Path) -> None:
    """The same pages in a segment where none are condensed, whatever is put, flushed and got."""

    class Machine(RuleBasedStateMachine):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            Machine.count += 1
            self.segments = [
                _native.create(str(tmp_path / f"{kind}{Machine.count}"), 16 << 20)
                for kind in ("dense", "plain")
            ]
            self.pools = [one.client("guest").new_pool(persistent=True) for one in self.segments]

        def teardown(self) -> None:
            for one in self.segments:
                assert one.check() == []
                one.close()

        @rule(first=st.integers(0, 60), count=st.integers(1, 30), version=st.integers(0, 3))
        def put(self, first: int, count: int, version: int) -> None:
            for index in range(first, first + count):
                data = os.urandom(4096) if version == 3 else page(index * 4 + version)
                for pool in self.pools:
                    assert pool.put(OID, index, data) == 1

        @rule(first=st.integers(0, 90), count=st.integers(1, 30))
        def flush(self, first: int, count: int) -> None:
            for pool in self.pools:
                pool.flush(OID, first, count)

        @rule(first=st.integers(0, 90))
        def get(self, first: int) -> None:
            for pool in self.pools:
                pool.get(OID, first, bytearray(4096))

        @rule(warm=st.booleans(), level=st.integers(1, 19))
        def condense(self, warm: bool, level: int) -> None:
            self.segments[0].condense_level = level
            self.look(warm, persistent=True)

        @rule(warm=st.booleans(), level=st.integers(1, 19))
        def pack(self, warm: bool, level: int) -> None:
            self.segments[0].packing = True
            self.segments[0].condense_level = level
            self.segments[0].pack(0, 10 * SECOND_NS, warm=warm)

        @rule()
        def unpack(self) -> None:
            self.segments[0].unpack(0, 10 * SECOND_NS)

        @rule()
        def count_only(self) -> None:
            self.look(False, persistent=False)

        def look(self, warm: bool, persistent: bool) -> None:
            dense = self.segments[0]
            chunk, _ns, pages, saved, packed, packed_saved = dense.condense(
                0, 10 * SECOND_NS, persistent=persistent, warm=warm
            )
            assert chunk == 0
            mine, others = (pool.statistics() for pool in self.pools)
            packs = self.pools[0].client.statistics()["pack_bytes"]
            assert saved + packed_saved == others["bytes"] - mine["bytes"] - packs
            assert packed == mine["packed_pages"]
            assert (pages == 0) == (saved == 0)
            assert pages <= mine["compressed_pages"] + packed
            counts = dense.statistics()
            assert pages <= counts["condensed_pages"] - counts["restored_pages"]
            assert saved <= counts["condensed_bytes"] - counts["restored_bytes"]

    run_state_machine_as_test(Machine, settings=bounded(20, 30))


def test_ephemeral_pages_only_when_memory_is_short(
    small: _native.Segment, client: _native.Client, kept: _native.Pool, machine: Machine
) -> None:
    fill(kept, 300)
    assert kept.statistics()["raw_pages"] == 300
    machine.run(6 * ROUND_S)
    assert condensed(small) == small.statistics()["squeezed_pages"] == 0
    client.new_pool(persistent=True).put(OID, 0, os.urandom(900 * 4096))
    machine.run(6 * ROUND_S)
    assert kept.statistics()["raw_pages"] == 0
    assert condensed(small) + small.statistics()["squeezed_pages"] >= 300
    assert intact(kept, 300)


def test_a_client_that_wants_no_compression_has_none(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool
) -> None:
    client.compress = "none"
    fill(persistent, 60)
    everything(small)
    assert (condensed(small), persistent.statistics()["raw_pages"]) == (0, 60)
    client.compress = "lz4"
    everything(small)
    assert (condensed(small), persistent.statistics()["raw_pages"]) == (60, 0)
    assert intact(persistent, 60)


def test_a_save_file_has_pages_as_ever(small: _native.Segment, persistent: _native.Pool) -> None:
    """Whoever restores it need not know of condensed pages."""
    fill(persistent, 60)
    before = saved(small, "guest")
    everything(small)
    assert condensed(small) == 60
    after = saved(small, "guest")
    assert intact(persistent, 60)
    assert len(before) == len(after)


def test_pressure_is_read_from_the_kernel(tmp_path: Path) -> None:
    assert cpu_pressure(tmp_path) == 0.0
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "cpu").write_text(
        "some avg10=12.50 avg60=1.00 avg300=0.00 total=5\nfull avg10=0.00\n"
    )
    assert cpu_pressure(tmp_path) == 12.5
