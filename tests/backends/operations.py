"""The store's operations as plain functions of a segment, by names and numbers only.

So one and the same call can be made in this process or, through `places`, in another one. Every call looks
its client and pool up anew. Errors are the core's own. Any thread.
"""

from typing import NamedTuple

from tmem.backends._native import Pool, Segment
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from .pages import oid, pages


class Where(NamedTuple):
    """A pool: its client's name and its id."""

    client: str
    pool: int


def find(segment: Segment, where: Where) -> Pool:
    return segment.client(where.client, create=False).pool(where.pool)


def page_at(pool: Pool, index: int, o: bytes = oid(1)) -> bytes | None:
    """Get one page."""
    buffer = bytearray(PAGE_SIZE)
    return bytes(buffer) if pool.get(o, index, buffer) else None


def fill(pool: Pool, kind: str = "random", o: bytes = oid(900), npages: int = 6000) -> int:
    """Put pages until one is refused; the number stored."""
    return pool.put(o, 0, b"".join(pages(kind, 10_000, npages)), keep_old=True)


def new_client(segment: Segment, name: str) -> int:
    return segment.client(name).id


def destroy_client(segment: Segment, name: str) -> None:
    segment.client(name, create=False).destroy()


def set_cap(segment: Segment, name: str, cap_bytes: int) -> None:
    segment.client(name, create=False).cap_bytes = cap_bytes


def set_floor(segment: Segment, name: str, floor_bytes: int) -> None:
    segment.client(name, create=False).floor_bytes = floor_bytes


def set_weight(segment: Segment, name: str, weight: int) -> None:
    segment.client(name, create=False).weight = weight


def set_compress(segment: Segment, name: str, compress: str) -> None:
    segment.client(name, create=False).compress = compress


def set_mode(segment: Segment, name: str | None, mode: str) -> None:
    """Set the mode of a client, or without a name of the segment."""
    (segment if name is None else segment.client(name, create=False)).mode = mode


def authorise(segment: Segment, name: str, uuid: bytes) -> None:
    segment.client(name).authorise(uuid)


def revoke(segment: Segment, name: str, uuid: bytes) -> bool:
    return segment.client(name, create=False).revoke(uuid)


def settings(segment: Segment, name: str) -> tuple[int, int, int, str, str, str, list[bytes]]:
    """Return cap, floor, weight, compression, mode, phase and authorisations of a client."""
    c = segment.client(name, create=False)
    return c.cap_bytes, c.floor_bytes, c.weight, c.compress, c.mode, c.phase, sorted(c.authorised())


def new_pool(segment: Segment, name: str, persistent: bool, exclusive: bool | None = None) -> Where:
    return Where(name, segment.client(name).new_pool(persistent, exclusive).id)


def share(segment: Segment, name: str, uuid: bytes) -> Where:
    """Join the shared pool `uuid`, or create it."""
    return Where(name, segment.client(name).new_pool(False, uuid=uuid).id)


def owner(segment: Segment, where: Where) -> tuple[str, list[str]]:
    """Return the names of the pool's owner and sharers."""
    pool = find(segment, where)
    return pool.owner.name, [client.name for client in pool.sharers]


def destroy_pool(segment: Segment, where: Where) -> None:
    find(segment, where).destroy()


def put(segment: Segment, where: Where, oid: bytes, index: int, data: bytes, keep_old: bool = False) -> int:
    return find(segment, where).put(oid, index, data, keep_old=keep_old)


def get(segment: Segment, where: Where, oid: bytes, index: int, npages: int = 1) -> list[bytes]:
    """Return the pages that came. What lies behind them in the buffer must be as it was."""
    buffer = bytearray(b"\xa5" * (npages * PAGE_SIZE))
    filled = find(segment, where).get(oid, index, buffer)
    assert buffer.count(b"\xa5", (filled + 1) * PAGE_SIZE) == max(0, npages - filled - 1) * PAGE_SIZE
    return [bytes(buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) for i in range(filled)]


def flush(segment: Segment, where: Where, oid: bytes, index: int, npages: int = 1) -> int:
    return find(segment, where).flush(oid, index, npages)


def flush_object(segment: Segment, where: Where, oid: bytes) -> int:
    return find(segment, where).flush_object(oid)


def present(segment: Segment, where: Where, oid: bytes, index: int, npages: int) -> list[tuple[int, int]]:
    return find(segment, where).present(oid, index, npages)


def statistics(segment: Segment, where: Where) -> dict[str, int]:
    return find(segment, where).statistics()


def hold(segment: Segment, name: str) -> None:
    segment.client(name, create=False).hold()


def handoff(segment: Segment, name: str, step: str) -> None:
    segment.client(name, create=False).handoff(step)


def export(segment: Segment, where: Where, changes: bool, buffer_bytes: int) -> bytes:
    """Return all records of a pool, or those that are new, read in pieces of at most `buffer_bytes`."""
    exporter, buffer, records = find(segment, where).export(changes), bytearray(buffer_bytes), b""
    while filled := exporter.fill(buffer):
        records += buffer[:filled]
    return records


def restore(
    segment: Segment, name: str, pools: list[tuple[int, bool, bytes]], commit: bool
) -> dict[int, int] | None:
    """Make a client from ids, exclusiveness and records of persistent pools; None if there is no room for it.

    Returns the pages that each pool has then. Without `commit` the client is destroyed again.
    """
    client = segment.stage(name)
    try:
        made = [(client.new_pool(True, exclusive, id=id), records) for id, exclusive, records in pools]
        for pool, records in made:
            pool.import_records(records)
    except PoolError:
        client.destroy()
        return None
    assert name not in [other.name for other in segment.clients()]
    pages = {pool.id: pool.statistics()["pages"] for pool, _ in made}
    if commit:
        assert segment.commit() == 1
    else:
        client.destroy()
    return pages


def evict(segment: Segment, size_bytes: int) -> int:
    return segment.evict(size_bytes)


def evict_client(segment: Segment, name: str, size_bytes: int) -> int:
    return segment.client(name, create=False).evict(size_bytes)


def trim(segment: Segment, keep_bytes: int) -> int:
    return segment.trim(keep_bytes)


def populate(segment: Segment, size_bytes: int) -> int:
    return segment.populate(size_bytes)


def set_limits(segment: Segment, limit_bytes: int, persistent_bytes: int) -> int:
    return segment.set_limits(limit_bytes, persistent_bytes)


def shrink(segment: Segment, keep_bytes: int, hard: bool) -> int:
    return segment.shrink(keep_bytes, hard)


def condense(segment: Segment, warm: bool, loose: bool, level: int = 3) -> bool:
    """Visit all chunks; whether they were all visited."""
    segment.condense_level = level
    after, *_ = segment.condense(0, 10**9, persistent=True, ephemeral=True, loose=loose, warm=warm)
    return after == 0


def set_dedup(segment: Segment, name: str, dedup: bool) -> None:
    segment.client(name, create=False).dedup = dedup


def dedup(segment: Segment, warm: bool) -> bool:
    """Look at all pages; whether they were all looked at."""
    return segment.dedup(0, 10**9, warm=warm)[0] == 0


def pack(segment: Segment, warm: bool) -> bool:
    """Look at all groups of neighbours; whether they were all looked at."""
    segment.packing = True
    return segment.pack(0, 10**9, warm=warm)[0] == 0


def unpack(segment: Segment) -> bool:
    """Look at all packs; whether they were all looked at."""
    return segment.unpack(0, 10**9)[0] == 0


def compact(segment: Segment, holes: int) -> int:
    return segment.compact(holes, 10**9)


def reap(segment: Segment) -> int:
    return segment.reap()
