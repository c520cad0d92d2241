"""The overlay and what it is measured beside, mounted over one lower directory.

Every daemon runs in the foreground, so that its pid is known: it is pinned by it, and ended by it. The lower
file system of the scripts is an `ext4` on a loop device over an image in memory: its page cache can be warm
or dropped as that of any disk, and no disk of the machine decides the figures. Only that needs root.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmem.backends.processes import last_line
from tmem.bench.grounds import running, wait_until
from tmem.fs.uring import SWITCH

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
    "tmem io_uring": [*_TMEM, "client=rings,loop=native,io_uring=on"],
}

PACKAGES = {"bindfs": "bindfs", "mergerfs": "mergerfs"}
"""Peers that may be missing, and the Debian packages that have them."""


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
def mounted(
    name: str,
    lower: Path,
    point: Path,
    cpus: Iterable[int] | None = None,
    runtime: Path | None = None,
    command: Sequence[str] | None = None,
) -> Iterator[Mounted]:
    """Serve `lower` on `point` with the daemon called `name`, on `cpus`, while the block lasts.

    `runtime` is where our segment is, unless TMEM_RUNTIME_DIR says it; `command` serves if it is none that is
    known here. What a daemon says goes to the file `point`.log.
    """
    point.mkdir(exist_ok=True)
    log = point.with_name(f"{point.name}.log")
    environment = {**os.environ, "TMEM_CONFIG": os.devnull}  # not what this machine has
    if runtime is not None:
        environment["TMEM_RUNTIME_DIR"] = str(runtime)
    argv = [*(command or _COMMANDS[name]), str(lower), str(point)]
    with running(argv, environment, cpus, log) as process:

        def settled() -> bool:
            if process.poll() is not None:
                raise RuntimeError(
                    f"{name} ended with status {process.returncode} instead of mounting ({last_line(log)})"
                )
            return point.is_mount()

        wait_until(settled, f"the mount of {name}")
        try:
            point.stat()  # it answers
            yield Mounted(name, point, process.pid)
        finally:
            unmount(point)


@contextmanager
def rings_permitted() -> Iterator[None]:
    """Have mounts that are made in this block get an io_uring, whose switch is of the whole machine.

    It is then put back: a mount keeps what it has. One process at a time. OSError: only root may, or this
    kernel has none.
    """
    descriptor = os.open(SWITCH, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        before = os.pread(descriptor, 8, 0).strip()
        os.pwrite(descriptor, b"Y", 0)
        try:
            yield
        finally:
            os.pwrite(descriptor, before, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a daemon that was forked meanwhile has it, too
    finally:
        os.close(descriptor)


def unmount(point: Path) -> None:
    """Unmount; lazily if something holds it, so that the daemon under it can be ended in any case."""
    argv, lazy = (["umount"], "--lazy") if os.geteuid() == 0 else (["fusermount3", "-u"], "-z")
    if subprocess.run([*argv, str(point)], check=False, capture_output=True).returncode:
        subprocess.run([*argv, lazy, str(point)], check=False, capture_output=True)


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
