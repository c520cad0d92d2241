"""What a persistent page costs beside its bytes, with very many of them; and what comes back when most go.

`run` counts everything: the file's blocks, tables, index, the headers of blocks, and what size classes and
chunks leave over. Pages differ, and compress to between 130 and 550 bytes. `giveback` frees nine of ten at
random beside a manager and waits until memory is back with the system.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tmem.backends import _native
from tmem.bench.grounds import wait_until, workplace
from tmem.types import OID_SIZE, PAGE_SIZE

HEADER_BYTES = 16
TARGET_BYTES = 28
BACK_TARGET = 0.8
BACK_S = 10.0
BATCH = 1024

MANAGER = """
from tmem.backends import manager, segment
from tmem.backends.paths import SegmentPaths
manager.run(SegmentPaths.of("default"), segment.attach("default"))
"""


def _fill(pool: _native.Pool, npages: int, least: int, most: int, alike: bool = False) -> int:
    """Put so many pages of `least` to `most` bytes that do not compress; return how many were stored.

    `npages` is a multiple of BATCH. Each page has its number in it: there are no two of them equal. With
    `alike` zstd makes half of it, and four neighbours have `least` bytes in common.
    """
    import numpy

    rng = numpy.random.default_rng(1)
    batches = rng.integers(0, 256, (8, BATCH, PAGE_SIZE), dtype=numpy.uint8)
    if alike:
        batches &= 15
        batches[:, :, :least] = batches[:, ::4, :least].repeat(4, axis=1)
    sizes = rng.integers(least, most, (8, BATCH, 1))
    batches[numpy.arange(PAGE_SIZE) >= sizes] = 0
    stored = 0
    for first in range(0, npages, BATCH):
        pages = batches[first // BATCH % len(batches)]
        numbers = numpy.arange(first, first + BATCH, dtype=numpy.uint64)
        pages[:, :8] = numbers.view(numpy.uint8).reshape(BATCH, 8)
        stored += pool.put(bytes(OID_SIZE), first, pages.data)
    return stored


def run(npages: int) -> dict[str, object]:
    """Fill a fresh segment and count."""
    with workplace() as directory:
        segment = _native.create(str(directory / "segment"), npages * 460)
        began = time.monotonic()
        pool = segment.client("one").new_pool(persistent=True)
        stored = _fill(pool, npages, 100, 520)
        took_s = time.monotonic() - began
        if stored != npages:
            raise RuntimeError(f"only {stored} of {npages} pages were stored")
        s = segment.statistics()
        segment.trim(0)
        file_bytes = (directory / "segment").stat().st_blocks * 512
        index = s["metadata_bytes"] / npages
        payload = pool.statistics()["bytes"] / npages
        figures: dict[str, object] = {
            "pages": npages,
            "seconds": took_s,
            "metadata_bytes_a_page": index + HEADER_BYTES,
            "index_and_tables_bytes_a_page": index,
            "block_bytes_a_page": payload,
            "file_bytes_a_page": file_bytes / npages,
            "left_over_bytes_a_page": file_bytes / npages - index - payload,
        }
        verdict = "reached" if index + HEADER_BYTES <= TARGET_BYTES else "MISSED"
        print(
            f"  {npages} pages in {took_s:.0f} s: {index + HEADER_BYTES:.2f} bytes of metadata each "
            f"(index, tables {index:.2f}, header {HEADER_BYTES})   target {TARGET_BYTES} {verdict}; "
            f"blocks of {payload:.0f} bytes, file {file_bytes / npages:.0f}"
        )
        segment.close()
    return figures


def giveback(npages: int, persistent: bool, packed: bool = False) -> dict[str, object]:
    """Free nine pages of ten at random beside a manager; return how much is back, and when four fifths
    were."""
    with workplace() as directory:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        from tmem.backends import segment as segments
        from tmem.backends.paths import SegmentPaths

        opened = segments.create("default", npages * 5200)  # uncompressed at first
        pool = opened.client("one").new_pool(persistent, exclusive=False)
        path = SegmentPaths.of("default").segment
        empty = _backed(path)
        if packed:
            _fill(pool, npages, 800, 2800, alike=True)
            _pack(opened, npages)
        else:
            _fill(pool, npages, 300, 4000)
        full = _backed(path) - empty
        order = random.Random(1).sample(range(npages), npages * 9 // 10)
        with subprocess.Popen([sys.executable, "-c", MANAGER]) as manager:
            try:
                wait_until(SegmentPaths.of("default").control.exists, "the manager")
                for index in order:
                    pool.flush(bytes(OID_SIZE), index)
                began = time.monotonic()
                after_s: float | None = None
                while (passed := time.monotonic() - began) < BACK_S:
                    if after_s is None and full + empty - _backed(path) >= BACK_TARGET * full:
                        after_s = passed
                    time.sleep(0.05)
                back = (full + empty - _backed(path)) / full
            finally:
                manager.terminate()
        kept = pool.statistics()["pages"]
        if kept != npages - len(order):
            raise RuntimeError(f"{kept} pages are left of {npages - len(order)}")
        opened.close()
        segments.destroy("default")
    kind = "packed" if packed else "persistent" if persistent else "ephemeral"
    when = "not yet" if after_s is None else f"{after_s:.1f} s"
    verdict = "reached" if back >= BACK_TARGET else "MISSED"
    print(
        f"  {kind}, {full >> 20} MiB: {100 * back:.0f} % back {BACK_S:.0f} s after nine tenths were freed "
        f"(80 % after {when})   target 80 % {verdict}"
    )
    return {"pages": npages, "full_bytes": full, "back_share": back, "four_fifths_after_s": after_s}


def _pack(segment: _native.Segment, npages: int) -> None:
    """Do what the manager does with pages that stay cold for minutes."""
    chunk, *_ = segment.condense(0, 10**12, persistent=True, warm=True)
    segment.packing = True
    after, _ = segment.pack(0, 10**12, warm=True)
    packed = segment.statistics()["packed_pages"]
    if chunk or after or packed < npages * 9 // 10:
        raise RuntimeError(f"only {packed} of {npages} pages are packed")
    segment.compact(1, 10**11)
    segment.trim(0)


def _backed(path: Path) -> int:
    return path.stat().st_blocks * 512
