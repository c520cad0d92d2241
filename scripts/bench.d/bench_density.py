"""Bytes of pages per byte of memory, on anonymous pages of programs at work, beside zram with the same pages.

Everything is counted: ours is what the segment's file occupies on its tmpfs, with tables, index, headers
and half-empty chunks; zram's is `mem_used_total`, and its table of 16 bytes a page. At once is what a
swap-out leaves; after the pass is what the manager has made of pages that nobody asked for since.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import workplace
from programs import PAGE_BYTES, collect

from tmem.backends import _native

AT_ONCE_TARGET = 0.97
AFTER_TARGET = 1.4
_ALGORITHMS = ("lz4", "lzo-rle")
_BATCH = 64
_ZRAM_TABLE_BYTES = 16
"""A page: handle, and flags with a time."""
_OID = bytes(_native.OID_SIZE)


@contextmanager
def _zram(algorithm: str, size_bytes: int) -> Iterator[tuple[Path, Path]]:
    """Make a zram device; yield its directory in /sys and its node."""
    control = Path("/sys/class/zram-control")
    number = int((control / "hot_add").read_text())
    directory = Path(f"/sys/block/zram{number}")
    try:
        (directory / "comp_algorithm").write_text(algorithm)
        (directory / "disksize").write_text(str(size_bytes))
        node = Path(f"/dev/zram{number}")
        if not node.exists():
            major, minor = map(int, (directory / "dev").read_text().split(":"))
            os.mknod(node, 0o600 | 0o060000, os.makedev(major, minor))
        yield directory, node
    finally:
        (directory / "reset").write_text("1")
        (control / "hot_remove").write_text(str(number))


def zram_bytes(pages: memoryview, algorithm: str) -> int | None:
    """Return `mem_used_total` of zram with the pages; None if it or the algorithm is not there."""
    known = Path("/sys/block/zram0/comp_algorithm")
    if not known.exists() or algorithm not in known.read_text().replace("[", "").replace("]", "").split():
        return None
    with _zram(algorithm, len(pages)) as (directory, node):
        descriptor = os.open(node, os.O_WRONLY)
        try:
            for start in range(0, len(pages), 1 << 20):
                os.pwrite(descriptor, pages[start : start + (1 << 20)], start)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return int((directory / "mm_stat").read_text().split()[2])


def _occupied(segment: _native.Segment) -> int:
    segment.trim(0)
    return Path(segment.path).stat().st_blocks * 512


def _put(pool: _native.Pool, pages: memoryview) -> float:
    """Put all pages; CPU nanoseconds a page."""
    began = time.thread_time_ns()
    npages = len(pages) // PAGE_BYTES
    for first in range(0, npages, _BATCH):
        last = min(first + _BATCH, npages)
        if pool.put(_OID, first, pages[first * PAGE_BYTES : last * PAGE_BYTES]) != last - first:
            raise RuntimeError("the segment refused a page")
    return (time.thread_time_ns() - began) / npages


def _verify(pool: _native.Pool, pages: memoryview) -> float:
    """Compare all pages; CPU nanoseconds to get one."""
    buffer, spent, npages = bytearray(_BATCH * PAGE_BYTES), 0, len(pages) // PAGE_BYTES
    for first in range(0, npages, _BATCH):
        last = min(first + _BATCH, npages)
        into = memoryview(buffer)[: (last - first) * PAGE_BYTES]
        began = time.thread_time_ns()
        got = pool.get(_OID, first, into)
        spent += time.thread_time_ns() - began
        if got != last - first or into != pages[first * PAGE_BYTES : last * PAGE_BYTES]:
            raise RuntimeError(f"not the pages that were put, at {first}")
    return spent / npages


def _pass_over(segment: _native.Segment) -> None:
    """Do what the manager does over some minutes: visit every chunk three times, then move pages together."""
    for _ in range(3):
        chunk = 0
        while True:
            chunk, _spent = segment.condense(chunk, 10**9, persistent=True)
            if not chunk:
                break
    segment.compact(8, 10**10)


def run() -> dict[str, object]:
    """Measure ours at once and after the pass, and zram; the bytes, the ratios and the times."""
    with tempfile.TemporaryDirectory() as disk, workplace() as directory:
        path = Path(disk) / "pages"
        found = collect(path)
        logical = found.npages * PAGE_BYTES
        named = ", ".join(f"{name} {pages * PAGE_BYTES >> 20}" for name, pages in found.by_program.items())
        print(f"  {logical >> 20} MiB of pages: {named} MiB")
        for program in found.missing:
            print(f"  without {program}, which is not installed")
        results: dict[str, object] = {"logical_bytes": logical, "by_program": found.by_program}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            pages = memoryview(mapped)
            peers = {name: held for name in _ALGORITHMS if (held := zram_bytes(pages, name)) is not None}
            # Tables are sized by the bound: one that holds what compresses 2 : 1.
            segment = _native.create(str(directory / "segment"), logical // 2 + (32 << 20))
            try:
                pool = segment.client("bench").new_pool(persistent=True)
                put_ns = _put(pool, pages)
                at_once, get_ns = _occupied(segment), _verify(pool, pages)
                _pass_over(segment)
                after = _occupied(segment)
                counts = segment.statistics()
                if problems := segment.check():
                    raise RuntimeError(problems[0])
                condensed_get_ns = _verify(pool, pages)
            finally:
                segment.close()
            pages.release()
    condense_ns = counts["condensing_ns"] / max(counts["condensed_pages"], 1)
    results |= {
        "zram_bytes": peers,
        "at_once_bytes": at_once,
        "after_bytes": after,
        "condensed_pages": counts["condensed_pages"],
        "put_ns": put_ns,
        "get_ns": get_ns,
        "condense_ns": condense_ns,
        "condensed_get_ns": condensed_get_ns,
    }
    for name, held in peers.items():
        print(f"  zram {name:8} {logical / held:5.2f} : 1 without its table")
        peers[name] = held + found.npages * _ZRAM_TABLE_BYTES
        print(f"  zram {name:8} {logical / peers[name]:5.2f} : 1")
    for what, held, target in (("at once", at_once, AT_ONCE_TARGET), ("after the pass", after, AFTER_TARGET)):
        line = f"  tmem {what:15} {logical / held:5.2f} : 1"
        if "lz4" in peers:
            ratio = peers["lz4"] / held
            line += (
                f"   {ratio:.2f} of zram lz4, target {target} {'reached' if ratio >= target else 'MISSED'}"
            )
        print(line)
    print(
        f"  put {put_ns:.0f} ns, get {get_ns:.0f} ns; to condense a page {condense_ns:.0f} ns "
        f"({counts['condensed_pages']} of {found.npages}), then get {condensed_get_ns:.0f} ns"
    )
    return results
