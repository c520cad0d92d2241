"""Flipped bits in stored pages: a persistent one raises, an ephemeral one is a miss, never wrong bytes.

The bytes are changed in the file, behind the back of who has it mapped. Covered are headers and payloads of
blocks, and the slots that refer to them; the rest of the index and the tables have no checksums.
"""

import mmap
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import CorruptPageError
from tmem.types import PAGE_SIZE

from . import operations as op
from .conftest import SMALL_BYTES, flipped
from .pages import oid, page, pages

BLOCK_HEADER_BYTES = 16
OBJECT = oid(1)


@pytest.fixture
def segment(directory: Path) -> Iterator[_native.Segment]:
    """A segment that may be unsound at the end."""
    made = _native.create(str(directory / "segment"), SMALL_BYTES)
    yield made
    made.close()


def locate(path: Path, content: bytes) -> int:
    """Return the offset of `content` in the data of the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as bytes_:
        found = bytes_.find(content)
        assert found > 0, "the page is not in the file as it is"
        assert bytes_.find(content, found + 1) < 0
        return found


def small_pool(segment: _native.Segment, persistent: bool, compress: str = "lz4") -> _native.Pool:
    client = segment.client("a")
    client.compress = compress
    return client.new_pool(persistent, exclusive=False)


def places(kind: str, path: Path) -> list[int]:
    """Return offsets within the block that holds page 0 of `kind`: header, beginning, middle and end."""
    start = locate(path, page(kind, 0)[:600])
    if kind == "random":
        return [*range(start - BLOCK_HEADER_BYTES, start + 8), start + 1000, start + PAGE_SIZE - 1]
    # Before its literals LZ4 has a token and the length, here in 7 bytes.
    return [*range(start - BLOCK_HEADER_BYTES - 7, start + 4), start + 500, start + 1365]


@pytest.mark.parametrize("kind", ["random", "text"])
def test_flipped_bits_of_a_persistent_block(segment: _native.Segment, kind: str) -> None:
    pool = small_pool(segment, persistent=True)
    assert pool.put(OBJECT, 0, b"".join(pages(kind, 0, 3))) == 3
    buffer = bytearray(2 * PAGE_SIZE)
    flips = 0
    for offset in places(kind, Path(segment.path)):
        for bit in range(8):
            with flipped(Path(segment.path), offset, bit):
                with pytest.raises(CorruptPageError):
                    pool.get(OBJECT, 0, buffer)
                assert segment.check() != []
                flips += 1
    assert pool.statistics()["corrupt_pages"] == flips
    assert pool.get(OBJECT, 0, buffer) == 2
    assert bytes(buffer) == b"".join(pages(kind, 0, 2))
    assert segment.check() == []


@pytest.mark.parametrize(("kind", "compress"), [("random", "lz4"), ("text", "lz4"), ("random", "auto")])
def test_flipped_bits_of_an_ephemeral_block(segment: _native.Segment, kind: str, compress: str) -> None:
    """A miss, for ever; the block is free again."""
    pool = small_pool(segment, False, compress)
    assert pool.put(OBJECT, 0, page(kind, 0)) == 1
    buffer = bytearray(PAGE_SIZE)
    flips = 0
    for offset in places(kind, Path(segment.path)):
        for bit in range(8):
            with flipped(Path(segment.path), offset, bit):
                assert pool.get(OBJECT, 0, buffer) == 0
                # The flip back comes after the block was freed: that it stays a miss shows that it was.
            assert pool.get(OBJECT, 0, buffer) == 0
            flips += 1
            assert pool.put(OBJECT, 0, page(kind, 0)) == 1
            assert pool.get(OBJECT, 0, buffer) == 1
            assert bytes(buffer) == page(kind, 0)
    counters = pool.statistics()
    assert (counters["corrupt_pages"], counters["pages"]) == (flips, 1)
    assert segment.check() == []


def slot_of(path: Path, data: bytes) -> int:
    """Return the offset of the slot of the page `data`, which was put once and not compressed."""
    block = locate(path, data) - BLOCK_HEADER_BYTES
    first_generation, block_type = 1 << 41, 1 << 38
    return locate(path, struct.pack("=Q", first_generation | block_type | block // 16))


@pytest.mark.parametrize("persistent", [True, False])
def test_flipped_bits_of_a_slot(segment: _native.Segment, persistent: bool) -> None:
    """It leads to no block, or to another page's: that page is not taken for this one."""
    pool, path = small_pool(segment, persistent), Path(segment.path)
    data, others = pages("random", 0, 41), pages("random", 100, 40)
    assert pool.put(OBJECT, 0, b"".join(data)) == 41
    assert pool.put(OBJECT, 64, b"".join(others)) == 40
    slots = [slot_of(path, content) for content in data]
    buffer = bytearray(PAGE_SIZE)
    for bit, slot in enumerate(slots):  # above bit 40 is the generation
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            content[slot + bit // 8] ^= 1 << bit % 8
        try:
            came = pool.get(OBJECT, bit, buffer)
        except CorruptPageError:
            assert persistent
        else:
            assert not came or bytes(buffer) == data[bit]
    assert op.get(segment, op.Where("a", pool.id), OBJECT, 64, 40) == others


def test_corrupt_page_within_a_range(segment: _native.Segment) -> None:
    """The pages before it come, then the error; a put over it and a flush get rid of it."""
    pool = small_pool(segment, persistent=True)
    data = pages("random", 0, 6)
    pool.put(OBJECT, 0, b"".join(data))
    buffer = bytearray(6 * PAGE_SIZE)
    for damaged in (2, 4):
        with Path(segment.path).open("r+b") as file:
            file.seek(locate(Path(segment.path), data[damaged]) + 77)
            file.write(b"not what it was")
    assert pool.get(OBJECT, 0, buffer) == 2
    assert bytes(buffer[: 2 * PAGE_SIZE]) == b"".join(data[:2])
    with pytest.raises(CorruptPageError):
        pool.get(OBJECT, 2, buffer)
    assert pool.present(OBJECT, 0, 10) == [(0, 6)]
    assert pool.put(OBJECT, 2, data[0]) == 1
    assert pool.flush(OBJECT, 4) == 1
    assert pool.get(OBJECT, 0, buffer) == 4
    assert bytes(buffer[: 4 * PAGE_SIZE]) == b"".join((*data[:2], data[0], data[3]))
    assert segment.check() == []


def test_corrupt_page_under_a_device(segment: _native.Segment) -> None:
    pool = small_pool(segment, persistent=True)
    device = _native.Device(pool, OBJECT, 10 * PAGE_SIZE)
    device.pwrite(None, b"".join(pages("random", 0, 3)), 0, 0)
    with Path(segment.path).open("r+b") as file:
        file.seek(locate(Path(segment.path), page("random", 1)) + 77)
        file.write(b"not what it was")
    buffer = bytearray(3 * PAGE_SIZE)
    with pytest.raises(OSError, match=r"\[Errno 5\]"):
        device.pread(None, buffer, 0, 0)
    with pytest.raises(OSError, match=r"\[Errno 5\]"):
        device.pwrite(None, b"part of a page", PAGE_SIZE + 5, 0)
    device.pwrite(None, page("random", 9), PAGE_SIZE, 0)
    device.pread(None, buffer, 0, 0)
    assert bytes(buffer) == page("random", 0) + page("random", 9) + page("random", 2)


def test_eviction_of_damaged_blocks(segment: _native.Segment) -> None:
    """Headers that name other slots, or none: eviction frees what it can and harms nobody else."""
    ephemeral, persistent = small_pool(segment, persistent=False), small_pool(segment, persistent=True)
    data, rng = pages("random", 0, 60), random.Random(8)
    assert ephemeral.put(OBJECT, 0, b"".join(data)) == 60
    assert persistent.put(OBJECT, 0, b"".join(pages("random", 100, 60))) == 60
    for damaged in range(0, 60, 2):
        start = locate(Path(segment.path), data[damaged]) - BLOCK_HEADER_BYTES
        with Path(segment.path).open("r+b") as file:
            file.seek(start)
            file.write(rng.randbytes(5))
    segment.evict(1 << 40)
    buffer = bytearray(PAGE_SIZE)
    for index in range(60):
        if ephemeral.get(OBJECT, index, buffer):
            assert bytes(buffer) == data[index]
            assert index % 2
    assert op.get(segment, op.Where("a", persistent.id), OBJECT, 0, 60) == pages("random", 100, 60)
    assert ephemeral.flush_object(OBJECT) == 0
    segment.evict(1 << 40)
    assert segment.check() == []
