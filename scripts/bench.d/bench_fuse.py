"""Precache hits beside bindfs on a lower file in the page cache: 1 MiB sequential and 4 KiB random reads.

Client and daemons are pinned: on the same CPU, then on two, because the placement decides every ratio.
"""

import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import medians, paired_ratio, take_turns, wait_until, workplace

from tmem.backends import _native
from tmem.fs.mounts import statistics as mount_statistics

SIZE = 128 << 20
SEQUENTIAL = "1M sequential, buffered"
TARGET = 1.0  # of buffered bindfs


def real_file(path: Path) -> None:
    """Fill `path` with the machine's own libraries and programs: data as real files have it."""
    left = SIZE
    with path.open("wb") as out:
        libraries = Path("/usr/lib/x86_64-linux-gnu").glob("*.so*")
        for source in [*sorted(libraries), *sorted(Path("/usr/bin").iterdir())]:
            if left and source.is_file() and not source.is_symlink():
                left -= out.write(source.read_bytes()[:left])
    if left:
        raise RuntimeError("this machine has too few programs to make a file of")


@contextmanager
def mounts(directory: Path) -> Iterator[dict[str, Path]]:
    """Mount bindfs and the overlay over one lower directory; yield name -> mount point."""
    lower = directory / "lower"
    points = {name: directory / name for name in ("tmem", "bindfs")}
    for path in (lower, *points.values()):
        path.mkdir()
    real_file(lower / "file")
    os.environ["TMEM_RUNTIME_DIR"] = str(directory)
    segment = _native.create(str(directory / "bench"), 512 << 20)
    tmem = [sys.executable, "-m", "tmem", "--name", "bench"]
    with ExitStack() as stack:
        stack.callback(segment.close)
        subprocess.run(["bindfs", str(lower), str(points["bindfs"])], check=True)
        stack.callback(subprocess.run, ["umount", str(points["bindfs"])], check=True)
        subprocess.run([*tmem, "mount", str(lower), str(points["tmem"]), "-o", "client=bench"], check=True)
        stack.callback(subprocess.run, [*tmem, "umount", str(points["tmem"])], check=True)
        yield points


def _daemons(points: dict[str, Path]) -> list[int]:
    """Return the pids of both daemons."""
    found = subprocess.run(
        ["pgrep", "-f", f"^bindfs .*{points['bindfs']}$"], capture_output=True, text=True, check=True
    )
    return [int(found.stdout.split()[0]), int(os.getxattr(points["tmem"], b"user.tmem.pid"))]


def _sequential(path: Path, flags: int) -> Callable[[], float]:
    buffer = mmap.mmap(-1, 1 << 20)  # aligned: an unaligned megabyte is two requests

    def measure() -> float:
        fd = os.open(path, os.O_RDONLY | flags)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            start, total = time.perf_counter(), 0
            while got := os.readv(fd, [buffer]):
                total += got
            seconds = time.perf_counter() - start
        finally:
            os.close(fd)
        if total != SIZE:
            raise RuntimeError(f"{path} gave {total} bytes instead of {SIZE}")
        return total / seconds

    return measure


def _random(path: Path) -> Callable[[], float]:
    buffer = mmap.mmap(-1, 4096)

    def measure() -> float:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        generator, taken = random.Random(1), []
        try:
            for _ in range(4000):
                offset = generator.randrange(SIZE // 4096) * 4096
                start = time.perf_counter()
                os.preadv(fd, [buffer], offset)
                taken.append(time.perf_counter() - start)
        finally:
            os.close(fd)
        return 1 / statistics.median(taken)

    return measure


def run(rounds: int) -> dict[str, object]:
    """Measure both placements; bytes or operations a second by peer, and the ratios."""
    results: dict[str, object] = {}
    with workplace() as directory, mounts(directory) as points:
        files = {name: point / "file" for name, point in points.items()}
        for path in files.values():  # the first reads fill the pool and the page cache
            _sequential(path, 0)()
            _sequential(path, 0)()
        (points["bindfs"].parent / "lower" / "file").read_bytes()  # the overlay drops what it put
        before = mount_statistics(points["tmem"])
        for placement, cpu in (("same CPU", 0), ("other CPU", 1)):
            os.sched_setaffinity(0, {0})
            for pid in _daemons(points):
                subprocess.run(["taskset", "-apc", str(cpu), str(pid)], check=True, stdout=subprocess.DEVNULL)
            cases: dict[str, dict[str, Callable[[], float]]] = {
                SEQUENTIAL: {name: _sequential(path, 0) for name, path in files.items()},
                "1M sequential, O_DIRECT": {
                    name: _sequential(path, os.O_DIRECT) for name, path in files.items()
                },
                "4k random, O_DIRECT": {name: _random(path) for name, path in files.items()},
            }
            for case, peers in cases.items():
                taken = take_turns(peers, rounds)
                ratio = paired_ratio(taken["tmem"], taken["bindfs"])
                results[f"{case}, {placement}"] = {
                    "rate": medians(taken),
                    "rounds": taken,
                    "ratios": {"bindfs": ratio},
                }
                verdict = f"target {TARGET} {'reached' if ratio >= TARGET else 'MISSED'}"
                verdict = verdict if case == SEQUENTIAL else ""
                print(f"  {case:25} {placement:10} {ratio:5.2f} of bindfs  {verdict}", flush=True)
        after = mount_statistics(points["tmem"])
        missed = after.miss_pages - before.miss_pages
        print(f"  the overlay served {after.hit_pages - before.hit_pages} pages as hits, {missed} missed")
        results["missed_pages"] = missed
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    wait_until(lambda: not directory.exists(), "the end of the benchmark's directory")
    return results
