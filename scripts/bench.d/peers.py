"""The overlay and what it is measured beside, mounted over one lower directory; and who reads from them.

Every daemon runs in the foreground, so that its pid is known: it is pinned by it, and ended by it. The lower
file system is an ext4 on a loop device over an image in memory: its page cache can be warm or dropped as that
of any disk, and no disk of the machine decides the figures.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmem.bench.grounds import running, wait_until

SEGMENT = "bench"

_TMEM = [sys.executable, "-m", "tmem", "--name", SEGMENT, "mount", "-f", "-o"]
_COMMANDS = {
    "bindfs": ["bindfs", "-f"],
    "bindfs -mt": ["bindfs", "-f", "--multithreaded"],
    "mergerfs": ["mergerfs", "-f"],
    "tmem": [*_TMEM, "client=tmem"],
    "tmem declined": [*_TMEM, "client=declined,loop=native,skip_files=*"],
    "tmem declined, off": [*_TMEM, "client=off,loop=native,skip_files=*,passthrough=off"],
    "tmem plain": [*_TMEM, "client=plain,loop=fast"],
}


@dataclass(frozen=True)
class Placement:
    """Which CPUs clients and daemons may use."""

    name: str
    clients: frozenset[int]
    daemons: frozenset[int]


def placements() -> list[Placement]:
    """Return the two that decide every ratio, and what a scheduler makes of it, which has no target."""
    every = frozenset(os.sched_getaffinity(0))
    first, *others = sorted(every)
    found = [Placement("same CPU", frozenset({first}), frozenset({first}))]
    if others:
        found.append(Placement("other CPU", frozenset({first}), frozenset({others[0]})))
    return [*found, Placement("any CPU", every, every)]


@dataclass(frozen=True)
class Mounted:
    """One mount that is being served."""

    name: str
    point: Path
    pid: int

    def pin(self, cpus: Iterable[int]) -> None:
        """Have all threads of the daemon, and those that they start, run on `cpus`."""
        pin(self.pid, cpus)

    def cpu_seconds(self) -> float:
        """Return the CPU time that the daemon has used: on a busy machine it tells more than the clock."""
        return time.clock_gettime(~self.pid << 3 | 2)  # CPUCLOCK_SCHED of a process, see clock_getcpuclockid


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Have all threads of a process run on `cpus`."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cpus)


@contextmanager
def mounted(name: str, lower: Path, point: Path, cpus: Iterable[int] | None = None) -> Iterator[Mounted]:
    """Serve `lower` on `point` with the daemon called `name`, on `cpus`, while the block lasts."""
    point.mkdir(exist_ok=True)
    with running([*_COMMANDS[name], str(lower), str(point)], cpus=cpus) as process:

        def settled() -> bool:
            if process.poll() is not None:
                raise RuntimeError(
                    f"{name} ended with status {process.returncode} instead of mounting {point}"
                )
            return point.is_mount()

        wait_until(settled, f"the mount of {name}")
        try:
            point.stat()  # it answers
            yield Mounted(name, point, process.pid)
        finally:
            unmount(point)


def unmount(point: Path) -> None:
    """Unmount; lazily if something holds it, so that the daemon under it can be ended in any case."""
    if subprocess.run(["umount", str(point)], check=False, capture_output=True).returncode:
        subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)


@contextmanager
def ext4(image: Path, point: Path, size: int) -> Iterator[Path]:
    """Make an ext4 of `size` bytes in the file `image` and mount it on `point`."""
    with image.open("wb") as out:
        out.truncate(size)
    options = "lazy_itable_init=0,lazy_journal_init=0"  # nothing goes on in the background later
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-i", "8192", "-E", options, str(image)],
        check=True,
    )
    point.mkdir()
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(point)], check=True)
    try:
        yield point
    finally:
        unmount(point)


def drop(paths: Iterable[Path]) -> None:
    """Have the kernel forget the content of files as seen at these paths; dirty pages are written first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Reader:
    """Compiles reader.c into `directory`, and runs it; see there for what it does."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "reader"
        source = Path(__file__).with_name("reader.c")
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-pthread", "-o", str(self._program), str(source), "-lm"], check=True
        )

    def __call__(
        self,
        files: Sequence[Path],
        pattern: str,
        block: int,
        *,
        threads: int = 1,
        count: int = 0,
        warm: int = 0,
        skip: int = 0,
        seed: int = 1,
        direct: bool = False,
        cpus: Iterable[int] | None = None,
        group: Path | None = None,
    ) -> dict[str, float]:
        """Read; requests, bytes, seconds, mean_us, p50_us, p99_us. In the control group `group` if given."""
        numbers = {"-b": block, "-t": threads, "-n": count, "-w": warm, "-k": skip, "-s": seed}
        argv = [str(self._program), "-p", pattern, *(f"{key}{value}" for key, value in numbers.items())]
        if direct:
            argv.append("-d")
        if group is not None:  # whoever execs takes its group along
            argv = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs"), *argv]
        if cpus is not None:
            argv = ["taskset", "-c", ",".join(map(str, cpus)), *argv]
        done = subprocess.run(
            argv, input="".join(f"{path}\n" for path in files), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the reader failed: {done.stderr.strip() or done.returncode}")
        figures: dict[str, float] = json.loads(done.stdout)
        return figures


def rate(figures: dict[str, float]) -> float:
    """Return the requests a second of a reader's run."""
    return figures["requests"] / figures["seconds"]
