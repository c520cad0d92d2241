"""Names, attributes and small files: find, git status and tar over one tree, beside bindfs and mergerfs.

Each measurement starts from a fresh mount, so the kernel knows nothing of it, while the lower directory is in
the kernel's caches for everybody; machine-wide caches are never dropped, others use this machine.

How old the tree is decides how long attributes are believed: those of files that were changed within the last
minute a second, of others a minute. So `find` is measured in both: in a tree whose files were all changed
just before each mount, and, as all the rest, in one that nothing has changed for longer than that, which is
waited for. Either may be what a user has: a fresh checkout, or one of yesterday.
"""

import os
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common import judged, paired_ratio

from tmem.backends import _native
from tmem.bench.files import tree
from tmem.bench.grounds import workplace
from tmem.bench.mounts import SEGMENT, Placement, ext4, mounted, placements
from tmem.bench.rounds import in_turn

PEERS = ("bindfs", "mergerfs")
NAMES = ("tmem", *PEERS)
TASKS = {
    "find -size": ["find", "repository", "-size", "+1k"],
    "git status": ["git", "-C", "repository", "status", "--porcelain"],
    "tar": ["sh", "-c", "tar -cf - repository | cat >/dev/null"],  # it does not read for /dev/null itself
}
SETTLES_SECONDS = 61
"""Attributes of files that were changed so long ago are believed for longer (`tmem.fs.lifetimes`)."""
YOUNG = "changed just before"
OLD = f"unchanged for {SETTLES_SECONDS} s"
YOUNG_TASKS = ("find -size",)
TARGETS = {("find -size", 1): 1.0, ("find -size", 2): 1 / 1.5}  # of bindfs, by pass


@dataclass(frozen=True)
class Sizes:
    """How much there is."""

    rounds: int = 5
    files: int = 20_000
    directories: int = 220


QUICK = Sizes(rounds=2, files=800, directories=20)


def _git(directory: Path, *arguments: str) -> None:
    person = ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0"]
    subprocess.run(["git", *person, "-C", str(directory), *arguments], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def lower_tree(directory: Path, sizes: Sizes) -> Iterator[Path]:
    """Yield a file system with a git repository of small files."""
    size = sizes.files * (24 << 10) + (128 << 20)
    with ext4(directory / "image", directory / "lower", size) as lower:
        (lower / "repository").mkdir()
        tree(lower / "repository", sizes.files, sizes.directories)
        _git(lower / "repository", "init", "-q")
        _git(lower / "repository", "config", "core.trustctime", "false")  # it changes, the files do not
        _git(lower / "repository", "add", ".")
        _git(lower / "repository", "commit", "-q", "-m", "all of it")
        yield lower


def _timed(argv: Sequence[str], where: Path, placement: Placement) -> float:
    command = ["taskset", "-c", ",".join(map(str, placement.clients)), *argv]
    # Git must not write its index: each pass would find another one.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_CONFIG_NOSYSTEM": "1"}
    start = time.perf_counter()
    subprocess.run(command, cwd=where, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _change(lower: Path) -> None:
    """Change all files without changing what they are: their ctime."""
    for directory, _, names in os.walk(lower / "repository"):
        for path in (Path(directory), *(Path(directory, name) for name in names)):
            path.chmod(stat.S_IMODE(path.stat().st_mode))


def _last_change(lower: Path) -> float:
    """Return the youngest ctime in the tree."""
    every = (Path(where, name) for where, _, names in os.walk(lower / "repository") for name in (".", *names))
    return max(path.stat().st_ctime for path in every)


def _settle(lower: Path) -> None:
    """Wait until the tree is old."""
    time.sleep(max(_last_change(lower) + SETTLES_SECONDS - time.time(), 0))


def _task(
    task: str, age: str, lower: Path, directory: Path, placement: Placement, rounds: int
) -> list[dict[str, object]]:
    """Measure two passes of one task; the rows."""
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in (*NAMES, "lower")}
    daemon: dict[str, list[list[float]]] = {name: [[], []] for name in NAMES}
    for name in in_turn(list(seconds), rounds):
        if age == YOUNG:
            _change(lower)
        _timed(TASKS[task], lower, placement)  # the lower directory is warm
        if name == "lower":
            passes = [_timed(TASKS[task], lower, placement) for _ in range(2)]
        else:
            with mounted(name, lower, directory / name, placement.daemons) as mount:
                passes = []
                for used in daemon[name]:
                    before = mount.cpu_seconds()
                    passes.append(_timed(TASKS[task], mount.point, placement))
                    used.append(mount.cpu_seconds() - before)
        for kept, taken in zip(seconds[name], passes, strict=True):
            kept.append(taken)
    rows: list[dict[str, object]] = []
    for number in (0, 1):
        for peer in PEERS:
            target = TARGETS.get((task, number + 1)) if peer == "bindfs" else None
            ratio = paired_ratio(seconds[peer][number], seconds["tmem"][number])
            rows.append(judged(f"{task}, pass {number + 1}, {age}", placement.name, ratio, peer, target))
    names = sum(len(directories) + len(files) for _, directories, files in os.walk(lower / "repository"))
    for name in NAMES:
        us = [median(used) / names * 1e6 for used in daemon[name]]
        print(f"    CPU of {name}: {us[0]:.1f} us a name, then {us[1]:.1f}", flush=True)
    rows.append(
        {
            "case": f"{task}, {age}",
            "placement": placement.name,
            "seconds by pass": seconds,
            "names": names,
            "daemon's CPU seconds by pass": daemon,
        }
    )
    return rows


def run(sizes: Sizes) -> dict[str, object]:
    """Measure both placements that are pinned; every row and every round."""
    rows: list[dict[str, object]] = []
    with workplace() as directory:
        os.environ["TMEM_RUNTIME_DIR"] = str(directory)
        with lower_tree(directory, sizes) as lower:
            segment = _native.create(str(directory / SEGMENT), sizes.files * (8 << 10) + (64 << 20))
            try:
                pinned = [placement for placement in placements() if placement.name != "any CPU"]
                for age, tasks in ((YOUNG, YOUNG_TASKS), (OLD, tuple(TASKS))):
                    if age == OLD:
                        _settle(lower)
                    for placement in pinned:
                        for task in tasks:
                            rows += _task(task, age, lower, directory, placement, sizes.rounds)
            finally:
                segment.close()
    return {"rows": rows}
