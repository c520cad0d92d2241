"""The state machine of `machine`, with pages that go to spill files at random moments and come back.

Clients get spill files; batches are collected, written and committed in steps of their own, so that anything
happens in between, and now and then a batch is committed that everything has overtaken. What is collected is
not only what is cold. The model knows nothing of tiers: that is the point.
"""

from array import array
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tmem.backends import _native
from tmem.backends.tiers import spill
from tmem.backends.tiers.contract import Tier, TierIdentity
from tmem.errors import TierFullError

from .control import ControlMachine
from .machine import numbers
from .model import demand
from .sums import CHUNK

SPILL_BYTES = 6 << 20


@dataclass
class Batch:
    """Pages that were collected, with their locations once they are written."""

    client: tuple[int, int]
    records: list[bytes]
    pages: bytes
    locations: list[int] | None = None


class TieredMachine(ControlMachine):
    """Everything that `ControlMachine` does, on clients whose pages are demoted."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self.path.with_name(f"{self.path.name}.d")
        self.state.mkdir()
        self.tiers: dict[tuple[int, int], Tier] = {}
        self.hands: dict[tuple[int, int], int] = {}
        self.batches: list[Batch] = []
        self.demoted = 0

    def teardown(self) -> None:
        for tier in self.tiers.values():
            tier.close()
        super().teardown()

    def some(self, number: int) -> _native.Client:
        clients = self.segment.clients()
        return clients[number % len(clients)]

    def tier(self, client: _native.Client) -> Tier:
        """The writer's end of the client's tier, made at its first use."""
        key = (client.id, client.serial)
        if key not in self.tiers:
            file = self.directory / f"spill-{client.id}-{client.serial}"
            who = TierIdentity(self.segment.nonce, *key)
            spill.create(file, who, SPILL_BYTES)
            (self.state / f"tier-{client.id}-{client.serial}").symlink_to(f"file:{file}")
            self.tiers[key] = spill.SpillFile(file, who, writer=True)
            self.tiers[key].retain([])
            client.tiered = True
        return self.tiers[key]

    def by_key(self, key: tuple[int, int]) -> _native.Client | None:
        return next((one for one in self.segment.clients() if (one.id, one.serial) == key), None)

    @precondition(lambda self: self.oracle.clients and len(self.batches) < 4)
    @rule(who=numbers, most=st.sampled_from((1, 3, 40, 400, 2000)), any=st.booleans())
    def collect(self, who: int, most: int, any: bool) -> None:
        client = self.some(who)
        self.tier(client)
        key = (client.id, client.serial)
        buffer = bytearray(5 << 20)
        hand, places, pages = client.collect(self.hands.get(key, 0), buffer, most, any, client.tier_epoch)
        self.hands[key] = hand
        records = [bytes(buffer[at : at + length]) for at, length in places]
        self.batches.append(Batch(key, records, pages))

    @precondition(lambda self: any(batch.locations is None for batch in self.batches))
    @rule(which=numbers)
    def write_batch(self, which: int) -> None:
        waiting = [batch for batch in self.batches if batch.locations is None]
        batch = waiting[which % len(waiting)]
        try:
            batch.locations = self.tiers[batch.client].write(batch.records)
        except TierFullError:
            self.batches.remove(batch)

    @precondition(lambda self: any(batch.locations is not None for batch in self.batches))
    @rule(which=numbers)
    def commit_batch(self, which: int) -> None:
        written = [batch for batch in self.batches if batch.locations is not None]
        batch = written[which % len(written)]
        self.batches.remove(batch)
        client = self.by_key(batch.client)
        if client is not None:
            assert batch.locations is not None
            self.demoted += client.demote(batch.pages, array("Q", batch.locations))

    @precondition(lambda self: self.oracle.clients)
    @rule(who=numbers, any=st.booleans())
    def demote(self, who: int, any: bool) -> None:
        """Collect, write and commit one batch without anything in between: most of the pages go."""
        self.collect(who, 2000, any)
        batch = self.batches[-1]
        try:
            batch.locations = self.tiers[batch.client].write(batch.records)
        except TierFullError:
            self.batches.pop()
            return
        self.batches.pop()
        client = self.by_key(batch.client)
        assert client is not None
        before = client.statistics()["tier_pages"]
        demoted = client.demote(batch.pages, array("Q", batch.locations))
        demand(demoted == len(batch.records), f"{demoted} of {len(batch.records)} pages were demoted")
        demand(client.statistics()["tier_pages"] == before + demoted, "tier_pages is not what was demoted")

    @precondition(lambda self: self.tiers)
    @rule(which=numbers, most=st.sampled_from((1, 40, 2000)), near=st.booleans(), keep=st.integers(0, 6))
    def prefetch(self, which: int, most: int, near: bool, keep: int) -> None:
        """Bring pages back as long as that costs nobody anything."""
        client = self.by_key(sorted(self.tiers)[which % len(self.tiers)])
        if client is None:
            return
        before, pages = self.segment.statistics(), client.statistics()["tier_pages"]
        hand, came, why = client.prefetch(0, most, near, keep)
        after, owned = self.segment.statistics(), client.statistics()
        demand(owned["tier_pages"] == pages - came, f"{came} pages came back, of {pages} are left {owned}")
        demand(after["ephemeral_pages"] == before["ephemeral_pages"], "a page was evicted for others")
        demand(came <= most + 64, f"{came} pages came back")
        if came:
            used, limit = (
                (after[name] - after["metadata_bytes"]) // CHUNK for name in ("used_bytes", "limit_bytes")
            )
            demand(used <= limit * (16 - keep) // 16 + 1, f"{used} of {limit} chunks with {keep}/16 kept")
            cap, share = owned["cap_bytes"], owned["used_bytes"] * 16
            demand(not cap or share <= cap * (16 - keep) + 256, f"{share} / 16 bytes below a cap of {cap}")
        demand(why in ("", "room"), f"prefetch ended: {why}")
        ended = not near and not why and not hand and client.phase == "none"
        demand(not ended or owned["tier_pages"] == 0, "pages stayed there")

    @precondition(lambda self: self.tiers)
    @rule(which=numbers)
    def tidy(self, which: int) -> None:
        """Tell a tier what lives, its waiting batches aside, which are given up."""
        key = sorted(self.tiers)[which % len(self.tiers)]
        client = self.by_key(key)
        self.batches = [batch for batch in self.batches if batch.client != key or batch.locations is None]
        live = client.live(1000) if client is not None else b""
        demand(live is not None, "somebody still reads from the tier")
        assert live is not None
        found = memoryview(live).cast("Q")
        if client is not None:
            demand(len(found) == client.statistics()["tier_pages"], "not as many locations as pages")
        self.tiers[key].retain(found)
