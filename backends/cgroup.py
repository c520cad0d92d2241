"""Looks at control groups and their memory, v1 and v2: which one a process is charged to, and its limit.

The store has to stay below it: at the limit the kernel does not refuse memory, it kills a process of the
group, and what a put has touched stays charged to the group of whoever touched it first. Not for creating or
configuring groups. Pure functions of files below ``/proc`` and ``/sys``; callable from any thread.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles

LIMIT_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}
"""The file with the limit of a group, by version."""
USAGE_FILES = ("memory.usage_in_bytes", "memory.current")
"""And that with what is charged to it."""

# v1 shows "no limit" as the largest page-aligned long; anything near it is none.
_UNLIMITED = 1 << 60

# What memory.stat counts that a group cannot be made to give up (without swap).
_HELD_V1 = ("total_rss", "total_shmem")  # its kernel memory is counted in a file of its own
_HELD_V2 = ("anon", "shmem", "kernel_stack", "pagetables", "percpu", "sock", "slab_unreclaimable")


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of `limit_bytes`, set in the group whose directory is `group`."""

    limit_bytes: int
    group: Path


@dataclass(frozen=True)
class _Hierarchy:
    """Where a hierarchy is mounted and which of its groups appears there as the root."""

    mount_point: Path
    root: str
    limit_file: str


def version(proc: Path = Path("/proc")) -> int | None:
    """Return 1 or 2: the version whose memory controller is in force; None without a memory controller."""
    hierarchies = _hierarchies(proc)
    if "memory" in hierarchies:
        return 1
    unified = hierarchies.get("")
    if unified is None:
        return None
    try:
        controllers = (unified.mount_point / "cgroup.controllers").read_text().split()
    except OSError:
        return None
    return 2 if "memory" in controllers else None


def mount_point(proc: Path = Path("/proc")) -> Path | None:
    """Return where the hierarchy that limits memory is mounted; None without a memory controller."""
    found = {1: "memory", 2: ""}.get(version(proc) or 0)
    return None if found is None else _hierarchies(proc)[found].mount_point


def group_of(pid: int | str, proc: Path = Path("/proc")) -> Path | None:
    """Return the directory of the group to which the memory of process `pid` is charged, None if not known.

    In a container this is the nearest one that can be seen.
    """
    return next(iter(groups_of(pid, proc)), None)


def groups_of(pid: int | str, proc: Path = Path("/proc")) -> list[Path]:
    """Return the directories of that group and of its parents: each is charged for what its children use."""
    hierarchy = _hierarchies(proc).get({1: "memory", 2: ""}.get(version(proc) or 0, "none"))
    for controllers, group in _groups(proc, pid):
        if hierarchy is not None and (
            "memory" in controllers.split(",") if hierarchy.limit_file == LIMIT_FILES[1] else not controllers
        ):
            return _ancestors(hierarchy, group)
    return []


def user_processes(group: Path, recursive: bool, proc: Path = Path("/proc")) -> Iterator[int]:
    """Yield the processes of the group with this directory, without kernel threads: those have no command
    line."""
    for listing in group.rglob("cgroup.procs") if recursive else [group / "cgroup.procs"]:
        with contextlib.suppress(OSError):
            for word in listing.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    if (proc / word / "cmdline").read_bytes():
                        yield int(word)


def limit_of(group: Path) -> int | None:
    """Return the memory limit in bytes of the group with this directory, None if it has none."""
    limits = (_read_limit(group / name) for name in LIMIT_FILES.values())
    return next((limit for limit in limits if limit is not None), None)


def usage_of(group: Path) -> int | None:
    """Return what is charged to the group with this directory and its children, page cache included."""
    for name in USAGE_FILES:
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text(encoding="ascii"))
    return None


def statistics(group: Path) -> dict[str, int]:
    """Return the numbers of a group's memory.stat; empty if it is gone."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {fields[0]: int(fields[1]) for line in lines if len(fields := line.split()) == 2}


def held_bytes(group: Path) -> int:
    """Return the memory of a group and its children that is no page cache: it stays until it is freed or
    swapped out."""
    counts = statistics(group)
    total = sum(counts.get(name, 0) for name in (_HELD_V1 if "total_rss" in counts else _HELD_V2))
    with contextlib.suppress(OSError, ValueError):
        total += int((group / "memory.kmem.usage_in_bytes").read_text(encoding="ascii"))
    return total


def cache_bytes(group: Path) -> int:
    """Return the page cache of a group and its children, which goes when memory is needed."""
    counts = statistics(group)
    prefix = "total_" if "total_rss" in counts else ""
    return counts.get(f"{prefix}inactive_file", 0) + counts.get(f"{prefix}active_file", 0)


def shared_bytes(group: Path) -> int:
    """Return the part of `held_bytes` that is files on a tmpfs and the like: the pages of segments."""
    counts = statistics(group)
    return counts.get("total_shmem" if "total_rss" in counts else "shmem", 0)


def memory_limit(proc: Path = Path("/proc"), pid: int | str = "self") -> MemoryLimit | None:
    """Return the tightest memory limit of the groups that process `pid` is in, or None.

    Every group up to the root counts, because each is charged for what its children use.
    """
    tightest: MemoryLimit | None = None
    hierarchies = _hierarchies(proc)
    for controllers, group in _groups(proc, pid):
        hierarchy = hierarchies.get("memory" if "memory" in controllers.split(",") else controllers)
        if hierarchy is None:
            continue
        for directory in _ancestors(hierarchy, group):
            limit = _read_limit(directory / hierarchy.limit_file)
            if limit is not None and (tightest is None or limit < tightest.limit_bytes):
                tightest = MemoryLimit(limit, directory)
    return tightest


def _groups(proc: Path, pid: int | str) -> list[tuple[str, str]]:
    """Return (controllers, group path) per hierarchy; controllers is empty for v2."""
    try:
        lines = procfiles.lines(proc / str(pid) / "cgroup")
    except OSError:
        return []
    return [(fields[1], fields[2]) for line in lines if len(fields := line.split(":", 2)) == 3]


def _hierarchies(proc: Path) -> dict[str, _Hierarchy]:
    """Return the mounted hierarchies that can limit memory: "memory" for v1, "" for v2."""
    found: dict[str, _Hierarchy] = {}
    try:
        lines = procfiles.lines(proc / "self" / "mountinfo")
    except OSError:
        return found
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields, source = before.split(" "), after.split(" ")
        if not separator or len(fields) < 5 or len(source) < 3:
            continue
        if source[0] == "cgroup2":
            found.setdefault("", _Hierarchy(Path(fields[4]), fields[3], LIMIT_FILES[2]))
        elif source[0] == "cgroup" and "memory" in source[2].split(","):
            found.setdefault("memory", _Hierarchy(Path(fields[4]), fields[3], LIMIT_FILES[1]))
    return found


def _ancestors(hierarchy: _Hierarchy, group: str) -> list[Path]:
    """Return the directories of `group` and of its parents, as far as this mount shows them."""
    # Inside a container the mount shows only a part of the tree: its root is the container's own group.
    relative = group.removeprefix(hierarchy.root.rstrip("/")).strip("/")
    directory = hierarchy.mount_point / relative
    if not directory.is_dir():
        directory = hierarchy.mount_point
    directories = [directory]
    while directories[-1] != hierarchy.mount_point and directories[-1] != directories[-1].parent:
        directories.append(directories[-1].parent)
    return directories


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if text == "max" or int(text) >= _UNLIMITED:
        return None
    return int(text)
