"""Two looks at a segment, and what happened between them: rates, hit ratios, quantiles.

Pure of any output; ``tmem top`` draws it. A counter that is smaller than before is of something that ended
and came again under its name: its rate is unknown then. Threading: for the thread that attached the segment.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends.pressure import figures
from tmem.backends.statistics import PoolStatistics, SegmentStatistics, Timing
from tmem.cli.clients import state_of
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends._native import Segment

PoolKey = tuple[str, int]
"""A client's name and the number of its pool; -1 for a client that has none."""


@dataclass(frozen=True)
class PoolLook:
    """One pool at one moment."""

    state: str
    """What its client may do, where its handoff stands, or "unserved"."""
    kind: str
    """``persistent``, ``ephemeral``, ``shared``, or ``-`` for a client without a pool."""
    counts: PoolStatistics | None
    """None for a client without a pool."""
    paid: bool = True
    """Whether the client pays for it: of a shared pool one of its sharers does, and sums take that one."""


@dataclass(frozen=True)
class Look:
    """A segment at one moment."""

    at_ns: int
    """Monotonic."""
    mode: str
    memory: SegmentStatistics
    freeable_bytes: int
    timing: dict[str, Timing]
    pools: dict[PoolKey, PoolLook]
    times: dict[str, tuple[str, dict[str, Timing]]] = field(default_factory=dict)
    """The state of each client, and how long its operations take."""


def take(segment: "Segment", clock_ns: Callable[[], int]) -> Look:
    """Look at the segment now."""
    pools: dict[PoolKey, PoolLook] = {}
    times: dict[str, tuple[str, dict[str, Timing]]] = {}
    mode = segment.mode
    for client in segment.clients():
        with suppress(PoolError):  # it ended while we looked
            name, state, found = client.name, state_of(client, mode), client.pools()
            times[name] = state, {kind: Timing(*values) for kind, values in client.timing().items()}
            for pool in found:
                counts = PoolStatistics.from_dict(pool.statistics())
                kind = "shared" if counts.shared else "persistent" if counts.persistent else "ephemeral"
                pools[name, counts.id] = PoolLook(state, kind, counts, pool.owner == client)
            if not found:
                pools[name, -1] = PoolLook(state, "-", None)
    return Look(
        clock_ns(),
        mode,
        SegmentStatistics.from_dict(segment.statistics()),
        segment.freeable_bytes(),
        {name: Timing(*values) for name, values in segment.timing().items()},
        pools,
        times,
    )


@dataclass(frozen=True)
class Row:
    """One pool over a while; None for what is not known or makes no sense."""

    name: str
    """The client's."""
    state: str
    kind: str
    data_bytes: int = 0
    """Its pages, uncompressed."""
    memory_bytes: int = 0
    ratio: float | None = None
    puts_per_s: float | None = None
    gets_per_s: float | None = None
    hit_share: float | None = None
    evictions_per_s: float | None = None
    refused_per_s: float | None = None

    @property
    def trouble(self) -> bool:
        """Whether pages were refused."""
        return bool(self.refused_per_s)


@dataclass(frozen=True)
class ClientRow:
    """How long the operations of one client took over a while."""

    name: str
    state: str
    puts_per_s: float | None
    gets_per_s: float | None
    put_ns: tuple[float | None, ...]
    """Of `SHARES`, None where nothing was sampled; of puts that were stored,"""
    get_ns: tuple[float | None, ...]
    """of gets that hit,"""
    missed_ns: tuple[float | None, ...]
    """and of those that did not."""
    trouble: bool = False
    """Whether pages were refused."""


@dataclass(frozen=True)
class Operation:
    """One kind of operation over a while."""

    per_s: float | None
    """How many there were; None: their times only are known."""
    quantiles_ns: tuple[float | None, ...]
    """Of `SHARES`, None where nothing was sampled."""


SHARES = (0.5, 0.99, 0.999)


@dataclass(frozen=True)
class Pressure:
    """What waits on this machine: shares in percent over the last ten seconds; empty without PSI."""

    some: dict[str, float] = field(default_factory=dict)
    """By ``memory``, ``io``, ``cpu``: somebody waited."""
    full: dict[str, float] = field(default_factory=dict)
    """Nobody could go on."""
    swapped_in: int = 0
    """Pages since the machine was started."""
    swapped_out: int = 0


def rows(before: Look, now: Look) -> list[Row]:
    """Return one row a pool, in the order of the names."""
    seconds = (now.at_ns - before.at_ns) / 1e9
    found = []
    for (client, number), look in sorted(now.pools.items()):
        counts, past = look.counts, before.pools.get((client, number))
        if counts is None:
            found.append(Row(client, look.state, look.kind))
            continue
        then = past.counts if past is not None and past.kind == look.kind else None

        def since(
            name: str, counts: PoolStatistics = counts, then: PoolStatistics | None = then
        ) -> int | None:
            number = getattr(counts, name) - getattr(then, name) if then is not None else -1
            return number if number >= 0 else None

        gets, hits = since("gets"), since("gets_hit")
        data = counts.pages * PAGE_SIZE
        found.append(
            Row(
                client,
                look.state,
                look.kind,
                data,
                counts.bytes,
                data / counts.bytes if counts.bytes else None,
                _per_s(since("puts"), seconds),
                _per_s(gets, seconds),
                hits / gets if gets and hits is not None else None,
                _per_s(since("evictions"), seconds),
                _per_s(since("puts_refused"), seconds),
            )
        )
    return found


def clients(before: Look, now: Look) -> list[ClientRow]:
    """Return one row a client, in the order of the names."""
    pools: dict[str, list[Row]] = {}
    for row in rows(before, now):
        pools.setdefault(row.name, []).append(row)

    def total(name: str, what: str) -> float | None:
        numbers = [getattr(row, what) for row in pools.get(name, ())]
        known = [number for number in numbers if number is not None]
        return sum(known) if known else None

    found = []
    for name, (state, timings) in sorted(now.times.items()):
        _, past = before.times.get(name, (state, timings))
        quantiles = {}
        for kind, timing in timings.items():
            some = timing.since(past[kind])
            # Fewer than before: another client has come under the name.
            fair = min(some.samples, *some.buckets) >= 0
            quantiles[kind] = tuple((some if fair else timing).quantile_ns(share) for share in SHARES)
        puts, gets, refused = (total(name, f"{what}_per_s") for what in ("puts", "gets", "refused"))
        put_ns, get_ns, missed_ns = (quantiles[kind] for kind in ("put_stored", "get_hit", "get_missed"))
        found.append(ClientRow(name, state, puts, gets, put_ns, get_ns, missed_ns, bool(refused)))
    return found


def operations(before: Look, now: Look) -> dict[str, Operation]:
    """Return rates and times of each kind of operation, under the names of `Segment.timing`.

    Rates are those of the pools' counters, as far as these tell the kinds apart.
    """
    seconds = (now.at_ns - before.at_ns) / 1e9
    sums = {
        "put_stored": "puts_stored",
        "put_refused": "puts_refused",
        "get_hit": "gets_hit",
        "flush": "flushes",
    }
    found = {}
    for name, timing in now.timing.items():
        some = timing.since(before.timing[name])
        found[name] = Operation(
            _per_s(_sum(before, now, sums[name]), seconds) if name in sums else None,
            tuple(some.quantile_ns(share) for share in SHARES),
        )
    gets, hits = _sum(before, now, "gets"), _sum(before, now, "gets_hit")
    if "get_missed" in found:
        missed = Operation(_per_s(max(gets - hits, 0), seconds), found["get_missed"].quantiles_ns)
        found["get_missed"] = missed
    return found


def pressure(proc: Path = Path("/proc")) -> Pressure:
    """Read what the kernel says of this machine."""
    some: dict[str, float] = {}
    full: dict[str, float] = {}
    for name in ("cpu", "memory", "io"):
        for kind, values in figures(proc / "pressure" / name).items():
            (some if kind == "some" else full)[name] = values["avg10"]
    counts = dict(line.split() for line in (proc / "vmstat").read_text(encoding="ascii").splitlines())
    return Pressure(some, full, int(counts.get("pswpin", 0)), int(counts.get("pswpout", 0)))


def _sum(before: Look, now: Look, name: str) -> int:
    """Return what a counter of all pools has gained; shared pools count once, pools that came newly whole."""
    total = 0
    for key, look in now.pools.items():
        if look.counts is None or not look.paid:
            continue
        past = before.pools.get(key)
        then = getattr(past.counts, name) if past is not None and past.counts is not None else 0
        total += max(getattr(look.counts, name) - then, 0)
    return total


def _per_s(number: int | None, seconds: float) -> float | None:
    return None if number is None or seconds <= 0 else number / seconds
