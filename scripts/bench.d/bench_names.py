"""Names that the kernel does not have at hand, on slow storage (`slowdisk`): who looks at them, and walks.

Before each measurement the lower file system is unmounted and mounted again, so nothing of it is in memory;
then one client or eight look at files in random order (stat), or walk through directories of their own. No
target: the lower itself is the measure, and mergerfs, which has a thread for each CPU.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench_slow import populated_segment
from common import judged, medians, paired_ratio
from slowdisk import Slow, slow_ext4

from tmem.bench.grounds import workplace
from tmem.bench.mounts import mounted
from tmem.bench.rounds import in_turn

CLIENTS = (1, 8)
PEERS = ("lower", "mergerfs", "tmem")
SEGMENT_BYTES = 64 << 20
IMAGE_BYTES = 128 << 20


@dataclass(frozen=True)
class Sizes:
    """How much there is to look at."""

    rounds: int = 3
    directories: int = 300
    files: int = 5
    """In each directory."""
    looks: int = 800


QUICK = Sizes(rounds=1, looks=300)


def _together(work: Callable[[Path], object], paths: Sequence[Path], clients: int) -> float:
    """Return the paths a second that so many clients at a time do."""
    threads = [
        threading.Thread(target=lambda part: [work(path) for path in part], args=(paths[first::clients],))
        for first in range(clients)
    ]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(paths) / (time.monotonic() - begun)


def _looks(root: Path, sizes: Sizes, clients: int) -> float:
    paths = [root / f"d{d}" / f"f{f}" for d in range(sizes.directories) for f in range(sizes.files)]
    random.Random(1).shuffle(paths)
    return _together(os.stat, paths[: sizes.looks], clients)


def _walk(directory: Path) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat()


def _walks(root: Path, sizes: Sizes, clients: int) -> float:
    paths = [root / f"d{d}" for d in range(sizes.directories)]
    return _together(_walk, paths, clients)


def _measure(directory: Path, slow: Slow, name: str, one: Callable[[Path], float]) -> float:
    slow.remount()
    if name == "lower":
        return one(slow.lower)
    with populated_segment(directory, SEGMENT_BYTES), mounted(name, slow.lower, directory / name) as mount:
        return one(mount.point)


def run(sizes: Sizes) -> dict[str, object]:
    """Measure all; every row and every round."""

    def fill(root: Path) -> None:
        for number in range(sizes.directories):
            (root / f"d{number}").mkdir()
            for file in range(sizes.files):
                (root / f"d{number}" / f"f{file}").write_bytes(os.urandom(3000))

    rows: list[dict[str, object]] = []
    with workplace() as directory:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        with slow_ext4(directory, IMAGE_BYTES, fill) as slow:
            for case, work in (("stat, in random order", _looks), ("directories walked through", _walks)):
                for clients in CLIENTS:
                    rounds: dict[str, list[float]] = {name: [] for name in PEERS}
                    for name in in_turn(list(PEERS), sizes.rounds):
                        one = partial(work, sizes=sizes, clients=clients)
                        rate = _measure(directory, slow, name, one)
                        rounds[name].append(rate)
                    for peer in ("lower", "mergerfs"):
                        ratio = paired_ratio(rounds["tmem"], rounds[peer])
                        rows.append(
                            judged(case, f"{clients} client{'s' * (clients > 1)}", ratio, f"the {peer}")
                        )
                    rows.append({"case": case, "clients": clients, "rate": medians(rounds), "rounds": rounds})
    return {"rows": rows}
