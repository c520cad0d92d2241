"""Reads through the overlay beside bindfs and mergerfs, on a lower file in the page cache: hits and misses.

Client and daemons are pinned: on the same CPU, then on two, because the placement decides every ratio. What
the scheduler makes of it comes third, without a verdict. A hit decompresses; the peers copy from the lower's
page cache; the floor (`floor`) does next to nothing. Not for names and attributes: `bench_tree`.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import judged, medians, paired_ratio, take_turns
from floor import FLOORS, HITS, MISSES, STREAMS, Floor
from reader import Reader, rate

from tmem.backends import _native
from tmem.bench.files import real_file
from tmem.bench.fuse import fill
from tmem.bench.grounds import workplace
from tmem.bench.mounts import (
    SEGMENT,
    Mounted,
    Placement,
    drop,
    ext4,
    mounted,
    placements,
    rings_permitted,
)
from tmem.fs.mounts import statistics as mount_statistics

PAGE = 4096
MEGABYTE = 1 << 20
PEERS = ("bindfs", "bindfs -mt", "mergerfs")
OURS = ("tmem", "tmem io_uring", "tmem plain")
"""As it comes, with requests over io_uring, and with the event loop alone, which has no targets."""
UNJUDGED = OURS[2]
SUFFIXES = {OURS[0]: "", OURS[1]: ", io_uring", UNJUDGED: ", plain path"}

TARGETS = {
    ("4k random, 1 client", "bindfs"): 1.0,
    ("4k random, 4 clients", "bindfs"): 1.5,
    ("4k random, 4 clients", "bindfs -mt"): 1.5,
    ("1M sequential", "bindfs"): 1.3,
    ("1M sequential", "bindfs O_DIRECT"): 0.9,
}
MISS_TARGET = 1.0
"""Of the time allowed: 1.5 times that of bindfs, plus that of the lower file."""


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    rounds: int = 7
    file: int = 128 << 20
    reads: int = 10_000
    """Requests of 4 KiB a round; four times as many by four clients."""
    misses: int = 500
    """A round reads as many pages that nobody has read before through the overlay."""


QUICK = Sizes(rounds=3, file=32 << 20, reads=3000, misses=200)


class Bench:
    """The mounts over one lower directory with two files: one that is in the pool, one that is not."""

    def __init__(
        self,
        lower: Path,
        ours: Sequence[str],
        mounts: Mapping[str, Mounted],
        reader: Reader,
        sizes: Sizes,
    ) -> None:
        self.lower = lower
        self.ours = ours
        self.mounts = mounts
        self.sizes = sizes
        self._reader = reader
        self._missed = 0
        self.daemon_us: dict[str, list[float]] = {}
        """By what was measured: the daemon's CPU time a request, round by round."""

    def pin(self, placement: Placement) -> None:
        """Have all daemons run there."""
        for mount in self.mounts.values():
            mount.pin(placement.daemons)

    def hit_file(self, name: str) -> Path:
        """Return the path of the file whose pages are in the pool, as the peer sees it."""
        return self.mounts[name].point / "hit"

    def fill(self) -> None:
        """Read until the pool has the whole file; then have the lower's page cache hold it, too."""
        for name in self.ours:
            fill(self.hit_file(name), lambda path: self._reader([path], "sequential", MEGABYTE))
        self.warm()

    def warm(self) -> None:
        """Have the page cache hold all lower files: the overlay drops what it has put."""
        for path in self.lower.glob("*"):
            if path.is_file():
                self._reader([path], "sequential", MEGABYTE)

    def random(self, name: str, threads: int, placement: Placement) -> float:
        """Return the reads a second of 4 KiB anywhere in the file that is in the pool."""
        count = self.sizes.reads * threads
        before = self.mounts[name].cpu_seconds()
        figures = self._reader(
            [self.hit_file(name)],
            "random",
            PAGE,
            threads=threads,
            count=count,
            warm=count // 10,
            direct=True,
            cpus=placement.clients,
        )
        used = self.mounts[name].cpu_seconds() - before
        case = f"4k random, {threads} clients, {placement.name}, {name}"
        self.daemon_us.setdefault(case, []).append(used * 1e6 / (count + count // 10))
        return rate(figures)

    def sequential(self, name: str, size: int, placement: Placement) -> float:
        """Return the reads a second of `size`, one after the other."""
        peer, _, direct = name.partition(" O_DIRECT")
        path = self.hit_file(peer + direct)
        drop([path])
        return rate(self._reader([path], "sequential", size, direct=name != peer, cpus=placement.clients))

    def miss_times(self, placement: Placement, cold: bool) -> dict[str, float]:
        """Return the mean us of reading the same pages, new to the overlay, at each place."""
        taken: dict[str, float] = {}
        file = self.lower / "miss"
        for name, where, is_cold in (
            ("lower", self.lower, cold),
            ("bindfs", self.mounts["bindfs"].point, False),  # its own time, without the lower's
            ("bindfs, as cold", self.mounts["bindfs"].point, cold),
            *((name, self.mounts[name].point, cold) for name in (*self.ours, *MISSES)),
        ):
            if is_cold:
                drop([file])
            else:
                self._reader([file], "sequential", MEGABYTE)
            figures = self._reader(
                [where / "miss"],
                "fresh",
                PAGE,
                count=self.sizes.misses,
                skip=self._missed,
                direct=where != self.lower,
                cpus=placement.clients,
            )
            taken[name] = figures["mean_us"]
        self._missed += self.sizes.misses
        return taken


@contextmanager
def bench(
    sizes: Sizes,
    ours: Sequence[str] = OURS,
    peers: Sequence[str] = PEERS,
    floors: Sequence[str] = FLOORS,
) -> Iterator[Bench]:
    """Mount all of these over one lower directory."""
    with workplace() as directory, ExitStack() as stack:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        lower = stack.enter_context(
            ext4(directory / "image", directory / "lower", 3 * sizes.file + (64 << 20))
        )
        # Pages that were never missed are needed in each round: placements, both kinds, one spare.
        misses = (sizes.rounds + 1) * 6 * sizes.misses * PAGE
        real_file(lower / "hit", sizes.file)
        real_file(lower / "miss", min(max(misses, 4 * MEGABYTE), 2 * sizes.file))
        memory = 7 * sizes.file + (64 << 20)
        segment = _native.create(str(directory / SEGMENT), memory)
        stack.callback(segment.close)
        segment.populate(memory * 3 // 4)  # as the manager keeps a reserve: all that is put here
        with rings_permitted():
            mounts = {
                name: stack.enter_context(mounted(name, lower, directory / name.replace(" ", "")))
                for name in (*ours, *peers)
            }
            floor = Floor(directory)
            for name in floors:
                point = directory / name.replace(" ", "")
                mounts[name] = stack.enter_context(mounted(name, lower, point, command=floor.command(name)))
        made = Bench(lower, ours, mounts, Reader(directory), sizes)
        made.fill()
        yield made


def _passed_through(mount: Mounted) -> int:
    """Return the reads that the overlay did not even ask the pool for, and say so: they are no misses."""
    count = mount_statistics(str(mount.point)).passthrough_reads
    if count:
        print(f"  {mount.name} stepped aside for {count} reads")
    return count


def _hits(made: Bench, placement: Placement) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    one, four = 1, 4
    cases: dict[str, dict[str, Callable[[], float]]] = {
        "4k random, 1 client": {
            name: partial(made.random, name, one, placement) for name in (*OURS, "bindfs", "mergerfs", *HITS)
        },
        "4k random, 4 clients": {
            name: partial(made.random, name, four, placement) for name in (*OURS, *PEERS, *HITS)
        },
        "128K sequential": {
            name: partial(made.sequential, name, MEGABYTE // 8, placement)
            for name in (*OURS, "bindfs", "bindfs O_DIRECT", *STREAMS)
        },
        "1M sequential": {
            name: partial(made.sequential, name, MEGABYTE, placement)
            for name in (*OURS, "bindfs", "bindfs O_DIRECT", "mergerfs", *STREAMS)
        },
    }
    for case, peers in cases.items():
        taken = take_turns(peers, made.sizes.rounds)
        for ours in OURS:
            for peer in (peer for peer in peers if peer not in OURS and peer not in HITS):
                target = TARGETS.get((case, peer)) if ours != UNJUDGED else None
                if ours == UNJUDGED and (case, peer) not in TARGETS:
                    continue  # of the plain path only what the others are judged by
                rows.append(
                    judged(
                        case + SUFFIXES[ours],
                        placement.name,
                        paired_ratio(taken[ours], taken[peer]),
                        peer,
                        target if placement.name != "any CPU" else None,
                    )
                )
        rows += [
            judged(f"{case}, {floor}", placement.name, paired_ratio(taken[floor], taken["bindfs"]), "bindfs")
            for floor in HITS
            if floor in taken
        ]
        rows.append({"case": case, "placement": placement.name, "rate": medians(taken), "rounds": taken})
    return rows


def _misses(made: Bench, placement: Placement, cold: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    rounds: dict[str, list[float]] = {}
    for _ in range(made.sizes.rounds):
        for name, value in made.miss_times(placement, cold).items():
            rounds.setdefault(name, []).append(value)
    case = f"4k miss, lower {'cold' if cold else 'in page cache'}"
    beside = case + SUFFIXES[made.ours[0]]
    allowed = [1.5 * peer + lower for peer, lower in zip(rounds["bindfs"], rounds["lower"], strict=True)]
    for ours in made.ours:
        target = MISS_TARGET if ours != UNJUDGED and placement.name != "any CPU" else None
        ratio = paired_ratio(allowed, rounds[ours])
        rows.append(judged(case + SUFFIXES[ours], placement.name, ratio, "the time allowed", target))
    rows += [
        judged(f"{beside}, {floor}", placement.name, paired_ratio(allowed, rounds[floor]), "the time allowed")
        for floor in MISSES
    ]
    rows.append({"case": beside, "placement": placement.name, "mean_us": medians(rounds), "rounds": rounds})
    return rows


def run(sizes: Sizes) -> dict[str, object]:
    """Measure all placements; every row and every round, and what the overlay counted as hits and misses.

    Misses of each of ours have mounts of their own: beside one over io_uring the others' take 4 % longer.
    """
    rows: list[dict[str, object]] = []
    with bench(sizes) as made:
        before = {name: mount_statistics(str(made.mounts[name].point)) for name in OURS}
        for placement in placements():
            made.pin(placement)
            rows += _hits(made, placement)
        after = {name: mount_statistics(str(made.mounts[name].point)) for name in OURS}
        missed = {name: after[name].miss_pages - before[name].miss_pages for name in OURS}
        if any(missed.values()):
            print(f"  among the hits were misses, in pages: {missed}")
        for case, values in made.daemon_us.items():
            print(f"  CPU of the daemon: {case:45} {statistics.median(values):6.1f} us a request")
        daemon_us = made.daemon_us
    turned_down = {}
    for name in OURS:
        with bench(sizes, [name], ["bindfs"], MISSES) as made:
            for placement in placements():
                made.pin(placement)
                for cold in (False, True):
                    rows += _misses(made, placement, cold)
            turned_down[name] = _passed_through(made.mounts[name])
    return {
        "rows": rows,
        "missed_pages": missed,
        "passed_through_reads": turned_down,
        "daemon_us": daemon_us,
    }
