"""The rest of the state machine: everything that is not a put, get or flush.

Shared pools, modes, weights, floors and compression, and what a save or handoff does: copies of persistent
pools, kept by applying exported records, must at each freeze be exactly what the model holds. Threading and
use as `machine.StoreMachine`, which this extends.
"""

from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from tmem.errors import PoolError

from . import operations as op
from .machine import NAMES, StoreMachine, numbers, seldom
from .model import MODES, ClientModel, Handle, PoolModel, SharedModel, demand
from .operations import Where
from .places import Place
from .records import apply
from .sums import CHUNK

UUIDS = (b"first shared one", b"another of them!")
RESTORED = "restored"

uuids = st.sampled_from(UUIDS)
names = st.integers(0, len(NAMES) - 1)


class Handoff(NamedTuple):
    """A handoff under way: where it was begun, and what the exports said so far."""

    place: Place
    copies: dict[int, dict[Handle, bytes]]


class ControlMachine(StoreMachine):
    """Random operations of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.handoffs: dict[str, Handoff] = {}

    def fails(self, *call: object) -> bool:
        """Do what may raise `PoolError`: at a place, a function, its arguments. True: it did."""
        place, function, *arguments = call
        try:
            place.do(function, *arguments)  # type: ignore[attr-defined]
        except PoolError:
            return True
        return False

    # Shared pools.

    @rule(at=numbers, who=names, uuid=uuids)
    def authorise(self, at: int, who: int, uuid: bytes) -> None:
        self.place(at).do(op.authorise, NAMES[who], uuid)
        self.oracle.clients.setdefault(NAMES[who], ClientModel()).authorised.add(uuid)

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, uuid=uuids, really=seldom)
    def revoke(self, at: int, who: int, uuid: bytes, really: bool) -> None:
        if not really:
            return
        name = self.name(who)
        client = self.oracle.clients[name]
        was = self.place(at).do(op.revoke, name, uuid)
        demand(was is (uuid in client.authorised), f"revoked {was}")
        client.authorised.discard(uuid)
        for number in [n for n, pool in client.pools.items() if pool is self.oracle.shared.get(uuid)]:
            self.oracle.leave(name, number)

    @rule(at=numbers, who=names, uuid=uuids, may_not=seldom)
    def share(self, at: int, who: int, uuid: bytes, may_not: bool) -> None:
        if not may_not:
            self.authorise(at, who, uuid)
        client = self.oracle.clients.setdefault(NAMES[who], ClientModel())
        shared = self.oracle.shared.get(uuid)
        denied = uuid not in client.authorised or NAMES[who] in (shared.sharers if shared else ())
        if denied or len(client.pools) == 16:
            demand(self.fails(self.place(at), op.share, NAMES[who], uuid), "shares what it must not share")
            return
        where = self.place(at).do(op.share, NAMES[who], uuid)
        demand(where.pool not in client.pools, f"pool id {where.pool} is taken")
        if shared is None:
            shared = self.oracle.shared[uuid] = SharedModel(persistent=False, exclusive=False)
        shared.join(NAMES[who])
        client.pools[where.pool] = shared

    @invariant()
    def owned(self) -> None:
        """An owner that left is followed by one of the sharers; nobody else ever becomes the owner."""
        for name, client in self.oracle.clients.items():
            for number, pool in client.pools.items():
                if isinstance(pool, SharedModel):
                    owner, sharers = self.own.do(op.owner, Where(name, number))
                    demand(sorted(sharers) == sorted(pool.sharers), f"shared by {sharers}: {pool.sharers}")
                    demand(owner in sharers, f"owned by {owner}, shared by {sharers}")
                    pool.owner = pool.owner or owner
                    demand(owner == pool.owner, f"owned by {owner}, not {pool.owner}")

    # Modes and quality of service.

    @rule(at=numbers, who=numbers, all_of_them=seldom, mode=st.sampled_from(("on", "on", *MODES)))
    def set_mode(self, at: int, who: int, all_of_them: bool, mode: str) -> None:
        if all_of_them or not self.oracle.clients:
            self.place(at).do(op.set_mode, None, mode)
            self.oracle.set_mode(None, mode)
        else:
            self.place(at).do(op.set_mode, self.name(who), mode)
            self.oracle.set_mode(self.name(who), mode)

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, floor=st.sampled_from((0, 0, 1, 300_000, 2 << 20, 5 << 20, 1 << 40)))
    def set_floor(self, at: int, who: int, floor: int) -> None:
        name = self.name(who)
        client = self.oracle.clients[name]
        refused = self.fails(self.place(at), op.set_floor, name, floor)
        demand(not refused or floor > client.floor_bytes, f"a floor of {floor} bytes is refused")
        if not refused:
            client.floor_bytes = floor
        promised = sum(c.floor_bytes for c in self.oracle.clients.values())
        demand(promised <= self.memory_bytes, f"{promised} bytes are promised")

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, weight=st.sampled_from((0, 1, 99, 100, 65535)))
    def set_weight(self, at: int, who: int, weight: int) -> None:
        self.place(at).do(op.set_weight, self.name(who), weight)
        self.oracle.clients[self.name(who)].weight = weight

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, compress=st.sampled_from(("auto", "lz4", "none")))
    def set_compress(self, at: int, who: int, compress: str) -> None:
        self.place(at).do(op.set_compress, self.name(who), compress)
        self.oracle.clients[self.name(who)].compress = compress

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, chunks=st.sampled_from((0, 3, 2**20)))
    def evict_client(self, at: int, who: int, chunks: int) -> None:
        """Only its own ephemeral pages go, and with enough to do all that take memory."""
        name = self.name(who)
        before = {other: self.evictions(other) for other in self.oracle.clients if other != name}
        self.place(at).do(op.evict_client, name, chunks * CHUNK)
        demand(before == {other: self.evictions(other) for other in before}, "pages of others were evicted")
        if chunks == 2**20:
            left = self.segment.client(name, create=False).statistics()["ephemeral_bytes"]
            demand(left == 0, f"{left} bytes are left")

    def evictions(self, name: str) -> int:
        wheres = [Where(payer, number) for payer, number, _ in self.oracle.each() if payer == name]
        return sum(self.own.do(op.statistics, where)["evictions"] for where in wheres)

    @invariant()
    def settings_stay(self) -> None:
        for name, c in self.oracle.clients.items():
            expected = (c.cap_bytes, c.floor_bytes, c.weight, c.compress, c.mode, c.phase)
            now = self.own.do(op.settings, name)
            demand(now == (*expected, sorted(c.authorised)), f"{name} is {now}, not {expected}")

    # Save and handoff.

    def persistent(self, name: str) -> dict[int, PoolModel]:
        pools = self.oracle.clients[name].pools.items()
        return {number: pool for number, pool in pools if pool.persistent}

    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers)
    def begin_copy(self, at: int, who: int) -> None:
        name = self.name(who)
        if name in self.handoffs:
            return
        for step in ("freeze", "depart"):
            demand(self.fails(self.place(at), op.handoff, name, step), f"{step} without a copy")
        self.place(at).do(op.handoff, name, "copy")
        self.oracle.clients[name].phase = "copying"
        self.handoffs[name] = Handoff(self.place(at), {})
        for pool in self.persistent(name).values():
            pool.changed = set(pool.pages)

    def copying(self) -> bool:
        return bool(self.handoffs)

    def handed(self, number: int) -> str:
        return sorted(self.handoffs)[number % len(self.handoffs)]

    @precondition(copying)
    @rule(who=numbers, buffer=st.sampled_from((8192, 50_000, 1 << 20)))
    def copy_round(self, who: int, buffer: int) -> None:
        self.copy(self.handed(who), buffer)

    def copy(self, name: str, buffer: int) -> None:
        """Export what is new: nothing is named that did not change since it was exported."""
        handoff = self.handoffs[name]
        for number, pool in self.persistent(name).items():
            records = handoff.place.do(op.export, Where(name, number), True, buffer)
            named = apply(handoff.copies.setdefault(number, {}), records)
            demand(named <= pool.changed, f"{len(named - pool.changed)} records of what did not change")
            pool.changed.clear()
            demand(handoff.copies[number] == pool.pages, f"the copy of {name} {number} is not what it holds")

    @precondition(copying)
    @rule(at=numbers, who=numbers, depart=st.booleans(), kept=seldom)
    def end_handoff(self, at: int, who: int, depart: bool, kept: bool) -> None:
        """Freeze, copy the rest, and go on as before; or go, and leave nothing behind."""
        name = self.handed(who)
        place, client = self.handoffs[name].place, self.oracle.clients[name]
        place.do(op.handoff, name, "freeze")
        client.phase = "frozen"
        self.copy(name, 1 << 20)
        self.settings_stay()
        if depart:
            place.do(op.handoff, name, "depart")
            client.phase = "departed"
            self.settings_stay()
        del self.handoffs[name]
        if depart and kept and len(self.oracle.clients) > 1:
            self.place(at).do(op.destroy_client, name)
            self.oracle.destroy(name)
        else:
            place.do(op.handoff, name, "end")
            client.phase = "none"

    @precondition(lambda self: RESTORED not in self.oracle.clients)
    @precondition(StoreMachine.some_client)
    @rule(at=numbers, who=numbers, commit=st.booleans())
    def restore(self, at: int, who: int, commit: bool) -> None:
        """Make another client from the pages of one: it holds the same, or it does not appear."""
        name, place = self.name(who), self.place(at)
        pools = self.persistent(name)
        records = [
            (number, pool.exclusive, place.do(op.export, Where(name, number), False, 1 << 16))
            for number, pool in pools.items()
        ]
        restored = place.do(op.restore, RESTORED, records, commit)
        if restored is None or not commit:
            return
        demand(restored == {number: len(pool.pages) for number, pool in pools.items()}, f"{restored} pages")
        made = self.oracle.clients[RESTORED] = ClientModel()
        for number, pool in pools.items():
            s = self.own.do(op.statistics, Where(RESTORED, number))
            made.pools[number] = PoolModel(True, pool.exclusive, dict(pool.pages), most=s["pages_max"])
            made.pools[number].counts.update({key: s[key] for key in ("puts", "puts_stored")})

    # What ends a handoff besides.

    def left(self) -> None:
        for name in self.handoffs.keys() - self.oracle.clients.keys():
            del self.handoffs[name]
        for name, handoff in self.handoffs.items():
            for number in handoff.copies.keys() - self.oracle.clients[name].pools.keys():
                del handoff.copies[number]

    def may_attach(self, place: Place) -> bool:
        return all(place is not handoff.place for handoff in self.handoffs.values())
