"""The rules by which a segment follows the memory that is to spare, the core's and Python's together, played
against made-up machines."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tmem.backends import _native
from tmem.backends.sizing import HOLD_S, Sample, Sizer

MIB, GIB = 1 << 20, 1 << 30


def sample(**changes: float) -> Sample:
    usual = {"now_s": 0.0, "used_bytes": GIB, "limit_bytes": GIB, "spare_bytes": 0, "stalled": 0.0}
    values = usual | {"margin_bytes": GIB} | changes
    return Sample(**values)  # type: ignore[arg-type]


def margin_of(total: int) -> int:
    return max(total // 16, min(128 * MIB, total // 8))


@dataclass
class Machine:
    """A machine with a segment that takes all it may, and others that take what they want and there is."""

    headroom: "_native.Headroom"
    total: int
    least: int
    most: int
    others: int = 0
    limit: int = 0
    now_s: float = 1.0
    limits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizer = Sizer(self.least, self.most)
        self.limit = self.least
        self.next_s = self.now_s
        self.hard = False

    def available(self) -> int:
        return max(self.total - self.others - self.limit, 0)

    def step(self, stalled: float = 0.0) -> float:
        """Look once, as the core does, and once a second as Python does; the seconds until the next look."""
        margin = margin_of(self.total)
        spare = self.available() - margin
        before = self.limit
        self.limit, persistent, self.hard, next_s = self.headroom.decide(
            self.now_s, self.limit, self.limit, spare, margin, self.least, self.most
        )
        assert self.least <= self.limit <= max(before, self.least)
        assert self.limit <= persistent <= self.most
        assert 0.002 <= next_s <= 1
        if self.now_s >= self.next_s or stalled:
            spare = self.available() - margin
            self.limit = self.sizer.decide(
                Sample(self.now_s, self.limit, self.limit, spare, margin, stalled, self.headroom.lowered_s)
            )
            self.next_s = self.now_s + 1
        assert self.least <= self.limit <= self.most
        self.limits.append(self.limit)
        self.now_s += next_s
        return next_s

    def run(self, seconds: float) -> None:
        until = self.now_s + seconds
        while self.now_s < until:
            self.step()


class World:
    """Makes machines. Only the rule is used of what the core is given."""

    def __init__(self, segment: "_native.Segment", meminfo: Path) -> None:
        self._segment, self._meminfo = segment, meminfo

    def machine(
        self, total: int = 24 * GIB, least: int = GIB, most: int = 16 * GIB, others: int = 0
    ) -> Machine:
        return Machine(_native.Headroom(self._segment, str(self._meminfo), []), total, least, most, others)


@pytest.fixture
def world(segment: "_native.Segment", tmp_path: Path) -> World:
    (tmp_path / "meminfo").write_text("")
    return World(segment, tmp_path / "meminfo")


@pytest.fixture
def machine(world: World) -> Machine:
    return world.machine(others=4 * GIB)


def turns(limits: list[int]) -> int:
    """How often a limit that went one way went the other."""
    moves = [b > a for a, b in itertools.pairwise(limits) if a != b]
    return sum(a != b for a, b in itertools.pairwise(moves))


def test_grows_slowly_to_the_most(machine: Machine) -> None:
    machine.run(4)
    assert machine.limit < 6 * GIB
    machine.run(40)
    assert machine.limit == 16 * GIB
    assert turns(machine.limits) == 0


def test_leaves_the_margin(machine: Machine) -> None:
    machine.others = 12 * GIB
    machine.run(60)
    margin = margin_of(24 * GIB)
    assert machine.available() == pytest.approx(margin, rel=0.26)


def test_shrinks_at_once_and_waits_before_it_grows(machine: Machine) -> None:
    machine.run(30)
    machine.others = 8 * GIB
    machine.step()
    assert margin_of(24 * GIB) <= machine.available() <= 3 * margin_of(24 * GIB)
    assert machine.hard
    machine.others = 4 * GIB
    shrunk = machine.limit
    machine.run(HOLD_S * 0.9)
    assert machine.limit == shrunk
    machine.run(30)
    assert machine.limit == 16 * GIB


def test_not_below_the_least(machine: Machine) -> None:
    machine.others = 23 * GIB
    machine.run(5)
    assert machine.limit == machine.least


def test_looks_more_often_when_it_is_tight(world: World, machine: Machine) -> None:
    assert machine.step() == 1
    machine.run(60)
    machine.others = 8 * GIB
    machine.run(1)
    assert 0.05 < machine.step() < 0.8
    small = world.machine(512 * MIB, 16 * MIB, 300 * MIB)
    small.run(60)
    small.others = 140 * MIB
    small.step()
    assert small.step() < 0.04


def test_ahead_of_a_program_that_takes_memory(world: World) -> None:
    """1.5 GB/s in a group of 2 GiB, and giving back no faster than that: half of the margin is never used."""
    group = world.machine(2 * GIB, 64 * MIB, 1920 * MIB)
    group.run(60)
    full, taken = group.limit, 0.0
    while taken < 1700 * MIB:
        before = group.now_s
        group.step()
        # What is given back takes as long as taking it: it is there at the next look.
        passed = group.now_s - before
        taken += passed * 1.5e9
        group.others = int(taken)
        if taken < 1500 * MIB:
            assert group.available() > margin_of(2 * GIB) / 2
    assert group.limit < full - 1500 * MIB


def test_waiting_counts_while_memory_is_short() -> None:
    for spare, shrinks in ((0, True), (2 * GIB, True), (4 * GIB, False)):
        sizer = Sizer(256 * MIB, 8 * GIB)
        first = sizer.decide(sample(spare_bytes=spare, used_bytes=2 * GIB, limit_bytes=2 * GIB))
        again = sizer.decide(
            sample(now_s=0.5, spare_bytes=spare, used_bytes=2 * GIB, limit_bytes=2 * GIB, stalled=0.5)
        )
        assert (again < first) == shrinks
        if shrinks:
            assert again == 2 * GIB - 2 * GIB // 4
            assert sizer.decide(sample(now_s=5, spare_bytes=8 * GIB, limit_bytes=GIB)) == GIB


def test_persistent_pages_may_have_most_of_the_margin(world: World) -> None:
    def persistent(spare: int, local: bool = False) -> int:
        headroom = world.machine().headroom
        headroom.give_back(0, local)
        return headroom.decide(1.0, GIB, GIB, spare, GIB, GIB, 8 * GIB)[1]

    assert persistent(GIB) == GIB + GIB + 3 * GIB // 4
    assert persistent(-GIB) == GIB
    assert persistent(-GIB, local=True) == 8 * GIB


steps = st.lists(
    st.tuples(st.integers(0, 24 * GIB), st.sampled_from((0.0, 0.0, 0.05, 0.5, 1.0)), st.integers(1, 40)),
    max_size=20,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(steps=[(0, 0.0, 9), (21_718_868_714, 0.0, 1)])  # taken at once, as the least is to grow
@given(steps=steps)
def test_whatever_others_do(world: World, steps: list[tuple[int, float, int]]) -> None:
    """Within its range always (`Machine.step`); what others need is given at once; and the limit turns round
    twice when they change, no more."""
    machine = world.machine()
    margin = margin_of(machine.total)
    changes = 0
    for others, stalled, looks in steps:
        changes += 2 + 2 * (stalled > 0)  # what it was ahead, or was taken for pressure, comes back
        machine.others = min(others, machine.total - machine.limit)
        for _ in range(looks):
            before = machine.limit
            machine.step(stalled)
            assert machine.available() >= margin * 3 // 4 or machine.limit == machine.least
            assert machine.limit - before <= (machine.most - machine.least) / 16
            assert machine.hard <= (machine.limit <= before)
        assert turns(machine.limits) <= changes


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(noise=st.lists(st.floats(-1, 1), min_size=50, max_size=200))
def test_no_oscillation_by_noise(world: World, noise: list[float]) -> None:
    """Others that come and go by less than the dead band move nothing."""
    machine = world.machine(most=20 * GIB, others=8 * GIB)
    machine.run(60)
    settled, band = machine.limit, margin_of(machine.total) // 4
    machine.limits.clear()
    for part in noise:
        machine.others = 8 * GIB + int(part * band * 0.99)
        machine.step()
    assert turns(machine.limits) == 0
    assert abs(machine.limit - settled) <= 2 * band
