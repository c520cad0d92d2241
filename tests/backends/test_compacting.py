"""How much time moving pages together may take, on a made-up clock."""

from typing import TYPE_CHECKING, cast

import pytest

from tmem.backends.compacting import EARNED, MOST_NS, MUCH_EARNED, MUCH_NS, Compactor

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
SECOND_NS = 10**9


class Slow:
    """A segment with holes that takes all the time it is given, and its clock."""

    def __init__(self, holes_bytes: int) -> None:
        self.occupied = 100 * MIB, 0, holes_bytes
        self.now_ns = 0
        self.pack_losses = 0
        self.unpacked: list[int] = []
        self.spent_ns: list[int] = []

    def compact(self, holes: int, most_ns: int) -> int:
        self.spent_ns.append(most_ns)
        self.now_ns += most_ns
        return 65536

    def unpack(self, first: int, most_ns: int) -> tuple[int, int]:
        self.unpacked.append(first)
        self.now_ns += most_ns
        self.pack_losses //= 2
        return (first + 100) % 300, most_ns

    def compactor(self) -> Compactor:
        return Compactor(cast("_native.Segment", self), lambda: self.now_ns)


@pytest.mark.parametrize(
    ("holes_bytes", "earned", "most_ns"), [(20 * MIB, EARNED, MOST_NS), (60 * MIB, MUCH_EARNED, MUCH_NS)]
)
def test_no_more_than_its_share_however_often_it_is_asked(
    holes_bytes: int, earned: float, most_ns: int
) -> None:
    segment = Slow(holes_bytes)
    compactor = segment.compactor()
    while segment.now_ns < 20 * SECOND_NS:
        segment.now_ns += SECOND_NS // 100
        compactor.step()
    assert max(segment.spent_ns) <= most_ns
    assert sum(segment.spent_ns[1:]) == pytest.approx(20 * SECOND_NS * earned / (1 + earned), rel=0.1)
    assert compactor.many_holes == (holes_bytes > 50 * MIB)
    assert compactor.statistics.compacting_ns == sum(segment.spent_ns)
    assert compactor.statistics.compacted_bytes == 65536 * len(segment.spent_ns)


def test_once_half_of_the_memory_was_holes_most_of_a_cpu_until_it_is_done() -> None:
    segment = Slow(60 * MIB)
    compactor = segment.compactor()
    for holes, spent in ((60, 1), (40, 2), (20, 3), (10, 3), (20, 4)):
        segment.occupied = 100 * MIB, 0, holes * MIB
        segment.now_ns += SECOND_NS // 10
        compactor.step()
        assert len(segment.spent_ns) == spent
        assert compactor.many_holes == (spent < 4 and holes > 10)
    assert segment.spent_ns[:3] == [MUCH_NS] * 3
    assert segment.spent_ns[3] <= MOST_NS


def test_not_where_it_gains_little() -> None:
    segment = Slow(10 * MIB)
    assert segment.compactor().step() == 0
    assert segment.spent_ns == []


def test_packs_that_pages_have_left_are_looked_for_in_what_time_is_left() -> None:
    segment = Slow(20 * MIB)
    compactor = segment.compactor()
    segment.pack_losses = 1000  # a MiB
    compactor.step()
    assert segment.unpacked == []
    assert len(segment.spent_ns) == 1
    segment.pack_losses = 60 << 10
    segment.now_ns += 10 * SECOND_NS
    assert compactor.step() == 65536
    assert segment.unpacked == [], "moving pages took all of it"
    segment.occupied = 100 * MIB, 0, 10 * MIB
    for expected in ([0], [0, 100], [0, 100, 200]):
        segment.now_ns += 10 * SECOND_NS
        assert compactor.step() == 0
        assert compactor.many_holes
        assert segment.unpacked == expected
    segment.now_ns += 10 * SECOND_NS
    assert compactor.step() == 0
    assert not compactor.many_holes
    assert segment.unpacked == [0, 100, 200], "what they have left now is not worth it"
    segment.pack_losses += 13 << 10
    segment.now_ns += 10 * SECOND_NS
    compactor.step()
    assert segment.unpacked == [0, 100, 200, 0]
