"""Hit ratio over the size of the cache: the store beside published policies, on accesses made for it.

The store gets and puts real pages; the others are simulated page by page with the same room. "tmem" keeps raw
pages, as many as they do, so that policies are compared; "tmem, LZ4" has the same memory and compresses,
which is what users get. The accesses are a Zipf law, scans and a loop: each the weak side of some
policy. For block traces there is scripts/replay. Deterministic, so one round; needs no root.
"""

import random
from bisect import bisect
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

from tmem.bench import contents, replaying
from tmem.bench.caches import PEERS
from tmem.bench.grounds import workplace
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import OURS, Outcome, Sample, Series, comparisons

COMPRESSED = f"{OURS}, LZ4"
CHART = "hit ratio"
_SIZES, _QUICK_SIZES = (1, 5, 10, 20, 40), (5, 20)
_BEATEN = {"LRU": 1.0, "S3-FIFO": 0.98}
"""Chunks of 15 pages are coarser than pages: which of two policies suits so few pages is partly chance."""


def accesses(seed: int) -> Iterator[int]:
    """Yield page numbers: a Zipf law of 12,000 pages, and between them scans and a loop."""
    rng = random.Random(seed)
    weights = list(accumulate(1 / (rank + 1) ** 0.9 for rank in range(12_000)))
    places = list(range(12_000))
    rng.shuffle(places)
    scanned = 100_000
    for part in range(24):
        for _ in range(5_000):
            yield places[min(bisect(weights, rng.random() * weights[-1]), 11_999)]
        if part % 3 == 1:
            yield from range(scanned, scanned + 2_000)
            scanned += 2_000
        if part % 3 == 2:
            yield from range(50_000, 52_000)


def _sizes(effort: Effort) -> tuple[int, ...]:
    return _QUICK_SIZES if effort.quick else _SIZES


def plan(effort: Effort) -> Plan:
    """Say what is needed."""
    sizes = _sizes(effort)
    return Plan(
        memory_bytes=512 << 20,
        disk_bytes=0,
        steps=len(sizes) * (len(PEERS) + 2),
        about_s=len(sizes) * 10,
        says="accesses to 30,000 pages replayed through a segment, and through simulated caches",
    )


def run(effort: Effort, step: Step) -> Outcome:
    """Replay at every size."""
    pages = list(accesses(1))
    footprint = len(set(pages))
    stock = contents.collect()
    page_of = lru_cache(1 << 16)(lambda number: contents.page_of(number, stock))
    outcome = Outcome(notes={"accesses": len(pages), "pages": footprint})
    bounds = {OURS: replaying.Bound.PAGES, COMPRESSED: replaying.Bound.MEMORY}
    with workplace() as directory:
        for percent in _sizes(effort):
            room, case = footprint * percent // 100, f"hits, room for {percent} % of the pages"
            found: dict[str, int] = {}
            for name, bound in bounds.items():
                step(f"{case}: {name}")
                found[name] = replaying.replay(pages, room, bound, page_of, directory).hits
            for name, simulate in PEERS.items():
                step(f"{case}: {name}")
                found[name] = simulate(pages, room)
            of_case = [
                Series(case, name, "%", (Sample(100 * hits / len(pages)),), CHART, percent)
                for name, hits in found.items()
            ]
            outcome.series += of_case
            judged = [one for one in of_case if one.peer != COMPRESSED]
            outcome.rows += comparisons(judged, targets=_BEATEN)
    return outcome


PART = Part("hits", "Hit ratio over cache size", plan, run)
