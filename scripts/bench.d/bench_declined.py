"""Files that are not cached: reads and writes that the kernel passes through, beside those of a daemon.

Buffered, as programs read. bindfs keeps what it has read in the page cache a second time, until the next
open: each round begins without. Not for files that are cached: `bench_fuse`.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import judged, paired_ratio, take_turns
from reader import Reader, rate

from tmem.backends import _native
from tmem.bench.files import real_file
from tmem.bench.grounds import workplace
from tmem.bench.mounts import SEGMENT, Placement, drop, ext4, mounted, placements

PAGE = 4096
MEGABYTE = 1 << 20
OURS = "tmem declined"
PEERS = ("tmem declined, off", "bindfs", "lower")
TARGET = 1.0
"""Of bindfs."""


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    rounds: int = 7
    file: int = 128 << 20
    reads: int = 10_000


QUICK = Sizes(rounds=3, file=32 << 20, reads=3000)


def run(sizes: Sizes) -> dict[str, object]:
    """Measure every placement; every row and every round."""
    rows: list[dict[str, object]] = []
    with workplace() as directory, ExitStack() as stack:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        lower = stack.enter_context(
            ext4(directory / "image", directory / "lower", 2 * sizes.file + (64 << 20))
        )
        real_file(lower / "file", sizes.file)
        stack.callback(_native.create(str(directory / SEGMENT), 64 << 20).close)
        reader = Reader(directory)
        mounts = {
            name: stack.enter_context(
                mounted(name, lower, directory / name.replace(" ", "").replace(",", ""))
            )
            for name in (OURS, *PEERS)
            if name != "lower"
        }
        paths = {name: mount.point / "file" for name, mount in mounts.items()} | {"lower": lower / "file"}
        reader([lower / "file"], "sequential", MEGABYTE)  # warm

        def random(path: Path, placement: Placement) -> float:
            count = sizes.reads
            return rate(reader([path], "random", PAGE, count=count, warm=count // 10, cpus=placement.clients))

        def sequential(path: Path, placement: Placement) -> float:
            return rate(reader([path], "sequential", MEGABYTE, cpus=placement.clients))

        def fresh(read: Callable[[Path, Placement], float], name: str, placement: Placement) -> float:
            if name != "lower":
                drop([paths[name]])
                reader([lower / "file"], "sequential", MEGABYTE)  # what is dropped there may be so below
            return read(paths[name], placement)

        for placement in placements():
            for mount in mounts.values():
                mount.pin(placement.daemons)
            for case, read in (("4k random", random), ("1M sequential", sequential)):
                ways = {name: partial(fresh, read, name, placement) for name in (OURS, *PEERS)}
                taken = take_turns(ways, sizes.rounds)
                for peer in PEERS:
                    target = TARGET if peer == "bindfs" and placement.name != "any CPU" else None
                    ratio = paired_ratio(taken[OURS], taken[peer])
                    rows.append(judged(f"{case} of a declined file", placement.name, ratio, peer, target))
                rows.append({"case": case, "placement": placement.name, "reads a second": taken})
    return {"rows": rows}
