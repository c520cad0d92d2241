#!/usr/bin/env python3
"""A program that uses more memory than it may: fills it, touches it at random, and verifies every page.

Meant for a control group smaller than --size, so that it lives in swap. Each page has a header of its own and
compresses about 2.5 : 1 with LZ4; a random touch verifies the page and writes the next generation of it.
Prints one JSON line; exit status 1 if a page came back wrong. Only the standard library, one thread.
"""

import argparse
import json
import mmap
import random
import struct
import sys
import time
from pathlib import Path

PAGE = 4096
NOISE = 1600  # random bytes in a page; the rest is text, which all but vanishes
_HEADER = struct.Struct("<QQ")
_UNITS = {"K": 10, "M": 20, "G": 30}


class Pages:
    """`npages` pages of anonymous memory and what they should contain."""

    def __init__(self, npages: int, seed: int) -> None:
        self.npages = npages
        self.memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Generations are kept here, in memory that is small enough to stay.
        self.generations = bytearray(npages)
        self._noise = random.Random(seed).randbytes(1 << 20)
        text = b"a memory hog wrote this; nobody reads it but the hog. "
        self._text = (text * (PAGE // len(text) + 1))[: PAGE - NOISE - _HEADER.size]

    def content(self, index: int) -> bytes:
        """Return what page `index` must contain now: no two pages are the same."""
        generation = self.generations[index]
        offset = (index * 7919 + generation * 104729) % (len(self._noise) - NOISE)
        header = _HEADER.pack(index, generation)
        return b"".join((header, self._noise[offset : offset + NOISE], self._text))

    def write(self, index: int) -> None:
        """Write the next generation of page `index`."""
        self.generations[index] = (self.generations[index] + 1) & 0xFF
        self.memory[index * PAGE : (index + 1) * PAGE] = self.content(index)

    def good(self, index: int) -> bool:
        """Return whether page `index` contains what it must."""
        return self.memory[index * PAGE : (index + 1) * PAGE] == self.content(index)


def run(size_bytes: int, seconds: float, seed: int) -> dict[str, float]:
    """Fill, touch for `seconds`, verify everything; the figures."""
    before = swapped_pages()
    pages = Pages(size_bytes // PAGE, seed)
    begin = time.monotonic()
    for index in range(pages.npages):
        pages.write(index)
    filled = time.monotonic()
    choice = random.Random(seed + 1)
    touches = bad = 0
    slowest = 0.0
    now = filled
    while now < filled + seconds:
        index = choice.randrange(pages.npages)
        bad += not pages.good(index)
        pages.write(index)
        touches += 1
        previous, now = now, time.monotonic()
        slowest = max(slowest, now - previous)
    touched = now
    bad += sum(not pages.good(index) for index in range(pages.npages))
    after = swapped_pages()
    return {
        "pages": pages.npages,
        "bad_pages": bad,
        "fill_s": round(filled - begin, 3),
        "touches": touches,
        "touches_per_s": round(touches / max(touched - filled, 1e-9), 1),
        "slowest_touch_s": round(slowest, 6),
        "verify_s": round(time.monotonic() - touched, 3),
        "swapped_out_pages": after["pswpout"] - before["pswpout"],
        "swapped_in_pages": after["pswpin"] - before["pswpin"],
    }


def swapped_pages() -> dict[str, int]:
    """Return the kernel's counts of pages swapped in and out (of the whole machine)."""
    lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    counts = dict(line.split() for line in lines)
    return {name: int(counts[name]) for name in ("pswpin", "pswpout")}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``384M``."""
    unit = _UNITS.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) << unit


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", type=parse_size, required=True, help="memory to use, such as 384M")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to touch pages at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cgroup", type=Path, help="directory of a control group to enter first")
    options = parser.parse_args()
    if options.cgroup is not None:
        # Before anything is allocated: memory stays charged to the group in which it was touched first.
        (options.cgroup / "cgroup.procs").write_text("0", encoding="ascii")
    figures = run(options.size, options.seconds, options.seed)
    print(json.dumps(figures), flush=True)
    return 1 if figures["bad_pages"] else 0


if __name__ == "__main__":
    sys.exit(main())
