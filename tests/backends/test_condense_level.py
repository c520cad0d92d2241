"""The level of zstd: pages of any level are read back, and neither time nor memory is beyond its bound."""

import pytest

from tmem.backends import _native
from tmem.backends.condensing import ROUND_S

from . import operations as op
from .test_condensing import Machine, condensed, fill, intact
from .test_packing import OID, pack_all, packed
from .test_packing import fill as fill_alike
from .test_packing import page as page_alike

LEVELS = range(1, 20)
MIB = 1 << 20


def condense(segment: _native.Segment, level: int) -> None:
    assert op.condense(segment, warm=True, loose=True, level=level)


def test_the_usual_one(small: _native.Segment) -> None:
    assert small.condense_level == 3
    for level in (0, 20):
        with pytest.raises(ValueError, match="condense_level"):
            small.condense_level = level
    assert small.condense_level == 3


@pytest.mark.parametrize("level", LEVELS)
def test_pages_of_every_level_are_read_back(
    small: _native.Segment, persistent: _native.Pool, kept: _native.Pool, level: int
) -> None:
    """Alone, ephemeral, in packs, and beside pages of other levels."""
    fill_alike(persistent, 24)
    fill(kept, 8)
    condense(small, level)
    assert condensed(small) == 32
    assert intact(kept, 8)
    for index in range(0, 24, 5):
        assert persistent.put(OID, index, page_alike(1000 + index)) == 1
    condense(small, 20 - level)
    small.condense_level = level
    assert op.pack(small, warm=True)
    assert packed(small) > 18
    small.condense_level = 20 - level
    for index in range(24):
        version = 1000 + index if index % 5 == 0 else index
        assert op.page_at(persistent, index) == page_alike(version)
    persistent.flush(OID, 0, 13)
    assert op.unpack(small)
    assert all(op.page_at(persistent, index) == page_alike(index) for index in (13, 14, 16, 23))
    assert small.check() == []


def test_a_higher_one_makes_pages_smaller(small: _native.Segment, persistent: _native.Pool) -> None:
    """What is made at another one stays as it is, until it is put again."""
    taken = []
    for level in (1, 19, 3):
        fill(persistent, 100)
        condense(small, level)
        taken.append(persistent.statistics()["bytes"])
    condense(small, 19)
    taken.append(persistent.statistics()["bytes"])
    assert taken[1] < taken[2] < taken[0] * 1.02
    assert taken[3] == taken[2]


def test_time_is_over_after_any_page(small: _native.Segment, persistent: _native.Pool) -> None:
    """At level 19 the pages of one chunk take a tenth of a second."""
    fill(persistent, 400)
    small.condense_level = 19
    sums, place, steps = [0, 0], 0, 0
    while True:
        before = condensed(small)
        place, _ns, pages, saved, *_ = small.condense(place, 1, persistent=True, warm=True)
        sums[0] += pages
        sums[1] += saved
        steps += 1
        assert condensed(small) - before <= 4
        if not place:
            break
    assert steps > 100
    counts = small.statistics()
    assert counts["condensed_pages"] == 400
    after, _ns, pages, saved, *_ = small.condense(0, 10**9)
    assert (after, pages, saved) == (0, 400, counts["condensed_bytes"])
    assert sums[0] <= 400
    assert sums[1] <= counts["condensed_bytes"]
    assert intact(persistent, 400)


def test_time_is_over_after_any_pack(small: _native.Segment, persistent: _native.Pool) -> None:
    fill_alike(persistent, 400)
    condense(small, 19)
    small.packing = True
    place, steps = 0, 0
    while True:
        before = packed(small)
        place, _ns = small.pack(place, 1, warm=True)
        steps += 1
        assert packed(small) - before <= 4
        if not place:
            break
    assert steps >= 100
    assert packed(small) > 360
    assert all(op.page_at(persistent, index) == page_alike(index) for index in range(400))


def test_what_is_visited_in_parts_becomes_cold_as_late_as_ever(
    small: _native.Segment, persistent: _native.Pool
) -> None:
    """A chunk whose visit goes on later has been visited once, not twice."""

    def visit() -> None:
        place, *_ = small.condense(0, 1, persistent=True)
        while place:
            place, *_ = small.condense(place, 1, persistent=True)

    fill(persistent, 200)
    visit()
    visit()
    assert condensed(small) == 0
    for index in range(0, 200, 2):
        assert op.page_at(persistent, index)
    visit()
    some = condensed(small)
    assert some > 0, "those that nobody asked for"
    visit()
    assert condensed(small) == some
    visit()
    assert condensed(small) == 200


def test_the_share_of_a_cpu_holds_at_the_highest(small: _native.Segment, persistent: _native.Pool) -> None:
    fill(persistent, 900)
    machine = Machine(small)
    small.condense_level = 19
    machine.run(2 * ROUND_S + 10)
    spent = [machine.run(1) for _ in range(40)]
    assert condensed(small) > 0
    # A step has what two seconds have earned at most, and then ends with the page that it is at; the first
    # bound has room for a machine whose clock goes on while a neighbour has its memory.
    assert max(spent) < (2 * 0.05 + 0.05) * 1e9
    assert sum(spent) < (42 * 0.05 + 0.05) * 1e9


def test_memory_for_it_is_counted_and_bounded(small: _native.Segment, persistent: _native.Pool) -> None:
    machine = Machine(small)
    assert small.condenser_bytes == machine.condenser.figures()["condenser_bytes"] == 0
    fill_alike(persistent, 40)
    small.condense_level = 19
    pack_all(small)
    assert packed(small) > 30
    highest = small.condenser_bytes
    assert 0 < highest < MIB
    assert machine.condenser.figures()["condenser_bytes"] == highest
    for _ in range(10):
        for index in range(40):
            persistent.put(OID, index, page_alike(index))
        condense(small, 1)
    assert 0 < small.condenser_bytes <= highest
