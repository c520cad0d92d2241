"""Bytes of pages per byte of memory, on anonymous pages of programs at work, beside zram with the same pages.

Everything is counted: ours is what the segment's file occupies on its tmpfs, with tables, index, headers
and half-empty chunks; zram's is `mem_used_total`, and its table of 16 bytes a page. At once is what a
swap-out leaves; after the pass is what the manager has made of pages that nobody asked for since. One round:
the same pages give the same bytes each time. zram needs root.
"""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from tmem.backends import _native
from tmem.bench import zram
from tmem.bench.grounds import DISK, workplace
from tmem.bench.pages import KINDS, PYTHON, collect
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import OURS, Lacking, Outcome, Sample, Series, compare
from tmem.errors import TmemError
from tmem.types import OID_SIZE, PAGE_SIZE

AT_ONCE, AFTER = "pages swapped out just now", "after the background pass"
PACKED = "and with cold neighbours packed (--pack)"
TARGETS = {AT_ONCE: 0.97, AFTER: 1.4}
"""Of zram lz4."""

ALGORITHMS = ("lz4", "lzo-rle")
_BATCH = 64
_OID = bytes(OID_SIZE)


def zram_bytes(pages: memoryview, algorithm: str) -> int:
    """Return what zram takes for the pages, its table included; TmemError where it is not there."""
    with zram.device(algorithm, len(pages)) as (directory, node):
        descriptor = os.open(node, os.O_WRONLY)
        try:
            for start in range(0, len(pages), 1 << 20):
                os.pwrite(descriptor, pages[start : start + (1 << 20)], start)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return zram.used_bytes(directory)


def _occupied(segment: _native.Segment) -> int:
    segment.trim(0)
    return Path(segment.path).stat().st_blocks * 512


def _put(pool: _native.Pool, pages: memoryview) -> float:
    """Put all pages; CPU nanoseconds a page."""
    began = time.thread_time_ns()
    npages = len(pages) // PAGE_SIZE
    for first in range(0, npages, _BATCH):
        last = min(first + _BATCH, npages)
        if pool.put(_OID, first, pages[first * PAGE_SIZE : last * PAGE_SIZE]) != last - first:
            raise RuntimeError("the segment refused a page")
    return (time.thread_time_ns() - began) / npages


def _verify(pool: _native.Pool, pages: memoryview, batch: int = _BATCH) -> float:
    """Compare all pages; CPU nanoseconds to get one."""
    buffer, spent, npages = bytearray(batch * PAGE_SIZE), 0, len(pages) // PAGE_SIZE
    for first in range(0, npages, batch):
        last = min(first + batch, npages)
        into = memoryview(buffer)[: (last - first) * PAGE_SIZE]
        began = time.thread_time_ns()
        got = pool.get(_OID, first, into)
        spent += time.thread_time_ns() - began
        if got != last - first or into != pages[first * PAGE_SIZE : last * PAGE_SIZE]:
            raise RuntimeError(f"not the pages that were put, at {first}")
    return spent / npages


def _pass_over(segment: _native.Segment) -> None:
    """Do what the manager does over some minutes: visit every chunk three times, then move pages together."""
    for _ in range(3):
        _all_chunks(lambda chunk: segment.condense(chunk, 10**9, persistent=True)[0])
    segment.compact(8, 10**10)


def _pack(segment: _native.Segment) -> None:
    """Do what it does then with neighbours that stay cold."""
    segment.packing = True
    for _ in range(2):
        _all_chunks(lambda chunk: segment.condense(chunk, 10**9, persistent=True)[0])
    _all_chunks(lambda chunk: segment.pack(chunk, 10**9)[0])
    segment.compact(8, 10**10)


def _all_chunks(visit: Callable[[int], int]) -> None:
    chunk = visit(0)
    while chunk:
        chunk = visit(chunk)


def measure_ours(pages: memoryview, directory: Path) -> dict[str, float]:
    """Return the bytes at once and after the pass, and the times, of a segment made in `directory`."""
    # Tables are sized by the bound: one that holds what compresses 2 : 1.
    segment = _native.create(str(directory / "segment"), len(pages) // 2 + (32 << 20))
    try:
        pool = segment.client("bench").new_pool(persistent=True)
        found = {"put_ns": _put(pool, pages)}
        found[AT_ONCE] = float(_occupied(segment))
        found["get_ns"] = _verify(pool, pages)
        _pass_over(segment)
        found[AFTER] = float(_occupied(segment))
        found["condensed_get_ns"] = _verify(pool, pages)
        _pack(segment)
        found[PACKED] = float(_occupied(segment))
        counts = segment.statistics()
        if problems := segment.check():
            raise RuntimeError(problems[0])
        found["packed_get_ns"] = _verify(pool, pages)
        found["packed_get_one_ns"] = _verify(pool, pages, batch=1)
        found["packed_pages"] = float(counts["packed_pages"])
        found["packs"] = float(counts["packs"])
        found["pack_ns"] = counts["packing_ns"] / max(counts["packed_pages"], 1)
        found["condensed_pages"] = float(counts["condensed_pages"])
        found["condense_ns"] = counts["condensing_ns"] / max(counts["condensed_pages"], 1)
        return found
    finally:
        segment.close()


def plan(effort: Effort) -> Plan:
    """Say what is needed."""
    kinds = len(PYTHON) if effort.quick else KINDS
    size = (400 if effort.quick else 700) << 20
    return Plan(
        memory_bytes=size // 2 + size // 3 + (256 << 20),
        disk_bytes=size,
        steps=kinds + len(ALGORITHMS) + 1,
        about_s=25 if effort.quick else 60,
        says=f"{kinds} programs ({'Python' if effort.quick else 'Python, Node, Redis, gcc'}) one after "
        "the other, their pages kept by a segment and by zram",
        lacking=_lacking(),
    )


def _lacking() -> list[Lacking]:
    reasons = {f"zram {name}": zram.lacks(name) for name in ALGORITHMS}
    return [Lacking(name, reason) for name, reason in reasons.items() if reason is not None]


def run(effort: Effort, step: Step) -> Outcome:
    """Measure ours at once and after the pass, and zram."""
    outcome = Outcome()
    with workplace(DISK) as disk, workplace() as directory:
        path = disk / "pages"
        found = collect(path, not effort.quick, lambda name: step(f"pages of a program: {name}"))
        outcome.lacking += [
            Lacking(f"pages of {name}", f"apt-get install {package}") for name, package in found.missing
        ]
        held: dict[str, float] = {}
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as pages,
        ):
            for name in ALGORITHMS:
                step(f"pages in zram {name}")
                if zram.lacks(name) is None:
                    try:
                        held[f"zram {name}"] = zram_bytes(pages, name)
                    except (TmemError, OSError) as error:
                        outcome.lacking.append(Lacking(f"zram {name}", str(error)))
            step("pages in tmem")
            ours = measure_ours(pages, directory)
    logical = found.npages * PAGE_SIZE
    for case in (AT_ONCE, AFTER, PACKED):
        of_case = [_ratio(case, OURS, logical, ours[case])]
        of_case += [_ratio(case, name, logical, size) for name, size in held.items()]
        outcome.series += of_case
        for one in of_case[1:]:
            row = compare(of_case[0], one, target=TARGETS.get(case) if one.peer == "zram lz4" else None)
            outcome.rows += [] if row is None else [row]
    outcome.notes = {"logical_bytes": logical, "by_program": found.by_program, **ours}
    return outcome


def _ratio(case: str, peer: str, logical: int, size: float) -> Series:
    chart = "bytes of pages per byte of memory"
    return Series(case, peer, ": 1", (Sample(logical / size, extra={"held_bytes": size}),), chart)


PART = Part("density", "Memory efficiency", plan, run)
