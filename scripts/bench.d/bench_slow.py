"""The overlay in front of slow storage (`slowdisk`): first and second reads, and too little memory for the
data.

*First and second reads*: the lower's page cache of the files that are read is dropped before each pass (by
POSIX_FADV_DONTNEED, file by file: other users of the machine keep theirs), so a pass is as fast as the disk,
or as the pool. Each round begins with a mount that has nothing. The first pass may differ from later ones in
what is kept: so a third is shown.

*Too little memory*: a working set of real files, twice as large as the memory for page cache and pool
together. The page cache alone: the reader runs in a memory control group of `memory` bytes, on the lower
directory. With the overlay: a segment of S bytes, and reader and daemon together in a group of `memory` - S,
so that what the lower leaves in the page cache, for whomever, is paid for. The segment is filled from outside
the group, and its size is exact (index included); so the sum is the same, however it is split. Not counted,
and printed: the daemon's own memory from before it joins, its program. What it allocates later does count.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import judged, medians, paired_ratio
from reader import Reader, rate
from slowdisk import slow_ext4

from tmem.backends import _native
from tmem.bench.files import real_file, real_files, tree
from tmem.bench.grounds import memory_group, workplace
from tmem.bench.mounts import SEGMENT, Mounted, drop, mounted
from tmem.bench.rounds import in_turn
from tmem.fs.mounts import statistics as mount_statistics

FIRST_TARGET = 0.9
SECOND_TARGET = 30.0
SMALL_MEMORY_TARGET = 1.5
THREADS = 8
BLOCK = 16 << 10
PATTERNS = ("random", "zipf", "mixed")
"""All blocks alike; some much more often (as YCSB has it); the same beside a scan over everything."""


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    rounds: int = 3
    file: int = 64 << 20
    pages: int = 400
    """Random reads of 4 KiB a round."""
    small_files: int = 300
    memory: int = 128 << 20
    """For page cache and pool together."""
    rest: int = 20 << 20
    """What the page cache and the daemon get of that when there is a pool: up to 11 MiB of them cannot be
    taken back, and the daemon is killed without them."""
    turns: int = 3


QUICK = Sizes(rounds=1, file=24 << 20, pages=100, small_files=60, memory=48 << 20, rest=12 << 20, turns=1)


@dataclass(frozen=True)
class Case:
    """One way to read."""

    name: str
    pattern: str
    block: int
    place: str
    count: int = 0

    def files(self, root: Path) -> list[Path]:
        """Return what is read below `root`."""
        place = root / self.place
        return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


@contextmanager
def populated_segment(directory: Path, size: int) -> Iterator[None]:
    """Make a segment of `size` bytes, all of it in memory already; destroy it afterwards."""
    path = str(directory / SEGMENT)
    segment = _native.create(path, size)
    try:
        segment.populate(size)
        yield
    finally:
        segment.close()
        _native.destroy(path)


def _reads(directory: Path, lower: Path, reader: Reader, sizes: Sizes) -> list[dict[str, object]]:
    """Measure first, second and third reads of everything; the rows."""
    rows: list[dict[str, object]] = []
    for case in (
        Case("sequential, 128 KiB a read", "sequential", 128 << 10, "file0"),
        Case("sequential, 1 MiB a read", "sequential", 1 << 20, "file1"),
        Case("random, 4 KiB a read", "fresh", 4096, "file2", sizes.pages),
        Case("small files: open, read, close", "files", 64 << 10, "small"),
    ):
        rounds: dict[str, list[float]] = {name: [] for name in ("lower", "first", "second", "third")}

        def once(root: Path, case: Case = case) -> float:
            drop(case.files(lower))
            return rate(reader(case.files(root), case.pattern, case.block, count=case.count))

        for name in in_turn(["lower", "tmem"], sizes.rounds):
            if name == "lower":
                rounds["lower"].append(once(lower))
                continue
            with (
                populated_segment(directory, 4 * sizes.file + (64 << 20)),
                mounted("tmem", lower, directory / "tmem") as mount,
            ):
                for number in ("first", "second", "third"):
                    rounds[number].append(once(mount.point))
        for number, target in (("first", FIRST_TARGET), ("second", SECOND_TARGET), ("third", None)):
            ratio = paired_ratio(rounds[number], rounds["lower"])
            rows.append(judged(case.name, number, ratio, "the lower", target))
        rows.append({"case": case.name, "rate": medians(rounds), "rounds": rounds})
    return rows


def _patterns(files: Sequence[Path], reader: Reader, group: Path, seed: int) -> dict[str, dict[str, float]]:
    """Read in all patterns, one after the other, in what the one before has left; figures by pattern."""
    nblocks = sum(-(-path.stat().st_size // BLOCK) for path in files)
    figures: dict[str, dict[str, float]] = {}
    for pattern in PATTERNS:
        figures[pattern] = reader(
            files, pattern, BLOCK, threads=THREADS, warm=nblocks, count=nblocks, seed=seed, group=group
        )
    return figures


def _join(mount: Mounted, group: Path) -> int:
    """Move the daemon into the group; the bytes of its own that stay outside."""
    (group / "cgroup.procs").write_text(str(mount.pid))
    status = Path(f"/proc/{mount.pid}/status").read_text()
    return int(dict(line.split(":", 1) for line in status.splitlines())["RssAnon"].split()[0]) << 10


def _small_memory(directory: Path, lower: Path, reader: Reader, sizes: Sizes) -> list[dict[str, object]]:
    """Measure a working set of twice the memory with and without the pool; the rows."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {"page cache": [], "tmem": []}
    names = [path.name for path in sorted((lower / "set").iterdir())]
    outside, counted = 0, {}
    for turn, name in enumerate(in_turn(list(found), sizes.turns)):
        drop(lower / "set" / name for name in names)
        with ExitStack() as stack:
            limit = sizes.memory if name == "page cache" else sizes.rest
            group = stack.enter_context(memory_group(limit))
            root = lower
            if name == "tmem":
                stack.enter_context(populated_segment(directory, sizes.memory - sizes.rest))
                mount = stack.enter_context(mounted("tmem", lower, directory / "tmem"))
                outside = _join(mount, group)
                root = mount.point
            files = [root / "set" / file for file in names]
            found[name].append(_patterns(files, reader, group, seed=1 + turn // 2))
            if name == "tmem":
                statistics = mount_statistics(str(root))
                counted = {"hit_pages": statistics.hit_pages, "miss_pages": statistics.miss_pages}
                drop(files)
    rows: list[dict[str, object]] = []
    for pattern in PATTERNS:
        rates = {name: [rate(turn[pattern]) for turn in turns] for name, turns in found.items()}
        ratio = paired_ratio(rates["tmem"], rates["page cache"])
        case = f"twice the memory, {pattern} {BLOCK >> 10} KiB"
        rows.append(judged(case, f"{THREADS} clients", ratio, "the page cache", SMALL_MEMORY_TARGET))
        rows.append({"case": case, "rate": medians(rates), "rounds": rates})
    print(f"  not counted: {outside >> 20} MiB of the daemon's own; the pool counted {counted}")
    rows.append({"case": "raw", "found": found, "daemon_bytes": outside, "pages": counted})
    return rows


def run(sizes: Sizes) -> dict[str, object]:
    """Measure both; every row and every round."""

    def fill(root: Path) -> None:
        for number in range(3):
            real_file(root / f"file{number}", sizes.file)
        (root / "small").mkdir()
        tree(root / "small", sizes.small_files, 10)
        (root / "set").mkdir()
        real_files(root / "set", 2 * sizes.memory)

    size = 4 * sizes.file + 2 * sizes.memory + (256 << 20)
    with workplace() as directory:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        with slow_ext4(directory, size, fill) as slow:
            reader = Reader(directory)
            rows = _reads(directory, slow.lower, reader, sizes)
            rows += _small_memory(directory, slow.lower, reader, sizes)
    return {"rows": rows}
