"""A tier after the pressure: what reading a demoted working set costs, before and after pages came back.

First a spill file on the disk of /var/tmp and pages of real programs: all of them leave memory, are read in
pieces of 32 KiB (what the kernel reads ahead in swap) from the file, come back as the manager would bring
them but without a pause, and are read again; and what a get of another client's page in its file takes
meanwhile. The same with a Redis cluster of 3 + 3 on loopback. Then a real swap device (root): a program in a
control group that is too small looks at all of its pages twice, then once more when pages came back, and
again in a group that is large enough: how many were asked for, and how many of them were read from the tier.
"""

import os
import random
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench_stale import _tmem
from common import ROOT

from tmem.backends import _native, tiering
from tmem.backends.paths import SegmentPaths
from tmem.backends.prefetching import Prefetch
from tmem.bench.grounds import DISK, wait_until, workplace
from tmem.bench.pages import collect
from tmem.nbd import swap
from tmem.types import OID_SIZE, PAGE_SIZE

MIB = 1 << 20
OID = bytes(OID_SIZE)
AT_ONCE = 8
PROBES = 2000


def run(rounds: int, size_bytes: int) -> dict[str, object]:
    """Measure `rounds` times with `size_bytes` of pages, and the sequence of a swap device once."""
    with ExitStack() as stack:
        memory, disk = stack.enter_context(workplace()), stack.enter_context(workplace(DISK))
        collect(disk / "pages", all_kinds=False)
        pages = (disk / "pages").read_bytes()[:size_bytes]
        file = _tier(memory / "file", rounds, pages, lambda name: str(disk / name))
        sys.path.insert(0, str(ROOT))
        from tests.backends.tiers.servers import Cluster

        cluster = Cluster(memory / "servers")
        stack.callback(cluster.end)
        servers = _tier(memory / "cluster", rounds, pages, lambda _name: cluster.url)
    return {**file, "cluster": servers, "sequence": _sequence() if os.geteuid() == 0 else None}


def _tier(directory: Path, rounds: int, pages: bytes, url: Callable[[str], str]) -> dict[str, object]:
    """Measure a kind of tier; `url` says where a client's is."""
    directory.mkdir()
    segment = _native.create(str(directory / "segment"), 4 * len(pages))
    (directory / "segment.d").mkdir()
    try:
        paths = SegmentPaths("segment", directory)
        set_ = _Set(paths, segment, "set", url("set"), pages)
        other = _Set(paths, segment, "other", url("other"), pages[: 16 * MIB])
        rows = [_round(set_, other) for _ in range(rounds)]
    finally:
        segment.close()
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(
        f"  {directory.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
        flush=True,
    )
    return {"rounds": rows, "median": found}


class _Set:
    """A client with a tier, and its pages."""

    def __init__(
        self, paths: SegmentPaths, segment: "_native.Segment", name: str, url: str, pages: bytes
    ) -> None:
        self.segment = segment
        self.client = segment.client(name)
        self.pool = self.client.new_pool(persistent=True)
        self.npages = len(pages) // PAGE_SIZE
        self.pool.put(OID, 0, pages)
        size_bytes = 2 * len(pages) if url.startswith("/") else 0
        url = tiering.assign(paths, segment, self.client, url, size_bytes)
        self.tier = tiering.open_tier(url, tiering.identity(segment, self.client), writer=True)
        tiering.attach(segment, self.client)

    def demote(self) -> None:
        """Let all pages leave memory."""
        live = self.client.live(1000)
        assert live is not None
        self.tier.retain(memoryview(live).cast("Q"))
        buffer, hand = bytearray(1 << 20), 0
        while True:
            hand, places, found = self.client.collect(hand, buffer, 2048, True, self.client.tier_epoch)
            locations = self.tier.write([memoryview(buffer)[at : at + length] for at, length in places])
            self.client.demote(found, array("Q", locations))
            if not hand:
                return

    def read(self) -> float:
        """Read all pages in order; the seconds that it took."""
        buffer = bytearray(AT_ONCE * PAGE_SIZE)
        began = time.perf_counter()
        for first in range(0, self.npages - AT_ONCE + 1, AT_ONCE):
            assert self.pool.get(OID, first, buffer) == AT_ONCE
        return time.perf_counter() - began

    def probe(self) -> list[float]:
        """Get single pages at random; the microseconds that each took, in order of their size."""
        rng, buffer, took = random.Random(1), bytearray(PAGE_SIZE), []
        for _ in range(PROBES):
            index = rng.randrange(self.npages)
            began = time.perf_counter()
            self.pool.get(OID, index, buffer)
            took.append((time.perf_counter() - began) * 1e6)
        return sorted(took)


def _round(set_: _Set, other: _Set) -> dict[str, float]:
    set_.demote()
    other.demote()
    left = set_.client.statistics()["tier_pages"]
    row: dict[str, float] = {"pages": set_.npages, "in_tier": left, "from_tier_s": set_.read()}
    idle = other.probe()
    prefetch = Prefetch(set_.segment, set_.client, time.monotonic)
    ended = threading.Event()

    def bring_back() -> None:
        while not ended.is_set() and set_.client.statistics()["tier_pages"]:
            prefetch.round(left, False, lambda: not ended.is_set())

    thread = threading.Thread(target=bring_back)
    began = time.perf_counter()
    thread.start()
    beside = other.probe()
    thread.join(60)
    row["all_the_time_s"] = time.perf_counter() - began
    ended.set()
    row["prefetching_s"] = prefetch.spent_ns / 1e9
    row["came"] = prefetch.pages
    fetched = set_.pool.statistics()["pages_fetched"]
    row["from_memory_s"] = set_.read()
    assert set_.pool.statistics()["pages_fetched"] == fetched, "read from the tier"
    for name, took in (("idle", idle), ("beside", beside)):
        row[f"{name}_p50_us"], row[f"{name}_p99_us"] = took[PROBES // 2], took[PROBES * 99 // 100]
    return row


def _sequence() -> dict[str, dict[str, int]]:
    """Look at all pages of a program whose swap is in a tier, again and again."""
    sys.path.insert(0, str(ROOT))
    from tests.groups import Groups, set_limit
    from tests.nbd.test_shrink import filled

    passes: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(workplace())
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        stack.callback(_tmem, "stop")
        _tmem("start", "-d", "--memory", "256M")
        stack.callback(_tmem, "swap", "remove", "local")
        tier = f"{stack.enter_context(workplace(DISK))}/"
        added = ("swap", "add", "local", "--size", "256M", "--attach", "--force", "--priority", "32767")
        device = _tmem(*added, "--tier", tier).splitlines()[0]
        stack.callback(swap.off, device)
        segment = _native.attach(str(SegmentPaths("default", directory).segment))
        stack.callback(segment.close)
        _tmem("set", "local", "--cap", "6M")
        group = stack.enter_context(Groups()).make(24 * MIB)
        hog = stack.enter_context(filled(group, 64 * MIB))
        client = segment.client("local")
        (pool,) = client.pools()

        def look(name: str) -> None:
            before, began = pool.statistics(), time.perf_counter()
            in_tier = before["tier_pages"]
            assert hog.bad_pages() == 0
            took_ms = round((time.perf_counter() - began) * 1e3)
            now = pool.statistics()
            keys = ("gets", "pages_fetched", "puts", "pages_prefetched")
            passes[name] = {key: now[key] - before[key] for key in keys} | {"in_tier": in_tier, "ms": took_ms}
            print(f"  {name}: {passes[name]}", flush=True)

        def gone() -> bool:
            return client.statistics()["tier_pages"] > 4000

        wait_until(gone, "pages are in the tier", 60)
        client.cap_bytes = 0
        look("small group, first")
        look("small group, second")
        wait_until(lambda: client.statistics()["tier_pages"] == 0, "pages come back", 60)
        look("small group, once pages came back")
        client.cap_bytes = 6 * MIB
        wait_until(gone, "pages are in the tier again", 60)
        client.cap_bytes = 0
        set_limit(group, 160 * MIB)
        look("large group, first")
        look("large group, second")
    return passes
