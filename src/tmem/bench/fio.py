"""Runs fio, which does the I/O, and reads what it says. One measurement a call. One thread."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

from tmem.bench.results import Sample
from tmem.errors import TmemError

DATA = ("--buffer_compress_percentage=63", "--buffer_compress_chunk=64", "--refill_buffers")
"""What LZ4 makes 2.2 : 1 of, and takes as long for as for pages of programs; fresh bytes for every write.

A page takes 5.7 us to compress and 1.4 to expand, one of a program 5.2 and 1.8. With a chunk a page it would
be one run of zeros after random bytes: there LZ4 finds matches 9 to 15 bytes back and expands them in 3.2 us.
"""

PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 99.95, 99.99)

INSTALL = "apt-get install fio"


@cache
def lacks(engine: str) -> str | None:
    """Return why fio cannot use that I/O engine here, None if it can."""
    if shutil.which("fio") is None:
        return f"fio is not installed: {INSTALL}"
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout.split()
    if engine not in engines:
        return f"this fio has no {engine} engine: {INSTALL}, which has it on Debian and Ubuntu"
    return None


def run(arguments: Sequence[str], cpus: Sequence[int] | None = None) -> dict[str, object]:
    """Run fio, on `cpus` if given, and return its first job's results; TmemError if it fails."""
    pinned = [] if cpus is None else [f"--cpus_allowed={','.join(map(str, cpus))}"]
    argv = [
        "fio",
        "--name=job",
        "--output-format=json",
        "--thread",
        *pinned,
        *arguments,
    ]  # one process to end
    argv.append(f"--percentile_list={':'.join(map(str, PERCENTILES))}")
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, start_new_session=True
    )
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise TmemError(f"fio failed: {lines[-1] if lines else done.returncode}")
    # It may print notes before the document.
    document = json.loads(done.stdout[done.stdout.index("{") :])
    job: dict[str, object] = document["jobs"][0]
    return job


def sample(job: dict[str, object], bandwidth: bool = False) -> Sample:
    """Return requests a second (or MB/s) and the times of requests, of the side that did something."""
    sides = [side for name in ("read", "write") if isinstance(side := job[name], dict)]
    side = max(sides, key=lambda one: one["total_ios"])
    times = side["clat_ns"].get("percentile", {})
    return Sample(
        side["bw_bytes"] / 1e6 if bandwidth else float(side["iops"]),
        {f"{float(name):g}": value / 1000 for name, value in times.items()},
        {"mean_us": side["clat_ns"]["mean"] / 1000},
    )


def timed(seconds: float) -> list[str]:
    """Return the arguments that make a job last so long."""
    return [f"--runtime={max(1, round(seconds * 1000))}ms", "--time_based"]
