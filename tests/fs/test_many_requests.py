"""Hundreds of large requests at a time, by many clients: all are answered, rightly, in bounded memory."""

import mmap
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import Mounter, Place
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
CLIENTS = 200
FILE_BYTES = 24 * MIB


@pytest.fixture(params=["loop=native", BY_RINGS, "loop=fast"])
def place(request: pytest.FixtureRequest, mounter: Mounter) -> Place:
    return mounter(f"timeout=0,{request.param},cache=direct")


def numbered(size: int, seed: int) -> bytes:
    """Return bytes of which no two pages are alike."""
    return random.Random(seed).randbytes(size)


def at_once(work: Callable[[int], None]) -> None:
    """Have `CLIENTS` threads begin together."""
    start = threading.Barrier(CLIENTS)

    def run(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(run, range(CLIENTS)))


def resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def read_and_compare(place: Place, content: bytes) -> None:
    descriptor = os.open(place.point / "file", os.O_RDONLY)

    def read(number: int) -> None:
        buffer = mmap.mmap(-1, MIB)  # aligned, so that one request asks for all of it
        offset = (number * 7919 * 4096 + number) % (FILE_BYTES - MIB // 2)
        count = os.preadv(descriptor, [buffer], offset)
        assert count == min(MIB, FILE_BYTES - offset)
        assert buffer[:count] == content[offset : offset + count]

    try:
        at_once(read)
    finally:
        os.close(descriptor)


def test_reads_without_a_pool(place: Place) -> None:
    content = numbered(FILE_BYTES, 1)
    (place.lower / "file").write_bytes(content)
    read_and_compare(place, content)


def test_misses_and_hits(segment: "_native.Segment", place: Place) -> None:
    content = numbered(FILE_BYTES, 2)
    (place.lower / "file").write_bytes(content)
    for _ in range(2):
        read_and_compare(place, content)
    assert place.statistics().hit_pages
    assert segment.check() == []


def test_writes(place: Place) -> None:
    """Each client writes a region of its own, in requests of 1 MiB, and reads it back."""
    (place.lower / "file").write_bytes(b"")
    descriptor = os.open(place.point / "file", os.O_RDWR)
    parts = [numbered(MIB - 4096 * (number % 3) - number % 2, number) for number in range(CLIENTS // 4)]

    def write(number: int) -> None:
        part = parts[number % len(parts)]
        at = number % len(parts) * MIB
        if number < len(parts):
            assert os.pwrite(descriptor, part, at) == len(part)
            assert os.pread(descriptor, len(part), at) == part

    try:
        at_once(write)
    finally:
        os.close(descriptor)
    with (place.lower / "file").open("rb") as below:
        for number, part in enumerate(parts):
            below.seek(number * MIB)
            assert below.read(len(part)) == part


def test_memory_is_bounded(mounter: Mounter, segment: "_native.Segment") -> None:
    """Reads that are answered by handlers wait for each other rather than each holding a buffer."""
    place = mounter("timeout=0,loop=native,cache=direct")
    content = numbered(FILE_BYTES, 3)
    (place.lower / "file").write_bytes(content)
    before = resident_bytes(place.pid)
    read_and_compare(place, content)
    assert resident_bytes(place.pid) - before < 100 * MIB


def test_large_directories_are_listed(place: Place) -> None:
    names = {f"{'long' * 40}{number}" for number in range(1000)}
    for name in names:
        (place.lower / name).touch()

    def list_all(_: int) -> None:
        assert set(os.listdir(place.point)) == names  # noqa: PTH208

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(list_all, range(8)))
