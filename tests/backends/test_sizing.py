"""The rule by which a segment follows the memory that is to spare, played against made-up machines."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmem.backends.pressure import Room
from tmem.backends.sizing import HOLD_S, Decision, Sample, Sizer, margin_of, spare_of

MIB, GIB = 1 << 20, 1 << 30


def sample(**changes: float) -> Sample:
    usual = {"now_s": 0.0, "used_bytes": GIB, "limit_bytes": GIB, "spare_bytes": 0, "stalled": 0.0}
    values = usual | {"margin_bytes": GIB} | changes
    return Sample(**values)  # type: ignore[arg-type]


@dataclass
class Machine:
    """A machine with a segment that takes all it may, and others that take what they want and there is."""

    total: int
    least: int
    most: int
    others: int = 0
    limit: int = 0
    now_s: float = 0.0
    limits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizer = Sizer(self.least, self.most)
        self.limit = self.least

    def available(self) -> int:
        return max(self.total - self.others - self.limit, 0)

    def step(self, stalled: float = 0.0) -> Decision:
        spare, margin = spare_of([Room(self.total, self.available())])
        decision = self.sizer.decide(Sample(self.now_s, self.limit, self.limit, spare, margin, stalled))
        assert self.least <= decision.limit_bytes <= decision.persistent_bytes <= self.most
        self.limit = decision.limit_bytes
        self.limits.append(self.limit)
        self.now_s += decision.next_look_s
        return decision

    def run(self, seconds: float) -> None:
        until = self.now_s + seconds
        while self.now_s < until:
            self.step()


def turns(limits: list[int]) -> int:
    """How often a limit that went one way went the other."""
    moves = [b > a for a, b in itertools.pairwise(limits) if a != b]
    return sum(a != b for a, b in itertools.pairwise(moves))


@pytest.fixture
def machine() -> Machine:
    return Machine(24 * GIB, 1 * GIB, 16 * GIB, others=4 * GIB)


def test_grows_slowly_to_the_most(machine: Machine) -> None:
    machine.run(4)
    assert machine.limit < 6 * GIB
    machine.run(20)
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
    decision = machine.step()
    assert margin_of(24 * GIB) <= machine.available() <= 3 * margin_of(24 * GIB)
    assert decision.hard
    assert decision.next_look_s < 0.3
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
    assert machine.step().next_look_s == 1


def test_looks_often_for_as_long_as_something_comes_back() -> None:
    """Giving back may stop on the way (somebody is stopped in an operation): then it is asked for again."""
    sizer, at_s = Sizer(256 * MIB, 8 * GIB), 0.0
    for used in range(2 * GIB, 300 * MIB, -100 * MIB):
        short = sample(now_s=at_s, used_bytes=used, limit_bytes=256 * MIB, spare_bytes=-3 * GIB)
        assert sizer.decide(short).next_look_s <= 0.02
        at_s += 0.01
    for _ in range(10):
        looks_s = sizer.decide(short).next_look_s
    assert looks_s == 1  # nothing more comes


def test_looks_more_often_when_it_is_tight(machine: Machine) -> None:
    assert machine.step().next_look_s == 1
    machine.run(60)
    machine.others = 8 * GIB
    machine.run(1)
    assert 0.05 < machine.step().next_look_s < 0.4
    small = Machine(512 * MIB, 16 * MIB, 300 * MIB)
    small.run(60)
    small.others = 140 * MIB
    small.step()
    assert small.step().next_look_s < 0.03


def test_waiting_counts_while_memory_is_short() -> None:
    for spare, shrinks in ((0, True), (2 * GIB, True), (4 * GIB, False)):
        sizer = Sizer(256 * MIB, 8 * GIB)
        first = sizer.decide(sample(spare_bytes=spare, used_bytes=2 * GIB, limit_bytes=2 * GIB))
        again = sizer.decide(
            sample(now_s=0.5, spare_bytes=spare, used_bytes=2 * GIB, limit_bytes=2 * GIB, stalled=0.5)
        )
        assert (again.limit_bytes < first.limit_bytes) == shrinks
        if shrinks:
            assert again.limit_bytes == 2 * GIB - 2 * GIB // 4
            calm = sizer.decide(sample(now_s=5, spare_bytes=8 * GIB, limit_bytes=GIB))
            assert calm.limit_bytes == GIB


def test_persistent_pages_may_have_most_of_the_margin() -> None:
    sizer = Sizer(GIB, 8 * GIB)
    decision = sizer.decide(sample(spare_bytes=GIB))
    assert decision.persistent_bytes == GIB + GIB + 3 * GIB // 4
    assert sizer.decide(sample(spare_bytes=-GIB)).persistent_bytes == GIB
    assert sizer.decide(sample(spare_bytes=-GIB), local=True).persistent_bytes == 8 * GIB


def test_the_tightest_room_counts() -> None:
    assert spare_of([Room(16 * GIB, 8 * GIB), Room(4 * GIB, GIB)]) == (3 * GIB // 4, GIB // 4)
    assert spare_of([Room(16 * GIB, GIB // 2), Room(4 * GIB, 2 * GIB)]) == (-GIB // 2, GIB)
    assert margin_of(512 * MIB) == 64 * MIB
    assert margin_of(64 * MIB) == 8 * MIB


steps = st.lists(
    st.tuples(st.integers(0, 24 * GIB), st.sampled_from((0.0, 0.0, 0.05, 0.5, 1.0)), st.integers(1, 40)),
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps)
def test_whatever_others_do(steps: list[tuple[int, float, int]]) -> None:
    """Within its range always (`Machine.step`); what others need is given at once; and the limit turns round
    twice when they change, no more."""
    machine = Machine(24 * GIB, 1 * GIB, 16 * GIB)
    margin = margin_of(machine.total)
    changes = 0
    for others, stalled, looks in steps:
        changes += 2 + 2 * (stalled > 0)  # what it was ahead, or was taken for pressure, comes back
        machine.others = min(others, machine.total - machine.limit)
        for _ in range(looks):
            before, at_s = machine.limit, machine.now_s
            decision = machine.step(stalled)
            assert machine.available() >= margin * 3 // 4 or machine.limit == machine.least
            assert machine.limit - before <= (machine.most - machine.least) / 16
            assert 0.009 < machine.now_s - at_s < 1.001
            assert decision.hard <= (machine.limit <= before)
        assert turns(machine.limits) <= changes


@settings(max_examples=50, deadline=None)
@given(noise=st.lists(st.floats(-1, 1), min_size=50, max_size=200))
def test_no_oscillation_by_noise(noise: list[float]) -> None:
    """Others that come and go by less than the dead band move nothing."""
    machine = Machine(24 * GIB, 1 * GIB, 20 * GIB, others=8 * GIB)
    machine.run(60)
    settled, band = machine.limit, margin_of(machine.total) // 4
    machine.limits.clear()
    for part in noise:
        machine.others = 8 * GIB + int(part * band * 0.99)
        machine.step()
    assert turns(machine.limits) == 0
    assert abs(machine.limit - settled) <= band
