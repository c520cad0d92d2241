"""The records that `_native.Exporter` writes, read by code that shares nothing with the core.

`read` yields what they say, `apply` does it to a dictionary of pages. An LZ4 block is decoded here in Python,
so also that the core's blocks are LZ4 blocks is shown. Pure functions: any thread.
"""

import struct
from collections.abc import Iterator

from tmem.types import OID_SIZE, PAGE_SIZE

from .model import Handle, demand

FILL, RAW, LZ4, ABSENT = range(4)
HEADER = struct.Struct(f"<{OID_SIZE}sIHBB")


def read(records: bytes) -> Iterator[tuple[Handle, bytes | None]]:
    """Yield handle and page of each record; None is a page that was flushed since it was exported."""
    at = 0
    while at < len(records):
        demand(at + HEADER.size <= len(records), f"a header is cut at {at}")
        oid, index, length, kind, zero = HEADER.unpack_from(records, at)
        at += HEADER.size
        payload = records[at : at + length]
        demand(len(payload) == length and zero == 0, f"a record is cut or malformed at {at}")
        at += length
        yield (oid, index), _page(kind, payload)


def _page(kind: int, payload: bytes) -> bytes | None:
    if kind == ABSENT:
        demand(not payload, "an absent page has bytes")
        return None
    if kind == FILL:
        demand(len(payload) == 8, f"a fill value of {len(payload)} bytes")
        return payload * (PAGE_SIZE // 8)
    page = payload if kind == RAW else unpack(payload)
    demand(kind in (RAW, LZ4) and len(page) == PAGE_SIZE, f"a page of kind {kind} and {len(page)} bytes")
    return page


def apply(pages: dict[Handle, bytes], records: bytes) -> set[Handle]:
    """Put into `pages` and flush from it what the records say; the handles that they name, none twice."""
    named: set[Handle] = set()
    for handle, page in read(records):
        demand(handle not in named, f"{handle} is exported twice in a round")
        named.add(handle)
        if page is None:
            pages.pop(handle, None)
        else:
            pages[handle] = page
    return named


def unpack(block: bytes) -> bytes:
    """Return what an LZ4 block stands for."""
    out, at = bytearray(), 0
    while True:
        token = block[at]
        literals, at = _length(block, at + 1, token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return bytes(out)
        distance = int.from_bytes(block[at : at + 2], "little")
        match, at = _length(block, at + 2, token & 15)
        match += 4
        demand(0 < distance <= len(out), "a match from before the beginning")
        source = out[-distance:]
        out += (source * (match // len(source) + 1))[:match]


def _length(block: bytes, at: int, first: int) -> tuple[int, int]:
    """Return a length that begins with four bits, and where what follows it begins."""
    if first == 15:
        while True:
            more = block[at]
            at += 1
            first += more
            if more < 255:
                break
    return first, at
