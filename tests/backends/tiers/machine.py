"""The state machine that every tier must pass: random batches, forgetting, reopening and faults.

The model is what slots do: a dictionary from location to record, changed only by what was acknowledged.
A test module subclasses `TierMachine`, gives it a `new_world`, and runs its ``TestCase``.
"""

import contextlib
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tmem.backends.tiers.contract import MAX_BEGUN, MAX_LOCATION, Writing
from tmem.errors import TierDownError, TierFullError

from .contract import IDENTITY, OTHERS, World, record
from .faulty import Faults, FaultyTier

few = st.integers(1, 3)


class TierMachine(RuleBasedStateMachine):
    """Random use of the tiers of two identities by a writer each, with faults between tier and caller."""

    batch_records: ClassVar[int] = 40

    def new_world(self) -> World:
        """Return an empty world."""
        raise NotImplementedError

    def end_world(self) -> None:
        """Take away what `new_world` made."""

    def __init__(self) -> None:
        super().__init__()
        self.world = self.new_world()
        self.faults = Faults()
        self.identities = (IDENTITY, OTHERS[0])
        self.named: list[dict[int, bytes]] = [{}, {}]
        self.tiers = [FaultyTier(self.world.open(who, writer=True), self.faults) for who in self.identities]
        self.seed = 0
        self.begun: list[list[tuple[Writing, list[bytes]]]] = [[], []]

    @initialize()
    def begin(self) -> None:
        for tier in self.tiers:
            tier.retain([])

    def teardown(self) -> None:
        for who in (0, 1):
            self.drop_all(who)
        for tier in self.tiers:
            tier.close()
        self.end_world()

    @rule(who=st.integers(0, 1), count=st.integers(0, 1000), length=st.sampled_from((None, 17, 1850, 4112)))
    def write(self, who: int, count: int, length: int | None) -> None:
        count %= self.batch_records
        batch = [record(self.seed + i, length) for i in range(count)]
        self.seed += count
        injected = self.faults.full
        try:
            locations = self.tiers[who].write(batch)
        except TierDownError:
            return
        except TierFullError:
            if self.world.capacity_records and not injected:
                held = self.tiers[who].statistics().records
                assert held + count > self.world.capacity_records or held > self.world.capacity_records // 4
            return
        self.name(who, locations, batch)

    def name(self, who: int, locations: list[int], batch: list[bytes]) -> None:
        assert len(set(locations)) == len(batch)
        assert all(1 <= location <= MAX_LOCATION for location in locations)
        assert not self.named[who].keys() & set(locations), "a record that is kept was overwritten"
        self.named[who].update(zip(locations, batch, strict=True))

    @precondition(lambda self: any(len(begun) < MAX_BEGUN for begun in self.begun))
    @rule(count=st.integers(0, 1000))
    def begin_one(self, count: int) -> None:
        """A batch that is on its way while anything else happens but a retain."""
        who = min((0, 1), key=lambda one: len(self.begun[one]))
        batch = [record(self.seed + i) for i in range(count % self.batch_records)]
        self.seed += len(batch)
        with contextlib.suppress(TierDownError, TierFullError):
            self.begun[who].append((self.tiers[who].begin(batch), batch))

    @precondition(lambda self: any(self.begun))
    @rule(which=st.integers(0, 3), dropped=st.sampled_from((False, False, True)))
    def end_one(self, which: int, dropped: bool) -> None:
        who = which % 2 if self.begun[which % 2] else 1 - which % 2
        writing, batch = self.begun[who].pop(which // 2 % len(self.begun[who]))
        if dropped:
            writing.drop()
            return
        with contextlib.suppress(TierDownError, TierFullError):
            self.name(who, writing.end(), batch)

    def drop_all(self, who: int) -> None:
        while self.begun[who]:
            self.begun[who].pop()[0].drop()

    @rule(who=st.integers(0, 1), every=st.integers(1, 5), offset=st.integers(0, 4))
    def change_pages(self, who: int, every: int, offset: int) -> None:
        """Slots forget some of their locations, as if pages were put anew; the tier is not told."""
        for location in sorted(self.named[who])[offset::every]:
            del self.named[who][location]

    @rule(who=st.integers(0, 1))
    def retain(self, who: int) -> None:
        self.drop_all(who)
        try:
            self.tiers[who].retain(sorted(self.named[who]))
        except TierDownError:
            return
        assert self.tiers[who].statistics().records == len(self.named[who])

    @rule(who=st.integers(0, 1), start=st.integers(0, 1000), count=st.integers(1, 30))
    def read(self, who: int, start: int, count: int) -> None:
        every = sorted(self.named[who])
        wanted = [every[(start + i) % len(every)] for i in range(min(count, len(every)))]
        broken = self.faults.missing or self.faults.cut or self.faults.flipped or self.faults.swapped
        try:
            found = self.tiers[who].read(wanted)
        except TierDownError:
            return
        assert len(found) == len(wanted)
        for location, got in zip(wanted, found, strict=True):
            want = self.named[who][location]
            assert broken or (got is not None and got[: len(want)] == want)

    @rule(who=st.integers(0, 1))
    def open_again(self, who: int) -> None:
        self.drop_all(who)
        self.tiers[who].close()
        self.tiers[who] = FaultyTier(self.world.open(self.identities[who], writer=True), self.faults)
        before, self.faults.down = self.faults.down, 0
        self.tiers[who].retain(sorted(self.named[who]))
        self.faults.down = before

    @rule(who=st.integers(0, 1))
    def destroy(self, who: int) -> None:
        self.drop_all(who)
        self.tiers[who].destroy()
        self.named[who].clear()
        self.tiers[who] = FaultyTier(self.world.open(self.identities[who], writer=True), self.faults)
        before, self.faults.down = self.faults.down, 0
        self.tiers[who].retain([])
        self.faults.down = before

    @rule(down=few, kind=st.sampled_from(("down", "full", "lost_acknowledgements")))
    def break_writes(self, down: int, kind: str) -> None:
        setattr(self.faults, kind, down)

    @rule(count=few, kind=st.sampled_from(("missing", "cut", "flipped", "swapped")))
    def break_reads(self, count: int, kind: str) -> None:
        setattr(self.faults, kind, count)

    @precondition(lambda self: self.faults != Faults())
    @rule()
    def heal(self) -> None:
        self.faults = Faults()
        for tier in self.tiers:
            tier.faults = self.faults

    @invariant()
    def all_named_records_are_there(self) -> None:
        """Seen past the faults, by somebody who only reads."""
        for who, named in zip(self.identities, self.named, strict=True):
            if not named:
                continue
            reader = self.world.open(who, writer=False)
            for (location, want), got in zip(named.items(), reader.read(list(named)), strict=True):
                assert got is not None, f"location {location} is lost"
                assert got[: len(want)] == want, f"location {location} holds something else"
            reader.close()
