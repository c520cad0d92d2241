"""The endurance run: processes work on one segment as fast as they can, and every outcome is compared.

Each phase gives every process some pools (`lean.Lean`: the pool, its operations, what it must hold), and
after it they change hands, so every process works on every pool. Meanwhile each process makes life hard for
the clients of the others: it fills the memory, evicts, gives memory back, changes caps, weights and modes,
and uses with them pools that all use at once, where a page that is got must be one of those put there.
Between the phases, while nobody works, the segment must be sound and its counters must add up. The operations
of a pool follow from the seed alone; how they interleave does not. `Endurance` belongs to one thread.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tmem.backends._native import Client, Pool, Segment
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .lean import ALL, INDEXES, NUMBERS, OBJECTS, PAGES, Lean
from .model import check_identities, demand
from .operations import Where
from .pages import oid
from .places import Worker
from .sums import CHUNK, Growth, check_sums

BURST = 100
"""Operations on one pool before the process turns to another one."""
UUID = b"endurance's pool"
KINDS = ((True, None), (False, None), (False, False), (True, True))
"""Each client has a pool of each: (persistent, exclusive)."""
BIG = 64
"""Pages of the calls that fill the memory."""


class Task(NamedTuple):
    """What a process does in a phase."""

    number: int
    """The process's own number."""
    seed: str
    mine: list[Lean]
    victims: list[str]
    """Clients of other processes: nobody else changes their settings in this phase."""
    contended: list[Where]
    """Pools that all processes use."""
    bursts: int


class Done(NamedTuple):
    """What came of a task."""

    mine: list[Lean]
    operations: int
    frozen: int
    """How often a client of another process was seen to stay as it was while it was frozen or off."""


@dataclass
class _Restriction:
    """A client of another process that may not put for a while; what its pools had stored when it began."""

    client: Client
    mode: str
    stored: list[int]

    @classmethod
    def begin(cls, client: Client, mode: str) -> "_Restriction":
        client.mode = mode
        return cls(client, mode, cls._stored(client))

    def end(self) -> None:
        """Check that nothing was stored meanwhile, and nothing is left to get if the client was off."""
        name = self.client.name
        demand(self._stored(self.client) == self.stored, f"{name} has stored pages while {self.mode}")
        if self.mode == "off":
            left = self.client.statistics()["ephemeral_pages"]
            demand(left == 0, f"{name} has {left} ephemeral pages while off")
        self.client.mode = "on"

    @staticmethod
    def _stored(client: Client) -> list[int]:
        return [pool.statistics()["puts_stored"] for pool in client.pools()]


class _Trouble:
    """What a process does to all others, one small thing at a time."""

    def __init__(self, segment: Segment, task: Task) -> None:
        self.segment = segment
        self.rng = random.Random(task.seed)
        self.victims = [segment.client(name, create=False) for name in task.victims]
        self.filler = segment.client(f"filler {task.number}")
        self.pools = self.filler.pools() or [self.filler.new_pool(True), self.filler.new_pool(False)]
        self.sharer = segment.client(f"sharer {task.number}")
        self.contended = [op.find(segment, where) for where in task.contended]
        self.restricted: _Restriction | None = None
        self.seen_frozen = self.operations = 0
        self.first = task.number == 0
        self.acts: tuple[Callable[[], object], ...] = (
            *(self.contend,) * 12,
            *(self.share,) * 8,
            *(self.put_ephemeral,) * 8,
            *(self.restrict,) * 6,
            *(self.evict, self.evict, self.fill, self.drop, self.come_and_go, self.give_back),
            *(self.set_cap, self.set_cap, self.set_weight, self.set_floor, self.leave, self.stop_all),
        )

    def act(self) -> None:
        self.rng.choice(self.acts)()

    def end(self) -> None:
        """Take back what holds the others up."""
        if self.restricted:
            self.restrict()
        self.drop()
        for client in self.victims:
            client.cap_bytes = client.floor_bytes = 0

    # Pools of everybody.

    def contend(self) -> None:
        self._use(self.rng.choice(self.contended))

    def share(self) -> None:
        self._use(self._shared())

    def leave(self) -> None:
        """Leave the shared pool, and join it again or create it anew at the next use."""
        for pool in self.sharer.pools():
            pool.destroy()

    def _shared(self) -> Pool:
        return next(iter(self.sharer.pools()), None) or self.sharer.new_pool(False, uuid=UUID)

    def _use(self, pool: Pool) -> None:
        """Put, get and flush where others do: a page that comes is one of those put at its place (C4)."""
        buffer, getrandbits = bytearray(PAGE_SIZE), self.rng.getrandbits
        for _ in range(BURST):
            bits = getrandbits(15)
            place, o = bits & 63, OBJECTS[bits >> 6 & 3]
            if (kind := bits >> 8 & 15) < 6:
                pool.put(o, INDEXES[place], PAGES[(bits >> 12) * 64 + place or 64], bool(bits & 1))
            elif kind < 14:
                if pool.get(o, INDEXES[place], buffer):
                    number = NUMBERS.get(bytes(buffer))
                    demand(number and number % 64 == place, f"{place}: page {number} was never put here")
            else:
                pool.flush(o, INDEXES[place], 1)
        self.operations += BURST

    # Memory.

    def fill(self) -> None:
        """Put persistent pages until one is refused."""
        o = oid(self.rng.randrange(90, 99))
        for first in range(0, 20_000, BIG):
            if self._put_big(self.pools[0], o, first) < BIG:
                return

    def drop(self) -> None:
        for number in range(90, 99):
            self.pools[0].flush_object(oid(number))

    def put_ephemeral(self) -> None:
        self._put_big(self.pools[1], oid(5), self.rng.randrange(3000))

    def _put_big(self, pool: Pool, o: bytes, first: int) -> int:
        start = self.rng.randrange(len(ALL) // PAGE_SIZE - BIG) * PAGE_SIZE
        return pool.put(o, first, memoryview(ALL)[start : start + BIG * PAGE_SIZE], True)

    def come_and_go(self) -> None:
        """A pool of its own that lives for an instant: its leaves and its number are used again."""
        pool = self.filler.new_pool(bool(self.rng.getrandbits(1)))
        self._put_big(pool, oid(3), self.rng.randrange(10_000))
        pool.destroy()

    def evict(self) -> None:
        size_bytes = self.rng.randrange(1, 20) * CHUNK
        if self.rng.getrandbits(1):
            self.segment.evict(size_bytes)
        else:
            self.rng.choice(self.victims).evict(size_bytes)

    def give_back(self) -> None:
        self.segment.trim(self.rng.randrange(20) * CHUNK)
        self.segment.populate(self.rng.randrange(20) * CHUNK)
        self.segment.reap()

    # Settings of others.

    def set_cap(self) -> None:
        self.rng.choice(self.victims).cap_bytes = self.rng.choice((0, 0, 1, 1 << 20))

    def set_weight(self) -> None:
        self.rng.choice(self.victims).weight = self.rng.choice((0, 1, 100, 10_000))

    def set_floor(self) -> None:
        client = self.rng.choice(self.victims)
        try:
            client.floor_bytes = self.rng.choice((0, 0, 1 << 20, 1 << 40))
        except PoolError:
            demand(client.floor_bytes <= 1 << 20, "a floor that was refused is in force")

    def restrict(self) -> None:
        """Freeze a client or turn it off, or if one is restricted look what it did and turn it on again."""
        if self.restricted:
            self.restricted.end()
            self.restricted = None
            self.seen_frozen += 1
        else:
            mode = self.rng.choice(("frozen", "frozen", "off"))
            self.restricted = _Restriction.begin(self.rng.choice(self.victims), mode)

    def stop_all(self) -> None:
        """Restrict the whole segment for an instant. One process alone may do this."""
        if self.first:
            self.segment.mode = self.rng.choice(("frozen", "off"))
            if self.segment.mode == "off":
                pools = [pool for client in self.victims for pool in client.pools() if not pool.persistent]
                left = sum(pool.statistics()["pages"] for pool in pools)
                demand(left == 0, f"{left} ephemeral pages are left in a segment that is off")
            self.segment.mode = "on"


def work(segment: Segment, task: Task) -> Done:
    """Do a task, in whatever process."""
    trouble = _Trouble(segment, task)
    pools = [op.find(segment, lean.where) for lean in task.mine]
    before = sum(lean.operations for lean in task.mine)
    for burst in range(task.bursts):
        which = burst % len(pools)
        task.mine[which].run(pools[which], BURST)
        if burst % 5 == 4:
            trouble.act()
    trouble.end()
    operations = sum(lean.operations for lean in task.mine) - before + trouble.operations
    return Done(task.mine, operations, trouble.seen_frozen)


class Endurance:
    """One run: a segment, its processes, and all pools between the phases."""

    def __init__(self, segment: Segment, path: Path, workers: Sequence[Worker], seed: int) -> None:
        self.segment = segment
        self.workers = workers
        self.seed = seed
        self.phases = self.operations = self.frozen = 0
        self.seconds = 0.0
        self.growth = Growth()
        self.names = [f"client {i}" for i in range(2 * len(workers))]
        self.leans = {name: [self._pool(name, *kind) for kind in KINDS] for name in self.names}
        self.contended = [op.new_pool(segment, "everybody", *kind) for kind in KINDS]
        for number, worker in enumerate(workers):
            segment.client(f"sharer {number}").authorise(UUID)
            worker.attach(path)

    def _pool(self, name: str, persistent: bool, exclusive: bool | None) -> Lean:
        where = op.new_pool(self.segment, name, persistent, exclusive)
        taken = exclusive if exclusive is not None else not persistent
        return Lean(where, persistent, taken, f"{self.seed} {name} {where.pool}")

    def phase(self, bursts: int) -> None:
        """Let every process do so many bursts at once, then compare everything."""
        n = len(self.workers)
        # In each phase every process has two clients, other ones than before, and troubles its neighbour's.
        turn = [self.names[(i + self.phases) % (2 * n)] for i in range(2 * n)]
        shares = [turn[2 * i : 2 * i + 2] for i in range(n)]
        started = time.perf_counter()
        for number, worker in enumerate(self.workers):
            mine = [lean for name in shares[number] for lean in self.leans[name]]
            seed = f"{self.seed} {self.phases} {number}"
            worker.start(work, Task(number, seed, mine, shares[number - 1], self.contended, bursts))
        for number, worker in enumerate(self.workers):
            done = worker.finish(work)
            for i, name in enumerate(shares[number]):
                self.leans[name] = done.mine[i * len(KINDS) : (i + 1) * len(KINDS)]
            self.operations += done.operations
            self.frozen += done.frozen
        self.seconds += time.perf_counter() - started
        self.phases += 1
        self.compare()

    def compare(self) -> None:
        """While nobody works: the segment is sound, every counter is as the model has it, all add up."""
        demand(self.segment.reap() == 0, "a thread died")
        wrong = self.segment.check()
        demand(not wrong, "\n".join(wrong))
        for leans in self.leans.values():
            for lean in leans:
                lean.compare(op.statistics(self.segment, lean.where))
        for where in self.contended:
            check_identities(op.statistics(self.segment, where))
        check_sums(self.segment)
        self.growth.look(self.segment)
