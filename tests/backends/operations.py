"""The store's operations as plain functions of a segment, by names and numbers only.

So one and the same call can be made in this process or, through `places`, in another one. Every call looks
its client and pool up anew. Errors are the core's own. Any thread.
"""

from typing import NamedTuple

from tmem.backends._native import Pool, Segment
from tmem.types import PAGE_SIZE


class Where(NamedTuple):
    """A pool: its client's name and its id."""

    client: str
    pool: int


def find(segment: Segment, where: Where) -> Pool:
    return segment.client(where.client, create=False).pool(where.pool)


def new_client(segment: Segment, name: str) -> int:
    return segment.client(name).id


def destroy_client(segment: Segment, name: str) -> None:
    segment.client(name, create=False).destroy()


def set_cap(segment: Segment, name: str, cap_bytes: int) -> None:
    segment.client(name, create=False).cap_bytes = cap_bytes


def new_pool(segment: Segment, name: str, persistent: bool, exclusive: bool | None = None) -> Where:
    return Where(name, segment.client(name).new_pool(persistent, exclusive).id)


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


def evict(segment: Segment, size_bytes: int) -> int:
    return segment.evict(size_bytes)


def trim(segment: Segment, keep_bytes: int) -> int:
    return segment.trim(keep_bytes)


def populate(segment: Segment, size_bytes: int) -> int:
    return segment.populate(size_bytes)


def reap(segment: Segment) -> int:
    return segment.reap()
