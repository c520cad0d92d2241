"""A tier in Valkey or Redis, one server or a cluster: demoted pages beyond this machine.

Every value (`redis_values`) has a number that was reserved by counting up a key of the identity before it was
written, so no two writers ever store under the same name, and whatever a dead writer still has in flight
(storing, shortening, removing) concerns names that are its own or records that are dead already. That key
outlives what it has counted by a day. Values are written once. When more than half of the records of one have
died it is written again without them (`SET ... XX`, so that one that was removed stays so), and removed with
its last one.

What is promised: `write` returns when the primary and as many replicas as are demanded have the batch in
memory. So it survives the loss of any one server of a shard, and with all replicas demanded (the default)
also the election of any replica. Not survived: the loss of a primary and its replicas at a time; a primary
that keeps nothing on disk and is *restarted* empty before the cluster has noticed its absence
(cluster-node-timeout), for then its replicas take over its emptiness.

The first `retain` of a writer looks through all keys of the servers for what earlier writers have left, a
second a million keys. Not for connections and repetitions: `redis_nodes`. Threading: as the contract says.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from tmem.backends import _native
from tmem.backends.tiers import redis_values as values
from tmem.backends.tiers.contract import TierIdentity, TierStatistics
from tmem.backends.tiers.redis_exchange import Command, Traffic
from tmem.backends.tiers.redis_fitness import Fitness
from tmem.backends.tiers.redis_nodes import Nodes, Running
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.backends.tiers.redis_wire import Word
from tmem.errors import TierDownError, TierError, TierFullError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_AT_ONCE = 256
"""How many values are read, or written again, at a time: 8 MiB. A batch is written in one go, so that it
waits for replicas once."""
_RESERVED = 1024
"""How many numbers are reserved at a time."""
_RUN = 8
"""How many values in a row go to one node: a small batch concerns one, and one of the manager's all."""
_SHORTENED = 256
"""How many values one `retain` writes again at most."""
_SCAN_COUNT = 1000
_COUNTER_S = 86400
"""How long the key that counts stays once everything else was removed."""
_KEPT = 8192
"""How many dead values, 256 MiB, are removed only as others are stored: the servers' allocator gives the same
memory to these. Of many that are removed at a time it gives the memory back to the system at once, and to get
it anew is a quarter of what servers do for a value (docs/benchmarks/tiers.md)."""
_SAMPLED = 256
"""How many values, the oldest that live, may be gone through for one of each node."""
_NEVER_RESERVED = 1 << 20
"""How far it counts on then, for a writer that reserves numbers at that moment."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisStatistics(TierStatistics):
    """What a tier in Redis tells besides."""

    values: int = 0
    """Values that hold the records."""
    shortened: int = 0
    """Values that were written again without their dead records."""
    server_used_bytes: int | None = None
    """What the primaries use, by everybody, when last asked (every half minute of writing)."""


@dataclass(eq=False, slots=True)
class _Value:
    """What a writer knows of a value."""

    size_bytes: int
    """0: it was named to us, and is not there."""
    present: int
    """How many records it was stored with."""
    live: int
    """A bit for each place whose record lives."""


class _Batch:
    """Values that are on their way: see `Writing`."""

    def __init__(self, tier: "RedisTier", numbers: list[int], room: bytearray) -> None:
        self._tier = tier
        self.numbers = numbers
        self.removed: list[int] = []
        """Dead values that are removed as these are stored."""
        self.locations: list[int] = []
        self.length = 0
        """Of its records."""
        self.running: Running | None = None
        self.room: bytearray | None = room
        """Where the values lie, as long as they may have to be sent again."""

    def end(self) -> list[int]:
        """See the contract."""
        self._tier._end(self)
        return self.locations

    def drop(self) -> None:
        """See the contract. What comes to the servers yet the next `retain` removes."""
        self._tier._drop(self)


class RedisTier:
    """The records of `identity` at `address`."""

    def __init__(
        self,
        address: RedisAddress,
        identity: TierIdentity,
        writer: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = Nodes(address)
        self._fitness = Fitness(self._nodes, clock)
        self._prefix = values.prefix(identity)
        self._writer = writer
        self._values: dict[int, _Value] | None = None  # until the first retain
        self._numbers: Iterator[int] = iter(())
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self._begun: set[_Batch] = set()
        self._room: bytearray | None = None  # of a batch that is over, for the next; None while none is begun
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._lost = False  # and told
        self._dead: deque[int] = deque()  # values that are removed as others are stored
        self._is_used = False  # some were, since somebody looked
        self._full = False  # something was refused for want of room, and nothing was forgotten since

    def check(self) -> None:
        """Raise TierDownError, with what to do, if pages should not be trusted to the servers now. What they
        have lost is told in the log, once."""
        with self._counting():
            self._fitness.look()
            if not self._lost:
                self._look_for_losses()
            if self._dead and not self._is_used:
                dead = list(self._dead)
                self._dead.clear()  # should this fail, the next retain finds them
                self._remove(dead)
            self._is_used = False

    def _look_for_losses(self) -> None:
        """See whether each node still has the first that we know of what it was given."""
        samples: dict[str, int] = {}
        known = (self._values or {}).items()
        there = (number for number, value in known if value.live and value.size_bytes)
        for number in islice(there, _SAMPLED):
            samples.setdefault(self._nodes.owner(values.key(self._prefix, number)), number)
        commands = [self._command("GETRANGE", number, 0, 0) for number in samples.values()]
        for node, head in zip(samples, self._nodes.run(commands), strict=True):
            if not head:
                self._lost = True
                _log.warning(
                    "%s has lost pages that it had taken: it, and its replicas, have been restarted without "
                    "data, or emptied; who reads one of them gets an error",
                    node,
                )

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        """See the contract. Also raises TierDownError while the servers are not fit (`redis_fitness`)."""
        return self.begin(records).end()

    def begin(self, records: Sequence["Buffer"]) -> "_Batch":
        """See the contract; otherwise as `write`."""
        known = self._known()
        with self._counting():
            if records:
                self._fitness.check()
            room, self._room = self._room, None
            stored = values.Packed(records, room)
            batch = _Batch(self, self._take(len(stored.sizes)), stored.room)
            for number, size_bytes, count in zip(batch.numbers, stored.sizes, stored.counts, strict=True):
                known[number] = _Value(size_bytes, count, 0)
                first = number << values.PLACE_BITS
                batch.locations.extend(range(first, first + count))
                batch.length += size_bytes - 1 - 2 * count
            sets = stored.sets(self._prefix, batch.numbers)
            commands: list[Command] = []
            for run in values.neighbours(batch.numbers):
                batch.removed += (dead := self._next_dead(run.stop - run.start))
                commands += self._several("UNLINK", dead, values.unlinks(self._prefix, dead))
                commands += self._several("SET", batch.numbers[run], sets[run])
            batch.running = self._nodes.begin(commands, self._traffic, replicated=True)
            self._begun.add(batch)
            return batch

    def _end(self, batch: "_Batch") -> None:
        """Wait until the values of a batch are stored."""
        assert batch.running is not None
        try:
            with self._counting():
                batch.running.end()
        except TierFullError:
            with contextlib.suppress(TierError):  # else the next retain does it
                self._remove(batch.numbers)
            raise
        finally:
            self._is_over(batch)
        known = self._known()
        for number in batch.removed:
            known.pop(number, None)
        for number in batch.numbers:
            known[number].live = (1 << known[number].present) - 1
        self._count(written_records=len(batch.locations), written_bytes=batch.length)

    def _drop(self, batch: "_Batch") -> None:
        if batch.running is not None:
            batch.running.drop()
        self._is_over(batch)

    def _is_over(self, batch: "_Batch") -> None:
        """Nothing of the batch is sent any more: another may have its room, if one is on its way, for fresh
        memory would cost page faults."""
        self._begun.discard(batch)
        self._room = batch.room if self._begun else None
        batch.room = None

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        """See the contract."""
        with self._counting():
            return self._read(locations)

    def _read(self, locations: Sequence[int]) -> list[bytes | None]:
        wanted: dict[int, list[tuple[int, int, int]]] = {}
        for at, number, place, count in _native.runs(list(locations), values.MAX_RECORDS):
            wanted.setdefault(number, []).append((at, place, count))
        found: list[bytes | None] = [None] * len(locations)
        there = length = 0
        for number, (records, size_bytes, sparse) in self._fetch(list(wanted)):
            for at, place, count in wanted[number]:
                some = records[place : place + count]
                found[at : at + len(some)] = some
                there += len(some) - (some.count(None) if sparse else 0)
                length += size_bytes if len(some) == len(records) else sum(map(len, filter(None, some)))
        self._count(read_records=there, read_bytes=length, missing=len(found) - there)
        return found

    def retain(self, live: Sequence[int]) -> None:
        """See the contract."""
        assert not self._begun, "a batch is on its way, which nobody names yet"
        with self._counting():
            self._retain(live)

    def _retain(self, live: Sequence[int]) -> None:
        self._dead.clear()  # should this fail, the next call finds them
        masks: dict[int, int] = {}
        for location in live:
            number, place = divmod(location, values.MAX_RECORDS)
            masks[number] = masks.get(number, 0) | 1 << place
        known = self._values
        if known is None:
            known = self._survey(masks)
            self._values = known
        for number, value in known.items():
            value.live = masks.get(number, 0)
        for number in masks.keys() - known.keys():
            known[number] = _Value(0, 0, masks[number])  # nobody may be given it
        dead = [number for number in known if number not in masks]
        kept = 0 if self._full else _KEPT
        self._remove(dead[kept:])
        self._dead, self._full = deque(dead[:kept]), False
        self._shorten()

    def statistics(self) -> RedisStatistics:
        """See the contract."""
        known = list((self._values or {}).values())
        memory = self._fitness.memory
        kept = [value for value in known if value.size_bytes]
        with self._lock:
            return RedisStatistics(
                records=sum(value.live.bit_count() for value in kept),
                used_bytes=sum(value.size_bytes for value in kept) + len(kept) * values.KEY_OVERHEAD_BYTES,
                capacity_bytes=memory.maximum_bytes if memory else None,
                free_bytes=memory.free_bytes if memory else None,
                server_used_bytes=memory.used_bytes if memory else None,
                values=len(kept),
                **self._counts,
            )

    def destroy(self) -> None:
        """See the contract."""
        counter = values.counter_key(self._prefix)
        with self._counting():
            for names in self._scan():
                self._nodes.run([Command(name, ("UNLINK", name)) for name in names if name != counter])
            # An identity may be given a tier again, while what a writer has sent before is still on its way.
            [counted] = self._nodes.run([Command(counter, ("GET", counter))])
            if counted is not None:
                beyond = int(counted) + _NEVER_RESERVED
                with contextlib.suppress(TierFullError):  # then it stays as it is
                    self._nodes.run([Command(counter, ("SET", counter, beyond, "EX", _COUNTER_S))])
        self._values = None
        self.close()

    def close(self) -> None:
        """See the contract."""
        self._nodes.close()

    # What follows is the writer's, but for _fetch.

    def _known(self) -> dict[int, _Value]:
        assert self._writer, "opened for reading only"
        assert self._values is not None, "retain comes before the first write"
        return self._values

    def _take(self, count: int) -> list[int]:
        """Return numbers that no value has had, or, after all were given, that no value has."""
        taken: list[int] = []
        known = self._known()
        while len(taken) < count:
            number = next(self._numbers, None)
            if number is None:
                name = values.counter_key(self._prefix)
                [end] = self._nodes.run([Command(name, ("INCRBY", name, _RESERVED))], replicated=True)
                reserved = [raw % values.MAX_NUMBER + 1 for raw in range(end - _RESERVED, end)]
                self._numbers = iter(self._spread(reserved))
            elif number not in known:
                taken.append(number)
        return taken

    def _spread(self, numbers: Sequence[int]) -> list[int]:
        """Return them in an order in which every batch gives all nodes the same to do. As they come, half of
        a batch's values would be one of three nodes'."""
        of_node: dict[str, list[Sequence[int]]] = {}
        for start in range(0, len(numbers), _RUN):
            run = numbers[start : start + _RUN]
            node = self._nodes.owner(values.key(self._prefix, run[0]))
            of_node.setdefault(node, []).append(run)
        turns = zip_longest(*of_node.values(), fillvalue=())
        return [number for turn in turns for run in turn for number in run]

    def _remove(self, numbers: Sequence[int]) -> None:
        known = self._known()
        for start in range(0, len(numbers), _AT_ONCE * 8):
            chunk = numbers[start : start + _AT_ONCE * 8]
            self._nodes.run(self._several("UNLINK", chunk, values.unlinks(self._prefix, chunk)))
            for number in chunk:
                known.pop(number, None)

    def _shorten(self) -> None:
        """Write values of which at most half the records live again, without the others."""
        known = self._known()
        sparse = [n for n, value in known.items() if 0 < value.live.bit_count() * 2 <= value.present]
        for start in range(0, min(len(sparse), _SHORTENED), _AT_ONCE):
            commands, changes = [], []
            for number, (records, _, _) in self._fetch(sparse[start : start + _AT_ONCE]):
                live = known[number].live
                kept = [
                    record if record and live >> place & 1 else b"" for place, record in enumerate(records)
                ]
                while kept and not kept[-1]:
                    kept.pop()
                value = values.pack(kept)
                commands.append(self._command("SET", number, value, "XX"))
                changes.append((number, len(value), live.bit_count()))
            try:
                self._nodes.run(commands, replicated=True)
            except TierFullError:  # of what others store: those values stay as they are
                self._full = True
                return
            for number, size_bytes, present in changes:
                known[number].size_bytes, known[number].present = size_bytes, present
            self._count(shortened=len(changes))

    def _survey(self, masks: dict[int, int]) -> dict[int, _Value]:
        """Return what is stored, and remove what nobody names."""
        there: list[int] = []
        for names in self._scan():
            unnamed = []
            for name in names:
                number = values.number_of(self._prefix, name)
                if number in masks:
                    there.append(number)
                elif number is not None:
                    unnamed.append(number)
            self._nodes.run([self._command("UNLINK", number) for number in unnamed])
        known: dict[int, _Value] = {}
        for start in range(0, len(there), _AT_ONCE * 8):
            chunk = there[start : start + _AT_ONCE * 8]
            heads = self._nodes.run([self._command("GETRANGE", n, 0, values.HEADER_BYTES - 1) for n in chunk])
            for number, head in zip(chunk, heads, strict=True):
                lengths = values.lengths(head)
                size_bytes = 1 + 2 * len(lengths) + sum(lengths)
                known[number] = _Value(size_bytes, len(lengths) - lengths.count(0), 0)
        return known

    def _scan(self) -> Iterator[list[bytes]]:
        """Yield the keys of this identity, some perhaps twice."""
        for node in self._nodes.primaries():
            cursor = b"0"
            while True:
                cursor, names = self._nodes.ask(
                    node, "SCAN", cursor, "MATCH", self._prefix + "*", "COUNT", _SCAN_COUNT
                )
                yield names
                if cursor == b"0":
                    break

    def _fetch(self, numbers: Sequence[int]) -> Iterator[tuple[int, tuple[list[bytes | None], int, bool]]]:
        """Yield the records of each of these values that is there."""
        for start in range(0, len(numbers), _AT_ONCE):
            chunk = numbers[start : start + _AT_ONCE]
            commands = [self._command("GET", number) for number in chunk]
            stored = self._nodes.run(commands, anywhere=True, taken=values.unpack)
            for number, records in zip(chunk, stored, strict=True):
                if records is not None:
                    yield number, records

    def _next_dead(self, count: int) -> list[int]:
        """Return up to so many dead values, to be removed before others are stored."""
        self._is_used = self._is_used or bool(self._dead)
        return [self._dead.popleft() for _ in range(min(count, len(self._dead)))]

    def _several(
        self, verb: str, numbers: Sequence[int], sent: Sequence[bytes | memoryview]
    ) -> list[Command]:
        """Return a command for each run of values in one slot; `sent` has what is sent for each value."""
        return [
            Command(values.key(self._prefix, numbers[run.start]), (verb,), sent[run])
            for run in values.neighbours(numbers)
        ]

    def _command(self, verb: str, number: int, *arguments: Word) -> Command:
        name = values.key(self._prefix, number)
        return Command(name, (verb, name, *arguments))

    # Counting.

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except TierDownError:
            self._count(failures=1)
            raise
        except TierFullError:
            self._full = True
            self._count(refused=1)
            raise

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number


_COUNTS = (
    "written_records",
    "written_bytes",
    "read_records",
    "read_bytes",
    "failures",
    "refused",
    "missing",
    "shortened",
)
