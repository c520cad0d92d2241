"""Pages of every kind that the codec tells apart, made from small numbers, so that a failure can be repeated.

`page(kind, seed)` always returns the same 4096 bytes. `stamped(tag)` returns a page that can be recognised
again: `stamp_of` proves that all of its bytes belong together. Pure functions: any thread.
"""

import random
import struct
from functools import lru_cache

from tmem.types import PAGE_SIZE

KINDS = ("zero", "word32", "word64", "wide64", "text", "random", "near", "tail", "sparse")
"""Zeros; a repeated 32-bit word; 64-bit words that fit a slot and that do not; about 3:1; incompressible;
around the raw threshold; random with a zero tail; zeros but for one byte."""

ALIKE = "alike"
"""Half as large with zstd as with LZ4, and much as its neighbours: what is packed. Not one of `KINDS`."""

NEAR_FIRST, NEAR_SPAN = 3984, 64
"""Random bytes in a page of kind ``near``: with zeros behind, LZ4 makes 4032 of about 4008 of them."""


@lru_cache(maxsize=8192)
def page(kind: str, seed: int) -> bytes:
    """Return the page of `kind` number `seed`."""
    if kind == "zero":
        return bytes(PAGE_SIZE)
    if kind == "word32":
        return struct.pack("<I", seed * 2654435761 % 2**32) * (PAGE_SIZE // 4)
    if kind == "word64":
        return struct.pack("<Q", 2**32 + seed * 2654435761 % 2**32) * (PAGE_SIZE // 8)
    if kind == "wide64":
        return struct.pack("<Q", 2**63 + seed) * (PAGE_SIZE // 8)
    rng = random.Random(f"{kind} {seed}")
    if kind == "text":
        return (rng.randbytes(PAGE_SIZE // 3 + 1) * 3)[:PAGE_SIZE]
    if kind == "random":
        return rng.randbytes(PAGE_SIZE)
    if kind == "near":
        return rng.randbytes(NEAR_FIRST + seed % NEAR_SPAN).ljust(PAGE_SIZE, b"\0")
    if kind == ALIKE:
        shared = random.Random(seed // 8)
        return bytes(shared.choices(b"etaoins", k=2400) + rng.choices(b"etaoins", k=PAGE_SIZE - 2400))
    if kind == "tail":
        return rng.randbytes(rng.randrange(1, PAGE_SIZE)).ljust(PAGE_SIZE, b"\0")
    if kind == "sparse":
        at = rng.randrange(PAGE_SIZE)
        return bytes(at) + bytes([rng.randrange(1, 256)]) + bytes(PAGE_SIZE - 1 - at)
    raise ValueError(kind)


def pages(kind: str, seed: int, count: int) -> list[bytes]:
    """Return `count` pages from number `seed` on; of all kinds in turn if `kind` is ``mixed``."""
    return [page(KINDS[(seed + i) % len(KINDS)] if kind == "mixed" else kind, seed + i) for i in range(count)]


def stamped(tag: int) -> bytes:
    """Return a page that carries `tag` (64 bits) and whose every byte follows from it; sizes vary with it."""
    rng = random.Random(tag)
    return struct.pack("<Q", tag) + rng.randbytes(rng.choice((16, 1000, PAGE_SIZE - 8))).ljust(
        PAGE_SIZE - 8, b"t"
    )


def stamp_of(data: bytes) -> int:
    """Return the tag of a stamped page; fail if its bytes are not all of one page."""
    tag: int = struct.unpack_from("<Q", data)[0]
    assert data == stamped(tag), f"a mixture of pages, beginning like {tag:#x}"
    return tag


def oid(number: int) -> bytes:
    """Return an object id that differs from those of other numbers in one of its three words."""
    words = [0, 0, 0]
    words[number % 3] = number
    return struct.pack("<3Q", *words)
