"""Save and restore beside dd of as many bytes in the same place, and how long a client stands still."""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import medians, paired_ratio, take_turns

from tmem.backends import _native, handoff, save, streams
from tmem.bench.grounds import workplace

TARGET = 0.5
PAGE = 4096
_BATCH = 2048

_WRITER = """
import random, sys
from tmem.errors import PoolError
from tmem.backends import _native
path, pages = sys.argv[1], int(sys.argv[2])
client = _native.attach(path).client("guest", create=False)
device = _native.Device(client.pools()[0], bytes(24), pages * 4096)
rng = random.Random(1)
noise = rng.randbytes(1 << 20)
print("ready", flush=True)
while True:
    at = rng.randrange(1 << 19)
    try:
        device.pwrite(None, noise[at:at + 1600].ljust(4096, b"x"), rng.randrange(pages) * 4096, 0)
    except PoolError:
        break
"""
"""A client that writes as fast as it can, to any of its pages."""

_RECEIVER = """
import sys
from tmem.backends import _native, handoff
handoff.receive(lambda: _native.attach(sys.argv[1]), "other", 0, 1)
"""


def fill(segment: _native.Segment, size_bytes: int) -> int:
    """Give the client ``guest`` about `size_bytes` of pages that compress 2.5 to 1; their number."""
    pool = segment.client("guest").new_pool(persistent=True)
    rng = random.Random(1)
    data = b"".join(rng.randbytes(1600).ljust(PAGE, b"x") for _ in range(_BATCH))
    pages = 0
    while pool.statistics()["bytes"] < size_bytes:
        shift = rng.randrange(PAGE)  # so that no two batches are alike
        pages += pool.put(bytes(24), pages, data[shift:] + data[:shift])
    return pages


def drop_cache(path: Path) -> None:
    """Have the next reading of a file come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


class _Peers:
    """Save, restore and dd, each of them timed; MB/s."""

    def __init__(self, segment: _native.Segment, memory: Path, disk: Path) -> None:
        self._segment = segment
        self._other, self._memory = memory / "other", memory / "dd"
        self._file, self._copy = disk / "save", disk / "dd"
        self.save()
        self._copy_out()

    def save(self) -> float:
        self._file.unlink(missing_ok=True)
        began = time.perf_counter()
        with save.target(self._file) as descriptor:
            streams.past_the_cache(descriptor)
            save.save(self._segment, "bench", descriptor)
        return self._speed(began)

    def dd_write(self) -> float:
        self._copy.unlink(missing_ok=True)
        began = time.perf_counter()
        self._copy_out()
        return self._speed(began)

    def restore(self) -> float:
        drop_cache(self._file)
        target = _native.create(str(self._other), self._segment.memory_bytes)
        descriptor = os.open(self._file, os.O_RDONLY)
        try:
            began = time.perf_counter()
            save.restore(target, "other", descriptor, "the file")
            return self._speed(began)
        finally:
            os.close(descriptor)
            target.close()
            _native.destroy(str(self._other))

    def dd_read(self) -> float:
        drop_cache(self._copy)
        began = time.perf_counter()
        self._dd(f"if={self._copy}", "of=/dev/null")
        return self._speed(began)

    def dd_memory(self) -> float:
        """Like dd_read, but into fresh memory of a tmpfs, as a restore has to."""
        drop_cache(self._copy)
        began = time.perf_counter()
        self._dd(f"if={self._copy}", f"of={self._memory}")
        speed = self._speed(began)
        self._memory.unlink()
        return speed

    def _copy_out(self) -> None:
        blocks = self._file.stat().st_size >> 23
        self._dd("if=/dev/zero", f"of={self._copy}", f"count={blocks}", "conv=fsync")

    def _dd(self, *arguments: str) -> None:
        subprocess.run(["dd", "bs=8M", "status=none", *arguments], check=True)

    def _speed(self, began: float) -> float:
        return self._file.stat().st_size / 1e6 / (time.perf_counter() - began)


def stand_still(
    segment: _native.Segment, memory: Path, disk: Path, pages: int, rounds: int
) -> dict[str, list[float]]:
    """Save and hand over a client that writes all the time: how long it was frozen, in ms."""
    results: dict[str, list[float]] = {"save": [], "handoff": []}
    for _ in range(rounds):
        argv = [sys.executable, "-c", _WRITER, segment.path, str(pages)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout is not None
                writer.stdout.readline()
                with save.target(disk / "live", force=True) as descriptor:
                    streams.past_the_cache(descriptor)
                    (saved,) = save.save(segment, "bench", descriptor)
                results["save"].append(saved.frozen_s * 1000)
                results["handoff"].append(_hand_over(segment, memory / "other"))
            finally:
                writer.kill()
        # Back again, for the next round.
        fresh = _native.attach(str(memory / "other"))
        _hand_over(fresh, Path(segment.path), create=False)
        fresh.close()
        _native.destroy(str(memory / "other"))
    return results


def _hand_over(segment: _native.Segment, target: Path, create: bool = True) -> float:
    if create:
        _native.create(str(target), segment.memory_bytes).close()
    with handoff.receiver([sys.executable, "-c", _RECEIVER, str(target)]) as (answers, stream):
        return handoff.send(segment, "bench", "guest", answers, stream).frozen_s * 1000


def run(size_bytes: int, rounds: int) -> dict[str, object]:
    """Measure with about `size_bytes` of compressed pages; MB/s by peer, ratios, and ms of standing still."""
    with workplace() as memory, tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        disk = Path(name)
        segment = _native.create(str(memory / "bench"), size_bytes + size_bytes // 4 + (64 << 20))
        pages = fill(segment, size_bytes)
        peers = _Peers(segment, memory, disk)
        names = ("save", "dd_write", "restore", "dd_read", "dd_memory")
        speeds = take_turns({name: getattr(peers, name) for name in names}, rounds)
        frozen = stand_still(segment, memory, disk, pages, rounds)
        segment.close()
    speed = medians(speeds)
    ratios = {
        "save": paired_ratio(speeds["save"], speeds["dd_write"]),
        "restore": paired_ratio(speeds["restore"], speeds["dd_read"]),
    }
    for ours, peer, what in (("save", "dd_write", "fsync"), ("restore", "dd_read", "a cold cache")):
        verdict = "reached" if ratios[ours] >= TARGET else "MISSED"
        print(
            f"  {ours} of {pages} pages: {speed[ours]:.0f} MB/s, dd with {what} {speed[peer]:.0f}: "
            f"{ratios[ours]:.2f}   target {TARGET:g} {verdict}"
        )
    print(f"  dd from a cold cache into memory, for comparison: {speed['dd_memory']:.0f} MB/s")
    for what, values in medians(frozen).items():
        print(f"  {what} under a writer: it stood still for {values:.1f} ms")
    return {"pages": pages, "speeds_mb_s": speeds, "ratios": ratios, "frozen_ms": frozen}


if __name__ == "__main__":
    sys.exit("run scripts/bench save")
