"""The contract's own tests against the simplest tier, and that they find one that breaks it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tmem.backends.tiers.contract import Tier, TierIdentity
from tmem.errors import TierDownError

from ..machine import bounded
from .contract import TierContract, World
from .machine import TierMachine
from .memory import MemoryTier, MemoryWorld, Shelf

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TestMemoryTier(TierContract):
    @pytest.fixture
    def world(self) -> World:
        return MemoryWorld()


class MemoryMachine(TierMachine):
    def new_world(self) -> World:
        return MemoryWorld(200)


def test_random_use() -> None:
    run_state_machine_as_test(MemoryMachine, settings=bounded(20, 30))


class HastyTier(MemoryTier):
    """Forgets what was not acknowledged to the caller, and one thing more."""

    def retain(self, live: Sequence[int]) -> None:
        super().retain(live[1:])


class TornTier(MemoryTier):
    """Stores half of a batch, and uses that room again."""

    calls = 0

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        self.calls += 1
        if self.calls % 3 == 0:
            super().write(records[: len(records) // 2])
            with self._shelf.lock:
                for location in list(self._shelf.records)[:1]:
                    self._shelf.records[location] = bytes(20)
            raise TierDownError("half of it")
        return super().write(records)


@pytest.mark.parametrize("kind", [HastyTier, TornTier])
def test_a_tier_that_loses_records_is_found(kind: type[MemoryTier]) -> None:
    class BrokenWorld(MemoryWorld):
        def open(self, identity: TierIdentity, writer: bool) -> Tier:
            return kind(self._shelves.setdefault(identity, Shelf()), self.capacity_records)

    class BrokenMachine(TierMachine):
        def new_world(self) -> World:
            return BrokenWorld()

    quiet = settings(bounded(50, 40), database=None, report_multiple_bugs=False, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(BrokenMachine, settings=quiet)
