"""The state machine that compares a real segment with the model, whatever processes the calls are made in.

`test_state` runs it with two mappings in this process, `test_processes` with workers besides. Each example
has a segment of its own, so small that eviction, refusal and the reuse of memory happen all the time.
`check()` runs after every step. Rules take small numbers and reduce them to what exists: that shrinks well.
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
from .model import ClientModel, Handle, PoolModel, demand
from .operations import Where
from .pages import KINDS, oid, pages
from .places import Local, Place

CHUNK = 65536
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
kinds = st.sampled_from(("mixed", *KINDS))
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
        self.clients: dict[str, ClientModel] = {}

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
        return sorted(self.clients)[number % len(self.clients)]

    def where(self, number: int) -> Where:
        every = sorted(Where(name, pool) for name, client in self.clients.items() for pool in client.pools)
        return every[number % len(every)]

    def model(self, where: Where) -> PoolModel:
        return self.clients[where.client].pools[where.pool]

    def known(self, where: Where, which: int) -> list[Handle]:
        """Return the handle number `which` of those that the pool may hold, or none if there is none."""
        every = sorted(self.model(where).pages)
        return [every[which % len(every)]] if every else []

    def some_pool(self) -> bool:
        return any(client.pools for client in self.clients.values())

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
        client = self.clients.setdefault(NAMES[who], ClientModel())
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
        del self.clients[where.client].pools[where.pool]

    @precondition(lambda self: len(self.clients) > 1)
    @rule(at=numbers, who=numbers, really=seldom)
    def destroy_client(self, at: int, who: int, really: bool) -> None:
        if not really:
            return
        name = self.name(who)
        self.place(at).do(op.destroy_client, name)
        del self.clients[name]

    @rule(at=numbers, who=numbers, cap=st.sampled_from((0, 0, 1, 10 * RAW_BYTES, 1 << 20, 3 << 20)))
    def set_cap(self, at: int, who: int, cap: int) -> None:
        name = self.name(who)
        self.place(at).do(op.set_cap, name, cap)
        self.clients[name].cap_bytes = cap

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
    @rule(at=numbers, pool=numbers, which=which, n=counts, kind=kinds, seed=numbers, keep=st.booleans())
    def put_over(self, at: int, pool: int, which: int, n: int, kind: str, seed: int, keep: bool) -> None:
        where = self.where(pool)
        for o, index in self.known(where, which):
            self.put_pages(at, where, o, index, pages(kind, seed, min(n, 2**32 - index)), keep)

    def put_pages(self, at: int, where: Where, o: bytes, first: int, data: list[bytes], keep: bool) -> None:
        place, cap = self.place(at), self.clients[where.client].cap_bytes
        before = self.used_bytes(where.client)
        stored = place.do(op.put, where, o, first, b"".join(data), keep)
        present = self.place(at + 1).do(op.present, where, o, first, len(data))
        self.model(where).put(o, first, data, stored, keep, present)
        if stored < len(data) and (keep or len(data) == 1):
            demand(self.is_short(where.client), f"refused for no reason: {self.segment.statistics()}")
        if cap:
            used = self.used_bytes(where.client)
            demand(used <= max(cap, before), f"{used} bytes used above the cap of {cap}, {before} before")

    def used_bytes(self, name: str) -> int:
        return self.segment.client(name, create=False).statistics()["used_bytes"]

    def is_short(self, name: str) -> bool:
        """A put may be refused now: nothing is left to evict, and memory or the client's cap is used up."""

        def evictable(who: str) -> int:
            models = self.clients[who].pools.items()
            ephemeral = [Where(who, number) for number, model in models if not model.persistent]
            return sum(self.own.do(op.statistics, where)["bytes"] for where in ephemeral)

        cap, s = self.clients[name].cap_bytes, self.segment.statistics()
        if cap and self.used_bytes(name) + RAW_BYTES > cap and evictable(name) == 0:
            return True
        reserve = min(8, s["chunks_total"] // 16)
        return s["chunks_free"] <= reserve and sum(map(evictable, self.clients)) == 0

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
        self.model(where).get(o, first, n, self.place(at).do(op.get, where, o, first, n))

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
        enough = min(chunks, s["chunks_free"]) * CHUNK
        demand(s["reserve_bytes"] >= enough, "populate left free memory unbacked")

    @rule(at=numbers)
    def reap(self, at: int) -> None:
        demand(self.place(at).do(op.reap) == 0, "a thread died")

    @rule(at=numbers)
    def attach_again(self, at: int) -> None:
        self.place(at).attach(self.path)

    # What holds after every step.

    @invariant()
    def sound(self) -> None:
        wrong = self.segment.check()
        demand(not wrong, "\n".join(wrong))

    @invariant()
    def counted(self) -> None:
        s = self.segment.statistics()
        pools = {where: self.own.do(op.statistics, where) for where in self.all_pools()}
        for where, counters in pools.items():
            self.model(where).compare(counters)
        for kind, persistent in (("persistent_pages", True), ("ephemeral_pages", False)):
            total = sum(p["pages"] for p in pools.values() if bool(p["persistent"]) is persistent)
            demand(s[kind] == total, f"{kind} is {s[kind]}, the pools have {total}")
        for name in self.clients:
            used = sum(p["bytes"] for where, p in pools.items() if where.client == name)
            demand(self.used_bytes(name) == used, f"client {name} uses {used} bytes")
        free = s["chunks_free"] * CHUNK
        demand(s["chunks_used"] + s["chunks_free"] == s["chunks_total"], f"chunks do not add up: {s}")
        demand(free <= self.segment.freeable_bytes() <= s["memory_bytes"], f"freeable: {s}")
        demand(s["used_bytes"] + free <= s["memory_bytes"], f"more memory than there is: {s}")
        blocks = self.path.stat().st_blocks * 512
        demand(blocks <= s["used_bytes"] + s["reserve_bytes"], f"{blocks} bytes in the file: {s}")

    def all_pools(self) -> list[Where]:
        listed = [Where(c.name, pool.id) for c in self.segment.clients() for pool in c.pools()]
        expected = {Where(name, number) for name, client in self.clients.items() for number in client.pools}
        demand(sorted(listed) == sorted(expected), f"pools are {listed}, not {expected}")
        return listed
