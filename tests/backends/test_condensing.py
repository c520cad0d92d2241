"""Cold pages are stored smaller in the background: when, within what CPU time, and that nobody notices."""

import json
import os
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.condensing import MOST_PRESSURE, ROUND_S, Condenser, cpu_pressure

from . import operations as op
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

    def __init__(self, segment: _native.Segment) -> None:
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
