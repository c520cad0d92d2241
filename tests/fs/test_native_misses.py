"""Small misses that the native reader answers itself: the right bytes, counted, put, and never the past.

What order things may happen in is tested in tests/native/misses.c.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

APART = 128 * PAGE_SIZE
"""So far from each other misses do not look like a stream."""
PAGES = 32


def far_pages(place: Place, seed: int) -> bytes:
    """Write a file of which every `APART` bytes one page is read; it is in the page cache."""
    content = random.Random(seed).randbytes(PAGES * APART + 123)
    (place.lower / "file").write_bytes(content)
    return content


@pytest.mark.parametrize("options", ["loop=native", BY_RINGS])
def test_bytes_counters_and_hits(segment: "_native.Segment", mounter: Mounter, options: str) -> None:
    place = mounter(f"timeout=0,client=web,{options}")
    content = far_pages(place, 1)
    with (place.point / "file").open("rb", buffering=0) as file:
        before = place.statistics()
        order = list(range(PAGES))
        random.Random(2).shuffle(order)
        for turn in range(2):
            for number in order:
                at = number * APART + 100 * turn
                assert os.pread(file.fileno(), 4096 - 100, at) == content[at : at + 4096 - 100]
        after = place.statistics()
    assert after.miss_reads - before.miss_reads == PAGES
    assert after.miss_pages - before.miss_pages == PAGES
    assert after.put_pages - before.put_pages == PAGES
    assert after.lower_bytes - before.lower_bytes == PAGES * PAGE_SIZE
    assert after.hit_reads - before.hit_reads == PAGES
    assert after.lower_ns > before.lower_ns
    assert after.put_ns > before.put_ns
    assert segment.check() == []


def test_readers_and_writers_never_see_the_past(segment: "_native.Segment", mounter: Mounter) -> None:
    """Processes write counters to pages far apart, while others drop them from the pool and read them."""
    place = mounter("timeout=0,client=web,loop=native")
    (place.lower / "file").write_bytes(bytes(8 * APART))
    code = """
import os, random, sys
path, own = sys.argv[1], int(sys.argv[2])
choice = random.Random(own)
descriptor = os.open(path, os.O_RDWR)
last = [0] * 8
for count in range(1, 150):
    os.pwrite(descriptor, count.to_bytes(8, "little") * 512, own * 524288)
    for page in choice.sample(range(8), 8):
        data = os.pread(descriptor, 4096, page * 524288)
        values = {int.from_bytes(data[at : at + 8], "little") for at in range(0, 4096, 8)}
        assert max(values) - min(values) <= 1, values
        assert max(values) >= last[page], (page, values, last)
        last[page] = max(values)
    assert last[own] == count
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, place.point / "file", str(number)])
        for number in range(3)
    ]
    (pool,) = segment.client("web", create=False).pools()
    done = threading.Event()

    def evict() -> None:
        while not done.wait(0.001):
            segment.client("web", create=False).mode = "off"  # drops all
            segment.client("web", create=False).mode = "on"

    evictor = threading.Thread(target=evict)
    evictor.start()
    try:
        assert [worker.wait(60) for worker in workers] == [0] * 3
    finally:
        done.set()
        evictor.join()
        for worker in workers:
            worker.kill()
    for _ in range(2):
        assert (place.point / "file").read_bytes() == (place.lower / "file").read_bytes()
    assert pool.alive
    assert segment.check() == []


def test_the_last_page_that_an_index_can_name(segment: "_native.Segment", mounter: Mounter) -> None:
    """What is written to it shows: of a tmpfs, whose files may be that large."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        place = mounter("timeout=0,client=web,loop=native", lower=Path(directory))
        path, end = place.lower / "large", 1 << 44
        path.touch()
        os.truncate(path, end)
        os.utime(path, (1, 1))
        descriptor = os.open(place.point / "large", os.O_RDWR)
        for at in (end - PAGE_SIZE, end - 2 * PAGE_SIZE, end // 2):
            assert os.pread(descriptor, PAGE_SIZE, at) == bytes(PAGE_SIZE)
            content = random.Random(at).randbytes(PAGE_SIZE)
            assert os.pwrite(descriptor, content, at) == PAGE_SIZE
            assert os.pread(descriptor, PAGE_SIZE, at) == content
        os.close(descriptor)
        assert place.statistics().hit_reads == 0
        place.umount()
