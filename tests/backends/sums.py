"""What must hold between the counters of a segment, its clients and its pools, while nobody works on it.

`check_sums` looks at one moment; `Growth` at several: what only counts up never falls, and a maximum is never
below what it is the maximum of. Both raise `model.Violation`. They go by the segment alone, without a model.
"""

from collections.abc import Mapping, Sequence

from tmem.backends._native import Client, Pool, Segment
from tmem.errors import PoolError

from .model import demand

CHUNK = 65536
SEGMENT_GROWS = frozenset(
    {"pages_max", "ephemeral_pages_max", "objects_max", "nodes_max", "chunks_used_max"}
) | {
    *("operations", "failed_operations", "ephemeral_puts_new", "allocation_failures", "evicted_pages"),
    *("eviction_attempts", "evictions_per_request_max", "trims", "trimmed_bytes", "relocated_pages"),
    *("compacted_bytes", "shrinks"),
    *("squeezed_pages", "squeezed_bytes", "condensed_pages", "condensed_bytes", "restored_pages"),
    *("condensing_ns", "restored_bytes", "squeezing_ns", "compacting_ns", "dedup_pages", "dedup_ns"),
    *("pages_packed", "pages_unpacked", "packing_ns"),
    "dead_threads_repaired",
}
CLIENT_GROWS = frozenset({"ephemeral_pages_max", "allocation_failures", "persistent_puts_stored"}) | {
    *("persistent_gets_hit", "ephemeral_gets_hit", "busy_ns"),
}
POOL_GROWS = frozenset({"pages_max", "objects_max", "nodes_max", "puts", "puts_stored", "puts_refused"}) | {
    *("puts_replaced", "puts_flushed", "gets", "gets_hit", "gets_taken", "flushes", "flushes_found"),
    *("object_flushes", "object_flushes_found", "evictions", "corrupt_pages", "pages_dropped"),
}
MAXIMA = ("pages", "ephemeral_pages", "objects", "nodes")

Counters = Mapping[str, int]


def pools_of(segment: Segment) -> list[Pool]:
    """Return every pool once, also those that several clients share."""
    return [pool for client in segment.clients() for pool in client.pools() if pool.sharers[0] == client]


def total(counters: Sequence[Counters], key: str, persistent: bool | None = None) -> int:
    """Return the sum of a counter over all, or over the persistent or ephemeral ones of these pools."""
    return sum(c[key] for c in counters if persistent is None or bool(c["persistent"]) is persistent)


def check_sums(segment: Segment) -> None:
    """Compare the counters of the segment, its clients and its pools with each other."""
    s = segment.statistics()
    pools = [(pool.owner, pool.statistics()) for pool in pools_of(segment)]
    counters = [p for _, p in pools]
    clients = [(client, client.statistics()) for client in segment.clients()]
    _equal(
        "segment",
        s,
        persistent_pages=total(counters, "pages", True),
        ephemeral_pages=total(counters, "pages", False),
        fill_pages=total(counters, "fill_pages"),
        tier_pages=sum(c["tier_pages"] for _, c in clients),
        twin_pages=total(counters, "twin_pages"),
        original_pages=sum(c["original_pages"] for _, c in clients),
        packed_pages=total(counters, "packed_pages"),
        packs=sum(c["packs"] for _, c in clients),
        pack_bytes=sum(c["pack_bytes"] for _, c in clients),
        objects=total(counters, "objects"),
        nodes=total(counters, "nodes"),
        compressed_bytes=sum(c["compressed_bytes"] for _, c in clients),
    )
    demand(s["used_bytes"] <= s["memory_bytes"], f"more memory than there is: {s}")
    demand(s["metadata_bytes"] <= s["used_bytes"], f"more index than memory: {s}")
    demand(s["chunks_used"] + s["chunks_free"] == s["chunks_total"], f"chunks do not add up: {s}")
    offered = sum(c[key] for c in counters for key in ("puts", "gets", "flushes", "object_flushes"))
    demand(s["operations"] >= offered, f"{s['operations']} operations, the pools have {offered}")
    new = total(counters, "puts_stored", False) - total(counters, "puts_replaced", False)
    demand(s["ephemeral_puts_new"] >= new, f"{s['ephemeral_puts_new']} new ephemeral pages, not {new}")
    evicted = total(counters, "evictions")
    demand(s["evicted_pages"] >= evicted, f"{s['evicted_pages']} pages evicted, not {evicted}")
    ephemeral = sum(c["ephemeral_bytes"] for _, c in clients)
    demand(ephemeral <= s["chunks_used"] * CHUNK, f"{ephemeral} bytes of ephemeral chunks: {s}")
    for client, c in clients:
        _check_client(client, c, [p for owner, p in pools if owner == client])
    _check_maxima("segment", s)
    for _, p in pools:
        _check_maxima(f"pool {p['id']}", p)


def _check_client(client: Client, c: Counters, owned: Sequence[Counters]) -> None:
    _equal(
        f"client {client.name}",
        c,
        used_bytes=total(owned, "bytes") + c["original_bytes"] + c["pack_bytes"],
        persistent_pages=total(owned, "pages", True),
        ephemeral_pages=total(owned, "pages", False),
        compressed_pages=total(owned, "compressed_pages"),
        raw_pages=total(owned, "raw_pages"),
        twin_pages=total(owned, "twin_pages"),
        packed_pages=total(owned, "packed_pages"),
        pools=len(client.pools()),
        authorised_pools=len(client.authorised()),
        cap_bytes=client.cap_bytes,
        floor_bytes=client.floor_bytes,
        weight=client.weight,
        held=client.held,
    )
    originals = c["tier_pages"] - total(owned, "tier_pages")
    demand(0 <= originals <= c["original_pages"], f"{client.name} has {originals} originals in its tier: {c}")
    stored = total(owned, "puts_stored", True)
    demand(c["persistent_puts_stored"] >= stored, f"{client.name} has put {stored} pages: {c}")
    hits = total(owned, "gets_hit", True)
    demand(c["persistent_gets_hit"] >= hits, f"{client.name} has got {hits} pages: {c}")
    demand(c["ephemeral_bytes"] % CHUNK == 0, f"{client.name} has no whole chunks: {c}")
    # Weights divide chunks; what is in them is no more than they are.
    inside = total(owned, "bytes", False)
    demand(inside <= c["ephemeral_bytes"], f"{client.name} has {inside} bytes of ephemeral pages in {c}")
    _check_maxima(f"client {client.name}", c)


def _equal(who: str, counters: Counters, **expected: int) -> None:
    wrong = {key: (counters[key], value) for key, value in expected.items() if counters[key] != value}
    demand(not wrong, f"{who}: (counted, expected) {wrong}")


def _check_maxima(who: str, counters: Counters) -> None:
    for key in MAXIMA:
        most = counters.get(f"{key}_max")
        if most is not None and key in counters:
            demand(most >= counters[key], f"{who}: {key} is {counters[key]}, above its maximum of {most}")


class Growth:
    """Remembers what only counts up, and compares the next time, for as long as a client or pool lives."""

    def __init__(self) -> None:
        self._segment: Counters = {}
        self._clients: list[tuple[Client, Counters]] = []
        self._pools: list[tuple[Pool, Counters]] = []

    def look(self, segment: Segment) -> None:
        """Compare with the last look."""
        s = segment.statistics()
        _grown("segment", SEGMENT_GROWS, self._segment, s)
        for client, before in self._clients:
            try:
                _grown("client", CLIENT_GROWS, before, client.statistics())
            except PoolError:
                continue  # destroyed since
        for pool, before in self._pools:
            if pool.alive:
                _grown("pool", POOL_GROWS, before, pool.statistics())
        self._segment = s
        self._clients = [(client, client.statistics()) for client in segment.clients()]
        self._pools = [(pool, pool.statistics()) for pool in pools_of(segment)]


def _grown(who: str, keys: frozenset[str], before: Counters, now: Counters) -> None:
    fallen = {key: (before[key], now[key]) for key in keys if before and now[key] < before[key]}
    demand(not fallen, f"{who}: counters fell {fallen}")
