"""The state machine that compares a real segment with the model, whatever processes the calls are made in.

Here are clients, their own pools and pages; `control` adds everything else. `test_state` runs both with two
mappings in this process, `test_processes` with workers besides. Each example has a segment of its own, so
small that eviction, refusal and the reuse of memory happen all the time. `check()` runs after every step.
Rules take small numbers and reduce them to what exists: that shrinks well.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tmem.backends import _native
from tmem.types import MAX_INDEX

from . import operations as op
from .model import ClientModel, Handle, PoolModel, SegmentModel, SharedModel, demand
from .operations import Where
from .pages import ALIKE, KINDS, oid, pages
from .places import Local, Place
from .sums import CHUNK, Growth, check_sums

RAW_BYTES = 4160
"""Memory of a page that does not compress, the most that one can need."""
EDGES = (0, 16, 64, 512, 1024, 4096, 2**19, 2**20, 2**29, 2**32)
"""Where the index changes its shape, and its end."""
NAMES = ("guest", "mount", "ä-63-bytes-" + "x" * 51)

numbers = st.integers(0, 99)
objects = st.sampled_from((0, 0, 1, 1, 2, 7)).map(oid)
fills = st.one_of(st.integers(0, 100), st.integers(400, 1600))
which = st.integers(0, 10**6)
seldom = st.sampled_from((False, False, False, True))
starts = st.builds(
    lambda edge, near: min(max(edge + near, 0), MAX_INDEX), st.sampled_from(EDGES), st.integers(-3, 3)
)
counts = st.one_of(st.integers(1, 4), st.integers(1, 70))
kinds = st.sampled_from(("mixed", *KINDS, ALIKE, ALIKE))
big_kinds = st.sampled_from(("random", "near", "mixed", "text"))


def bounded(examples: int, steps: int) -> settings:
    """Return settings for a state machine on a computer of unknown speed."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class StoreMachine(RuleBasedStateMachine):
    """Random operations on one segment from several places, each compared with the model."""

    memory_bytes: ClassVar[int] = 8 << 20
    workers: ClassVar[Sequence[Place]] = ()
    parent: ClassVar[Path]
    """A directory on a tmpfs that somebody else removes; set it before use."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tmem-machine-", dir=self.parent))
        self.path = self.directory / "segment"
        self.segment = _native.create(str(self.path), self.memory_bytes)
        self.own = Local(self.path)
        self.places: list[Place] = [self.own, Local(self.path), *self.workers]
        for worker in self.workers:
            worker.attach(self.path)
        self.oracle = SegmentModel()
        self.growth = Growth()

    def teardown(self) -> None:
        for place in self.places[:2]:
            assert isinstance(place, Local)
            place.close()
        self.segment.close()
        _native.destroy(str(self.path))
        shutil.rmtree(self.directory)

    # What the rules' numbers stand for.

    def place(self, number: int) -> Place:
        return self.places[number % len(self.places)]

    def name(self, number: int) -> str:
        return sorted(self.oracle.clients)[number % len(self.oracle.clients)]

    def where(self, number: int) -> Where:
        clients = self.oracle.clients.items()
        every = sorted(Where(name, pool) for name, client in clients for pool in client.pools)
        return every[number % len(every)]

    def model(self, where: Where) -> PoolModel:
        return self.oracle.clients[where.client].pools[where.pool]

    def known(self, where: Where, which: int) -> list[Handle]:
        """Return the handle number `which` of those that the pool may hold, or none if there is none."""
        every = sorted(self.model(where).pages)
        return [every[which % len(every)]] if every else []

    def some_pool(self) -> bool:
        return any(client.pools for client in self.oracle.clients.values())

    def some_client(self) -> bool:
        return bool(self.oracle.clients)

    # Clients and pools.

    @initialize(at=numbers, persistent=fills, exclusive=fills, kept=fills, kind=big_kinds)
    def begin(self, at: int, persistent: int, exclusive: int, kept: int, kind: str) -> None:
        """Begin with pools that fill nothing, or half, or more than the whole of the memory."""
        self.add_pool(at, 0, True, None)
        self.add_pool(at, 0, False, None)
        self.add_pool(at, 1, False, False)
        for pool, n in enumerate((persistent, exclusive, kept)):
            self.put_pages(at + pool, self.where(pool), oid(pool % 2), 0, pages(kind, pool, n), False)

    @rule(at=numbers, who=st.integers(0, len(NAMES) - 1), persistent=st.booleans(), exclusive=st.none())
    def add_pool(self, at: int, who: int, persistent: bool, exclusive: bool | None) -> None:
        client = self.oracle.clients.setdefault(NAMES[who], ClientModel())
        if len(client.pools) == 16:
            return
        where = self.place(at).do(op.new_pool, NAMES[who], persistent, exclusive)
        demand(where.pool not in client.pools, f"pool id {where.pool} is taken")
        demand(0 <= where.pool < 16, f"pool id {where.pool}")
        client.pools[where.pool] = PoolModel(
            persistent, exclusive if exclusive is not None else not persistent
        )

    @rule(at=numbers, who=st.integers(0, 1), persistent=st.booleans(), exclusive=st.booleans())
    def add_odd_pool(self, at: int, who: int, persistent: bool, exclusive: bool) -> None:
        self.add_pool(at, who, persistent, exclusive)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, really=seldom)
    def destroy_pool(self, at: int, pool: int, really: bool) -> None:
        if not really:
            return
        where = self.where(pool)
        self.place(at).do(op.destroy_pool, where)
        self.oracle.leave(*where)
        self.left()

    @precondition(lambda self: len(self.oracle.clients) > 1)
    @rule(at=numbers, who=numbers, really=seldom)
    def destroy_client(self, at: int, who: int, really: bool) -> None:
        if not really:
            return
        name = self.name(who)
        self.place(at).do(op.destroy_client, name)
        self.oracle.destroy(name)
        self.left()

    def left(self) -> None:
        """A pool or client is no more: for machines that extend this one."""

    @rule(at=numbers, who=numbers, cap=st.sampled_from((0, 0, 1, 10 * RAW_BYTES, 1 << 20, 3 << 20)))
    def set_cap(self, at: int, who: int, cap: int) -> None:
        name = self.name(who)
        self.place(at).do(op.set_cap, name, cap)
        self.oracle.clients[name].cap_bytes = cap

    # Pages.

    @precondition(some_pool)
    @rule(
        at=numbers,
        pool=numbers,
        o=objects,
        first=starts,
        n=counts,
        kind=kinds,
        seed=numbers,
        keep=st.booleans(),
    )
    def put(self, at: int, pool: int, o: bytes, first: int, n: int, kind: str, seed: int, keep: bool) -> None:
        self.put_pages(at, self.where(pool), o, first, pages(kind, seed, min(n, 2**32 - first)), keep)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects, first=starts, kind=kinds, seed=numbers, keep=st.booleans())
    def put_one(self, at: int, pool: int, o: bytes, first: int, kind: str, seed: int, keep: bool) -> None:
        self.put_pages(at, self.where(pool), o, first, pages(kind, seed, 1), keep)

    @precondition(some_pool)
    @rule(
        at=numbers,
        pool=numbers,
        o=objects,
        n=st.integers(100, 1600),
        kind=big_kinds,
        seed=numbers,
        keep=st.booleans(),
    )
    def put_many(self, at: int, pool: int, o: bytes, n: int, kind: str, seed: int, keep: bool) -> None:
        self.put_pages(at, self.where(pool), o, 5000, pages(kind, seed, n), keep)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, first=starts, n=counts, kind=kinds, seed=numbers)
    def put_twice(self, at: int, pool: int, first: int, n: int, kind: str, seed: int) -> None:
        where, data = self.where(pool), pages(kind, seed, min(n, 2**32 - first))
        self.put_pages(at, where, oid(0), first, data, True)
        self.put_pages(at, where, oid(1), first, data, True)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, which=which, n=counts, kind=kinds, seed=numbers, keep=st.booleans())
    def put_over(self, at: int, pool: int, which: int, n: int, kind: str, seed: int, keep: bool) -> None:
        where = self.where(pool)
        for o, index in self.known(where, which):
            self.put_pages(at, where, o, index, pages(kind, seed, min(n, 2**32 - index)), keep)

    def put_pages(self, at: int, where: Where, o: bytes, first: int, data: list[bytes], keep: bool) -> None:
        place, model, payer = self.place(at), self.model(where), self.oracle.payer(*where)
        before, beyond = self.used_bytes(payer), self.is_beyond()
        stored = place.do(op.put, where, o, first, b"".join(data), keep)
        present = self.place(at + 1).do(op.present, where, o, first, len(data))
        model.put(o, first, data, stored, keep, present)
        if stored and isinstance(model, SharedModel):
            model.used(o, payer)
        if not self.oracle.may_put(where.client):
            demand(not stored, f"{stored} pages stored while {self.oracle.mode_of(where.client)}")
        elif stored < len(data) and (keep or len(data) == 1):
            # A limit that has just fallen is made up for by `shrink`, not by whoever puts ephemeral pages.
            excused = beyond and not model.persistent
            demand(
                excused or self.is_short(payer, model.persistent),
                f"refused for no reason: {self.segment.statistics()}",
            )
        if cap := self.oracle.clients[payer].cap_bytes:
            used = self.used_bytes(payer)
            demand(used <= max(cap, before), f"{used} bytes used above the cap of {cap}, {before} before")

    def used_bytes(self, name: str) -> int:
        return self.segment.client(name, create=False).statistics()["used_bytes"]

    def is_beyond(self) -> bool:
        """More is in use than the limit allows."""
        s = self.segment.statistics()
        return s["used_bytes"] > s["limit_bytes"]

    def is_short(self, name: str, persistent: bool) -> bool:
        """A put may be refused now: the cap is used up, or memory, and nothing is left to evict.

        Not what the client was promised, and not for memory that others were promised when they have it.
        """

        def evictable(who: str) -> int:
            return sum(
                self.own.do(op.statistics, Where(payer, number))["bytes"]
                for payer, number, model in self.oracle.each()
                if payer == who and not model.persistent
            )

        client, s, used = self.oracle.clients[name], self.segment.statistics(), self.used_bytes(name)
        if client.cap_bytes and used + RAW_BYTES > client.cap_bytes:
            return evictable(name) == 0
        if used + RAW_BYTES <= client.floor_bytes:
            return False
        left = promised = 0
        kept = min(8, s["chunks_total"] // 16)
        for who, other in self.oracle.clients.items():
            missing = other.floor_bytes - self.used_bytes(who)
            if who != name and other.floor_bytes:
                # What size classes leave half full, chunks of raw pages, and some for the index.
                promised = promised or min(64, s["chunks_total"] // 16)
                promised += max(missing, 0) // 55_000 + 6 * (missing > 0)
            if who == name or missing <= -CHUNK or not other.floor_bytes:  # chunks go at once, or not at all
                left += evictable(who)
        limit = s["persistent_limit_bytes" if persistent else "limit_bytes"]
        return (limit - s["used_bytes"]) // CHUNK <= kept + promised and left == 0

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects, first=starts, n=counts)
    def get(self, at: int, pool: int, o: bytes, first: int, n: int) -> None:
        self.get_pages(at, self.where(pool), o, first, min(n, 2**32 - first))

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, which=which, n=counts)
    def get_known(self, at: int, pool: int, which: int, n: int) -> None:
        where = self.where(pool)
        for o, index in self.known(where, which):
            self.get_pages(at, where, o, index, min(n, 2**32 - index))

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects)
    def get_many(self, at: int, pool: int, o: bytes) -> None:
        self.get_pages(at, self.where(pool), o, 0, 1600)

    def get_pages(self, at: int, where: Where, o: bytes, first: int, n: int) -> None:
        model, got = self.model(where), self.place(at).do(op.get, where, o, first, n)
        if not model.persistent and self.oracle.mode_of(where.client) == "off":
            demand(not got, f"{len(got)} pages came while off")
            model.counts["gets"] += 1  # of a shared pool the others may still get it
            return
        model.get(o, first, n, got)
        if got and isinstance(model, SharedModel):
            model.used(o, where.client)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, which=which, n=counts)
    def flush_known(self, at: int, pool: int, which: int, n: int) -> None:
        for o, index in self.known(self.where(pool), which):
            self.flush(at, pool, o, index, n)

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects, first=starts, n=st.one_of(counts, st.just(2**32)))
    def flush(self, at: int, pool: int, o: bytes, first: int, n: int) -> None:
        where, n = self.where(pool), min(n, 2**32 - first)
        self.model(where).flush(o, first, n, self.place(at).do(op.flush, where, o, first, n))

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects)
    def flush_object(self, at: int, pool: int, o: bytes) -> None:
        where = self.where(pool)
        self.model(where).flush_object(o, self.place(at).do(op.flush_object, where, o))

    @precondition(some_pool)
    @rule(at=numbers, pool=numbers, o=objects, first=starts, n=st.one_of(counts, st.just(2**32)))
    def present(self, at: int, pool: int, o: bytes, first: int, n: int) -> None:
        where, n = self.where(pool), min(n, 2**32 - first)
        self.model(where).present(o, first, n, self.place(at).do(op.present, where, o, first, n))

    # The segment as a whole.

    @rule(at=numbers, chunks=st.sampled_from((0, 1, 20, 2**20)))
    def evict(self, at: int, chunks: int) -> None:
        self.place(at).do(op.evict, chunks * CHUNK)

    @rule(at=numbers, chunks=st.sampled_from((0, 5, 2**20)))
    def trim(self, at: int, chunks: int) -> None:
        self.place(at).do(op.trim, chunks * CHUNK)
        demand(
            self.segment.statistics()["reserve_bytes"] <= chunks * CHUNK, "trim kept more than it was told to"
        )

    @rule(at=numbers, chunks=st.sampled_from((1, 10, 2**20)))
    def populate(self, at: int, chunks: int) -> None:
        self.place(at).do(op.populate, chunks * CHUNK)
        s = self.segment.statistics()
        enough = min(chunks, (s["persistent_limit_bytes"] - s["used_bytes"]) // CHUNK) * CHUNK
        demand(s["reserve_bytes"] >= enough, "populate left free memory unbacked")

    @rule(at=numbers, chunks=st.sampled_from((0, 80, 100, 2**20)), beyond=st.sampled_from((0, 10, 2**20)))
    def set_limits(self, at: int, chunks: int, beyond: int) -> None:
        limit = self.place(at).do(op.set_limits, chunks * CHUNK, (chunks + beyond) * CHUNK)
        now, persistent = self.segment.limits
        demand(limit == now <= persistent, f"set the limit to {limit}; it is {now}, {persistent}")

    @rule(at=numbers, keep=st.sampled_from((0, 5)), hard=st.booleans())
    def shrink(self, at: int, keep: int, hard: bool) -> None:
        pages = self.segment.statistics()["persistent_pages"]
        self.place(at).do(op.shrink, keep * CHUNK, hard)
        s = self.segment.statistics()
        demand(s["persistent_pages"] == pages, "a persistent page was dropped")
        over = s["used_bytes"] + s["reserve_bytes"] - s["limit_bytes"]
        demand(over <= keep * CHUNK or not self.gives_way(), f"{over} bytes beyond the limit: {s}")

    def gives_way(self) -> bool:
        """Whether there are ephemeral pages that are promised to nobody."""
        return any(
            not self.oracle.clients[payer].floor_bytes
            and self.own.do(op.statistics, Where(payer, number))["bytes"] > 0
            for payer, number, model in self.oracle.each()
            if not model.persistent
        )

    @rule(at=numbers, warm=st.booleans(), loose=st.booleans(), level=st.integers(1, 19))
    def condense(self, at: int, warm: bool, loose: bool, level: int) -> None:
        pages = self.segment.statistics()["ephemeral_pages"]
        demand(self.place(at).do(op.condense, warm, loose, level), "not every chunk was visited")
        demand(self.segment.statistics()["ephemeral_pages"] == pages, "a page was evicted to store others")

    @precondition(some_client)
    @rule(at=numbers, who=numbers, allow=st.booleans(), warm=st.booleans())
    def dedup(self, at: int, who: int, allow: bool, warm: bool) -> None:
        """Nobody is to notice, but in the memory that is used."""
        self.place(at).do(op.set_dedup, self.name(who), allow)
        demand(self.place(at).do(op.dedup, warm), "not every page was looked at")
        s = self.segment.statistics()
        demand(s["original_pages"] <= s["twin_pages"], f"originals that no page needs: {s}")

    @rule(at=numbers, warm=st.booleans())
    def pack(self, at: int, warm: bool) -> None:
        """Nobody is to notice, but in the memory that is used."""
        before = self.segment.statistics()
        demand(self.place(at).do(op.pack, warm), "not every group was looked at")
        after = self.segment.statistics()
        demand(after["packed_pages"] >= before["packed_pages"], f"a page left its pack: {after}")
        demand(after["packs"] * 2 <= after["packed_pages"] + before["packs"], f"packs of one page: {after}")

    @rule(at=numbers)
    def unpack(self, at: int) -> None:
        demand(self.place(at).do(op.unpack), "not every pack was looked at")
        s = self.segment.statistics()
        demand(s["packs"] <= s["packed_pages"], f"packs that no page needs: {s}")

    @rule(at=numbers, holes=st.sampled_from((1, 4, 8, 16)))
    def compact(self, at: int, holes: int) -> None:
        used = self.segment.statistics()["used_bytes"]
        freed = self.place(at).do(op.compact, holes)
        demand(self.segment.statistics()["used_bytes"] == used - freed, f"compaction says it freed {freed}")

    @rule(at=numbers)
    def reap(self, at: int) -> None:
        demand(self.place(at).do(op.reap) == 0, "a thread died")

    @rule(at=numbers)
    def attach_again(self, at: int) -> None:
        if self.may_attach(self.place(at)):
            self.place(at).attach(self.path)

    def may_attach(self, place: Place) -> bool:
        """Whether nothing depends on the threads that `place` has now: for machines that extend this one."""
        return True

    # What holds after every step.

    @invariant()
    def sound(self) -> None:
        wrong = self.segment.check()
        demand(not wrong, "\n".join(wrong))

    @invariant()
    def counted(self) -> None:
        check_sums(self.segment)
        self.growth.look(self.segment)
        self.all_pools()
        for payer, number, model in self.oracle.each():
            model.compare(self.own.do(op.statistics, Where(payer, number)))
        s = self.segment.statistics()
        free = max(s["persistent_limit_bytes"] - s["used_bytes"], 0) // CHUNK * CHUNK
        demand(free <= self.segment.freeable_bytes() <= s["memory_bytes"], f"freeable: {s}")
        demand(s["used_bytes"] + free <= s["memory_bytes"], f"more memory than there is: {s}")
        blocks = self.path.stat().st_blocks * 512
        demand(blocks <= s["used_bytes"] + s["reserve_bytes"], f"{blocks} bytes in the file: {s}")

    def all_pools(self) -> None:
        listed = [Where(c.name, pool.id) for c in self.segment.clients() for pool in c.pools()]
        clients = self.oracle.clients.items()
        expected = [Where(name, number) for name, client in clients for number in client.pools]
        demand(sorted(listed) == sorted(expected), f"pools are {listed}, not {expected}")
