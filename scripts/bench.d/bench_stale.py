"""Live against kept: what a swap device of this machine keeps that the kernel needs no more.

Programs come and go for a while in a control group that is too small for them, beside one that stays and does
little. Kept are the pages in the pool, less the device's header; held are the slots that the kernel has in
use (/proc/swaps), among them copies of pages that are in RAM as well (swapcached of the group). What is kept
and not held is stale: the kernel has freed it and has not said so, or never says so (without discard). Asked
every quarter of a second, and once more when most programs have gone. With a tier, to which pages go that
nobody has used for `COLD_S`, the question is what is left of them in memory. At the end ``tmem shrink
--gently`` brings back what is there, as the manager does by itself. What else swaps to the machine's areas of
the same priority takes part: held is of all of them.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import ROOT

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.bench.grounds import DISK, workplace
from tmem.nbd import swap

MIB = 1 << 20
GROUP_BYTES = 48 * MIB
STAYING_BYTES = 24 * MIB
AT_A_TIME = 3
SIZES_BYTES = (4 * MIB, 24 * MIB)
SECONDS = (2.0, 6.0)
"""How large and how old programs get."""
COLD_S = 3
"""To programs that live for seconds what an hour is to those that live for hours."""


def run(seconds: float) -> dict[str, object]:
    """Measure with and without discard, and each with a tier for cold pages, `seconds` each."""
    sys.path.insert(0, str(ROOT))
    return {
        how + (" and tier" if tiered else ""): _measure(seconds, options, tiered)
        for tiered in (False, True)
        for how, options in _WAYS.items()
    }


_WAYS: dict[str, tuple[str, ...]] = {"discard": (), "no discard": ("--no-discard",)}


def _measure(seconds: float, options: tuple[str, ...], tiered: bool) -> dict[str, object]:
    from tests.groups import Groups

    with ExitStack() as stack:
        directory = stack.enter_context(workplace())
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        paths = SegmentPaths("default", directory)
        stack.callback(_tmem, "stop")
        _tmem("start", "-d", "--memory", "256M", "--tier-cold", f"{COLD_S}s" if tiered else "off")
        stack.callback(_tmem, "swap", "remove", "local")
        if tiered:
            options += ("--tier", f"{stack.enter_context(workplace(DISK))}/")
        added = ("swap", "add", "local", "--size", "192M", "--attach", "--force", "--priority", "32767")
        device = _tmem(*added, *options).splitlines()[0]
        stack.callback(swap.off, device)
        segment = _native.attach(str(paths.segment))
        stack.callback(segment.close)
        group = stack.enter_context(Groups()).make(GROUP_BYTES)
        stack.enter_context(_hog(group, STAYING_BYTES, 1e6))
        samples = list(_samples(segment, device, group, seconds))
        time.sleep(5)  # discards come late
        last = _sample(segment, device, group)
        (pool,) = segment.client("local", create=False).pools()
        fetched = pool.statistics()["pages_fetched"]
        returned, seconds_back = _bring_back()
        renewed = _sample(segment, device, group)
    rows = [row for row in samples if row[1] > 256]
    kept, held, cached, memory = (int(statistics.median(column)) for column in zip(*rows, strict=True))
    ratios = [row[0] / row[1] for row in rows]
    in_memory = statistics.median(row[3] / row[1] for row in rows)
    way = ("no discard" if "--no-discard" in options else "with discard") + (", tier" if tiered else "")
    print(
        f"  {way:18} medians: kept {kept}, of them in memory {memory}, held {held}, "
        f"in RAM as well {cached} pages; kept/held {statistics.median(ratios):.2f}, "
        f"at most {max(ratios):.2f}, in memory/held {in_memory:.2f}; "
        f"most kept {max(samples)[0]}; 5 s after most programs had gone kept {last[0]}, "
        f"in memory {last[3]}, held {last[1]}; fetched from the tier {fetched}; brought back in "
        f"{seconds_back:.1f} s: kept {renewed[0]}, held {renewed[1]}",
        flush=True,
    )
    return {
        "kept_held_cached_memory_pages": samples,
        "afterwards": last,
        "fetched_pages": fetched,
        "brought_back": returned,
        "renewed": renewed,
        "bringing_back_s": seconds_back,
    }


def _bring_back() -> tuple[list[dict[str, object]], float]:
    """Bring everything back gently: what each pass says, as many as it takes, and how long it took."""
    said: list[dict[str, object]] = []
    began = time.monotonic()
    while len(said) < 20 and (not said or said[-1]["stopped"]):
        said.append(json.loads(_tmem("shrink", "local", "--gently", "--json")))
    return said, time.monotonic() - began


def _samples(
    segment: "_native.Segment", device: str, group: Path, seconds: float
) -> Iterator[tuple[int, int, int, int]]:
    """Let programs come and go, and yield pages kept, held, in RAM as well, and kept in memory."""
    rng = random.Random(1)
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        programs: list[subprocess.Popen[bytes]] = []
        while time.monotonic() < end:
            programs = [one for one in programs if one.poll() is None]
            while len(programs) < AT_A_TIME:
                size = rng.randrange(*SIZES_BYTES)
                programs.append(stack.enter_context(_hog(group, size, rng.uniform(*SECONDS))))
            time.sleep(0.25)
            yield _sample(segment, device, group)


def _sample(segment: "_native.Segment", device: str, group: Path) -> tuple[int, int, int, int]:
    (pool,) = segment.client("local", create=False).pools()
    entry = swap.entry(device)
    assert entry is not None, "in use as swap"
    lines = (group / "memory.stat").read_text().splitlines()
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("swapcached "))
    counts = pool.statistics()
    in_memory = counts["pages"] - counts["tier_pages"]
    return counts["pages"] - 1, entry.used_bytes // 4096, cached // 4096, max(in_memory - 1, 0)


@contextmanager
def _hog(group: Path, size_bytes: int, seconds: float) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a hog in the group; it touches its pages at random, until it ends or the block does."""
    argv = [
        sys.executable,
        str(ROOT / "scripts/hog.py"),
        "--size",
        str(size_bytes),
        "--seconds",
        str(seconds),
    ]
    join = f'echo 0 > {group}/cgroup.procs && exec nice -n 20 "$@"'
    process = subprocess.Popen(["sh", "-c", join, "sh", *argv], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _tmem(*arguments: str) -> str:
    command = [sys.executable, "-P", "-m", "tmem", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
