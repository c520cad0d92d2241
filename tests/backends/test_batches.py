"""Batches under way to a tier, and whatever may happen to their pages meanwhile: the pages' own program sees
none of it. The model knows versions of pages and nothing else."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tmem.backends import _native
from tmem.backends.batches import Batches
from tmem.backends.tiers.contract import MAX_BEGUN, Tier
from tmem.errors import TierDownError, TierError, TierFullError
from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import EFFORT
from .machine import bounded
from .overlapping import OverlappingTier, Servers
from .pages import stamp_of, stamped

OID = bytes(OID_SIZE)
NPAGES = 24
GRACE_MS = 1000

indexes = st.integers(0, NPAGES - 1)
counts = st.sampled_from((1, 3, 8, NPAGES))
seldom = st.sampled_from((False, False, False, True))


class BatchesMachine(RuleBasedStateMachine):
    """One client, its pages, its tier, and the manager that demotes them."""

    parent: ClassVar[Path]
    make: ClassVar[Callable[..., Batches]] = Batches

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tmem-batches-", dir=self.parent))
        self.segment = _native.create(str(self.directory / "segment"), 8 << 20)
        self.client = self.segment.client("guest")
        self.pool = self.client.new_pool(persistent=True)
        self.versions: dict[int, int] = {}
        self.version = 0
        self.demoted = 0
        self.before: list[tuple[Batches, OverlappingTier]] = []
        self.give_tier()
        self.put(0, NPAGES)

    def teardown(self) -> None:
        try:
            self.look(0, NPAGES)
            assert self.segment.check() == []
        finally:
            self.end()

    def end(self) -> None:
        self.segment.close()
        shutil.rmtree(self.directory)

    def give_tier(self) -> None:
        """The client gets a tier of which nobody has heard before, with a writer and readers."""
        self.servers = Servers()
        self.client.tiered = True
        self.client.attach_tier(OverlappingTier(self.servers).read)
        self.new_manager()

    def new_manager(self) -> None:
        self.tier = OverlappingTier(self.servers)
        self.batches = type(self).make(self.client, self.client.tier_epoch, 16 << 10, MAX_BEGUN)
        self.hand = 0
        assert self.batches.tidy(self.tier, GRACE_MS)

    @contextmanager
    def complaining(self) -> Iterator[None]:
        """What a tier may say of its own accord, if it was told to, changes nothing."""
        told = len(self.servers.fail) + len(self.servers.refuse)
        try:
            yield
        except TierError:
            assert len(self.servers.fail) + len(self.servers.refuse) == told - 1

    # What the program does.

    @rule(first=indexes, count=counts)
    def put(self, first: int, count: int) -> None:
        for index in range(first, min(first + count, NPAGES)):
            self.version += 1
            self.versions[index] = self.version
            assert self.pool.put(OID, index, stamped(self.version << 8 | index))

    @rule(first=indexes, count=counts)
    def flush(self, first: int, count: int) -> None:
        for index in range(first, min(first + count, NPAGES)):
            assert self.pool.flush(OID, index, 1) == (index in self.versions)
            self.versions.pop(index, None)

    @rule(now=seldom, count=counts)
    def flush_all(self, now: bool, count: int) -> None:
        """The leaf goes, and the next one has generations that begin anew."""
        if not now:
            return
        self.pool.flush_object(OID)
        self.versions.clear()
        self.put(0, count)

    # What the manager does.

    @rule(most=counts, cold=seldom, twice=st.booleans(), arrives=st.booleans())
    def start(self, most: int, cold: bool, twice: bool, arrives: bool) -> None:
        with self.complaining():
            for _ in range(1 + twice):
                before = self.batches.demoted_pages
                self.hand, _ = self.batches.start(self.tier, self.hand, most, not cold)
                self.demoted += self.batches.demoted_pages - before
        if arrives and self.tier.begun:
            self.tier.begun[-1].arrive()

    @precondition(lambda self: self.batches.under_way_bytes)
    @rule()
    def land(self) -> None:
        before = self.batches.demoted_pages
        with self.complaining():
            self.batches.land()
        self.demoted += self.batches.demoted_pages - before

    @rule()
    def tidy(self) -> None:
        with self.complaining():
            before = self.batches.demoted_pages
            assert self.batches.tidy(self.tier, GRACE_MS)
            self.demoted += self.batches.demoted_pages - before

    @precondition(lambda self: self.batches.under_way_bytes)
    @rule()
    def drop(self) -> None:
        self.batches.drop()
        assert not self.batches.under_way_bytes

    @rule(most=st.integers(1, 30))
    def prefetch(self, most: int) -> None:
        self.client.prefetch(0, most, False, 1)

    # What happens to them.

    @precondition(lambda self: not self.servers.fail and not self.servers.refuse)
    @rule(whole=st.booleans(), full=st.booleans())
    def fail(self, whole: bool, full: bool) -> None:
        error = TierFullError("full") if full else TierDownError("no answer")
        (self.servers.fail if whole else self.servers.refuse).append(error)

    @precondition(lambda self: self.servers.late or self.tier.begun)
    @rule(which=st.integers(0, 3), other=st.booleans())
    def arrive(self, which: int, other: bool) -> None:
        """Servers do what they were sent, when they like."""
        some = self.servers.late if other and self.servers.late else self.tier.begun or self.servers.late
        some[which % len(some)].arrive()

    def all_arrive(self) -> None:
        for writing in (*self.tier.begun, *self.servers.late):
            writing.arrive()

    @rule(now=seldom)
    def manager_dies(self, now: bool) -> None:
        """And another one comes; what the dead one has sent may still arrive."""
        if not now:
            return
        self.servers.late += self.tier.begun
        self.servers.refuse.clear()
        self.new_manager()

    @precondition(lambda self: len(self.before) < 3)
    @rule(now=seldom)
    def withdraw(self, now: bool) -> None:
        """The tier is taken away, with what is under way; the manager learns of it later."""
        if not now:
            return
        self.client.tiered = False
        hand = 0
        while self.client.live(GRACE_MS):
            hand, _ = self.client.promote(hand, 512)
        self.before.append((self.batches, self.tier))
        self.servers.records.clear()
        self.give_tier()

    @precondition(lambda self: self.before)
    @rule(which=st.integers(0, 2), dropped=st.booleans())
    def land_what_was_withdrawn(self, which: int, dropped: bool) -> None:
        batches, tier = self.before.pop(which % len(self.before))
        before = batches.demoted_pages
        tier.servers.fail.clear()
        if dropped:
            batches.drop()
        batches.land_all()
        assert batches.demoted_pages == before, "a page went to a tier that had been withdrawn"

    @precondition(lambda self: self.client.phase == "none")
    @rule(now=seldom)
    def save_begins(self, now: bool) -> None:
        if now:
            self.client.handoff("copy")

    @precondition(lambda self: self.client.phase == "copying")
    @rule()
    def save_ends(self) -> None:
        self.client.handoff("end")

    @rule(first=indexes, count=counts)
    def look(self, first: int, count: int) -> None:
        """Not after every step: what was looked at is not cold."""
        buffer = bytearray(PAGE_SIZE)
        for index in range(first, min(first + count, NPAGES)):
            found = self.pool.get(OID, index, buffer)
            assert found == (index in self.versions), f"page {index}"
            if found:
                assert stamp_of(bytes(buffer)) == self.versions[index] << 8 | index


def run(machine: type[BatchesMachine], directory: Path, examples: int, steps: int = 40) -> None:
    machine.parent = directory
    found = settings(bounded(examples, steps), database=None, phases=[Phase.generate])
    run_state_machine_as_test(machine, settings=found)


def test_whatever_happens_to_pages_under_way(directory: Path) -> None:
    demoted = 0

    class Counting(BatchesMachine):
        def teardown(self) -> None:
            nonlocal demoted
            demoted += self.demoted
            super().teardown()

    run(Counting, directory, 60 * EFFORT)
    assert demoted


ACTIONS: dict[str, Callable[[BatchesMachine], object]] = {
    "start": lambda one: one.start(most=2, cold=False, twice=False, arrives=False),
    "land": lambda one: one.batches.under_way_bytes and one.land(),
    "tidy": lambda one: one.tidy(),
    "put": lambda one: one.put(first=1, count=1),
    "flush": lambda one: one.flush(first=1, count=1),
    "put all anew": lambda one: one.flush_all(now=True, count=FEW),
    "prefetch": lambda one: one.prefetch(most=30),
    "arrive": lambda one: one.all_arrive(),
    "fail": lambda one: one.servers.fail or one.fail(whole=True, full=False),
    "withdraw": lambda one: len(one.before) < 3 and one.withdraw(now=True),
    "land old": lambda one: one.before and one.land_what_was_withdrawn(which=0, dropped=False),
    "die": lambda one: one.manager_dies(now=True),
    "save": lambda one: one.client.handoff("copy" if one.client.phase == "none" else "end"),
}
FEW = 3
"""Pages, of which two go into a batch."""


def try_all(machine: type[BatchesMachine], directory: Path, length: int) -> int:
    """Try all orders of so many actions after the first batch has begun; how many pages went in all."""
    machine.parent = directory
    one = machine()
    try:
        for order in product(ACTIONS, repeat=length):
            if one.client.phase != "none":
                one.client.handoff("end")
            one.client.tiered = False
            one.pool.flush_object(OID)
            one.versions.clear()
            one.before.clear()
            one.give_tier()
            one.put(0, FEW)
            try:
                for name in ("start", *order):
                    ACTIONS[name](one)
                one.look(0, FEW)
            except Exception as error:
                raise AssertionError(f"start, {', '.join(order)}: {error!r}") from error
        assert one.segment.check() == []
        return one.demoted
    finally:
        one.end()


def test_all_orders(directory: Path) -> None:
    assert try_all(BatchesMachine, directory, 3 if EFFORT == 1 else 4) > 300


class LooksTooEarly(Batches):
    """Asks what lives before all has landed."""

    def tidy(self, tier: Tier, grace_ms: int) -> bool:
        live = self._client.live(grace_ms)
        self.land_all()
        tier.retain(memoryview(live or b"").cast("Q"))
        return True


class Forgets(Batches):
    """Tidies beside what is under way."""

    def tidy(self, tier: Tier, grace_ms: int) -> bool:
        under_way, tier.begun = tier.begun, []  # type: ignore[attr-defined]
        try:
            tier.retain(memoryview(self._client.live(grace_ms) or b"").cast("Q"))
        finally:
            tier.begun = under_way  # type: ignore[attr-defined]
        return True


class Believes(Batches):
    """Takes a batch that failed for stored."""

    def land(self) -> None:
        batch = self._under_way[0]
        end, locations = batch.writing.end, batch.writing.locations  # type: ignore[attr-defined]

        def believed() -> list[int]:
            try:
                return end()
            except TierError:
                return list(locations)

        batch.writing.end = believed  # type: ignore[method-assign]
        super().land()


@pytest.mark.parametrize("wrong", [LooksTooEarly, Forgets, Believes])
def test_what_is_wrong_is_found(directory: Path, wrong: Callable[..., Batches]) -> None:
    class Broken(BatchesMachine):
        make = wrong

    with pytest.raises(AssertionError, match="start, "):
        try_all(Broken, directory, 3)
