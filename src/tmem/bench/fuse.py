"""Reads through the precache of pages that are in its pool, beside the plain directory, bindfs and mergerfs.

The lower file is in the page cache, so the peers copy from there; a hit comes from the pool. Client and
daemon are pinned, on one CPU and then on two, because that decides every ratio. Requests of 4 KiB are
O_DIRECT, so that each reaches the daemon (not in the plain directory: that would be the disk); those of
1 MiB are buffered, as programs read, and begin without what the mount's page cache has. Misses, names and
slow storage: scripts/bench. Needs no root.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tmem.backends import _native
from tmem.bench import fio
from tmem.bench.files import real_file
from tmem.bench.grounds import DISK, workplace
from tmem.bench.mounts import PACKAGES, SEGMENT, Mounted, Placement, mounted, placements
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import OURS, Lacking, Outcome, Sample, Series, comparisons
from tmem.bench.rounds import FAILURES, named, reason, take_turns
from tmem.errors import TmemError
from tmem.fs.mounts import statistics

PLAIN = "plain directory"
PEERS = ("bindfs", "mergerfs")

_FILLS = 6
_MEGABYTE = 1 << 20
_START_S = 0.4

CASES = {
    "4 KiB random hits, 1 client": (["--rw=randread", "--bs=4k"], {"bindfs": 1.0}),
    "4 KiB random hits, 4 clients": (["--rw=randread", "--bs=4k", "--numjobs=4"], {"bindfs": 1.5}),
    "1 MiB sequential hits": (["--rw=read", "--bs=1m"], {"bindfs": 1.3}),
}
"""fio's arguments, and what the project aims at beside whom."""


def _size(effort: Effort) -> int:
    return (32 if effort.quick else 128) << 20


def _placements() -> list[Placement]:
    return [placement for placement in placements() if placement.name != "any CPU"]


def _lacking() -> list[Lacking]:
    return [
        Lacking(name, f"not installed: apt-get install {PACKAGES[name]}")
        for name in PEERS
        if shutil.which(name) is None
    ]


def plan(effort: Effort) -> Plan:
    """Say what is needed."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    without, size = _lacking(), _size(effort)
    steps = rounds * len(CASES) * len(_placements()) * (2 + len(PEERS) - len(without))
    return Plan(
        memory_bytes=5 * size + (64 << 20),
        disk_bytes=size,
        steps=steps,
        about_s=steps * (seconds + _START_S) + 15,
        says=f"a file of {size >> 20} MiB in a directory, and mounts of that directory",
        refused=_refused(),
        lacking=without,
    )


def _refused() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened: modprobe fuse, or run this as root"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "mounting as a user needs fusermount3: apt-get install fuse3"
    return fio.lacks("psync")


def run(effort: Effort, step: Step) -> Outcome:
    """Measure every case in every placement."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    size, outcome = _size(effort), Outcome()
    with workplace() as directory, workplace(DISK) as lower, ExitStack() as stack:
        real_file(lower / "file", size)
        segment = _native.create(str(directory / SEGMENT), 4 * size + (64 << 20))
        stack.callback(segment.close)
        segment.populate(2 * size)  # as the manager keeps a reserve
        mounts = _mounts(stack, lower, directory, outcome)
        fill(mounts[OURS].point / "file", read)
        paths = {name: mount.point / "file" for name, mount in mounts.items()} | {PLAIN: lower / "file"}
        read(lower / "file")  # what the precache has read it leaves to the page cache no more
        for placement in _placements():
            for mount in mounts.values():
                mount.pin(placement.daemons)
            for case, (arguments, targets) in CASES.items():
                full = f"{case}, {placement.name}"
                cpus = sorted(placement.clients)
                ways = {
                    name: _measure(path, size, name == PLAIN, arguments, seconds, cpus)
                    for name, path in paths.items()
                }
                taken = take_turns(ways, rounds, named(step, full), outcome.lacking)
                paths = {name: path for name, path in paths.items() if name in taken}
                unit = "MB/s" if "1m" in arguments[1] else "reads/s"
                of_case = [Series(full, name, unit, tuple(samples)) for name, samples in taken.items()]
                outcome.series += of_case
                outcome.rows += comparisons(of_case, targets=targets)
        counted = statistics(str(mounts[OURS].point))
        outcome.notes = {
            "file_bytes": size,
            "hit_pages": counted.hit_pages,
            "miss_pages": counted.miss_pages,
            "passed_through_reads": counted.passthrough_reads,
        }
    return outcome


def _mounts(stack: ExitStack, lower: Path, directory: Path, outcome: Outcome) -> dict[str, Mounted]:
    """Mount ours and those of the peers that are there."""
    found = {}
    for name in (OURS, *PEERS):
        if name != OURS and shutil.which(name) is None:
            continue
        try:
            found[name] = stack.enter_context(mounted(name, lower, directory / name, runtime=directory))
        except FAILURES as error:
            if name == OURS:
                raise
            outcome.lacking.append(Lacking(name, reason(error)))
    return found


def fill(path: Path, reading: Callable[[Path], object]) -> None:
    """Have a file in the root of a mount of ours read until the pool has all of it: what is missed twice is
    kept for certain. TmemError if it never has."""
    point = str(path.parent)
    for _ in range(_FILLS):
        before = statistics(point).miss_pages
        reading(path)
        if statistics(point).miss_pages == before:
            return
    raise TmemError("the precache does not keep the whole file: see 'tmem mount' for what it declines")


def read(path: Path) -> None:
    """Read a file from beginning to end."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_MEGABYTE)
        while file.readinto(buffer):
            pass


def _measure(
    path: Path, size: int, plain: bool, arguments: list[str], seconds: float, cpus: list[int]
) -> Callable[[], Sample]:
    random = arguments[0] == "--rw=randread"
    argv = [
        *("--ioengine=psync", f"--filename={path}", f"--size={size}", "--readonly", "--fadvise_hint=0"),
        *("--allow_file_create=0", "--group_reporting", f"--direct={int(random and not plain)}"),
        f"--invalidate={int(not plain)}",
        *fio.timed(seconds),
        *arguments,
    ]
    return lambda: fio.sample(fio.run(argv, cpus), bandwidth=not random)


def _chosen(effort: Effort) -> Effort:
    return effort.of(rounds=(5, 2), seconds=(1.0, 0.5))


PART = Part("fuse", "Hits of the precache", plan, run)
