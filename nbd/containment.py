"""Are the processes that are not ours held in control groups with a memory limit? And may ours be swapped
out?

Looks at the first level below the root of the memory controller's hierarchy, v1 or v2: every group that has
processes needs a limit, except the groups of our own processes, in which nobody else may be. Processes in the
root can have no limit. Kernel threads and process 1 do not count. Only looks (`contain` acts); any thread.
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import cgroup

ROOM_BYTES = 96 << 20
"""What the limits must leave beside the segment, for the kernel and for the processes of one device.

Manager 21 MiB and each of two servers 13 MiB (anonymous memory, user-mode-linux 6.1), the keeper, and 22 MiB
of code that they share, all of it locked.
"""

OURS = ("tmem", "tmem.slice")
"""Our own groups, without systemd and with it."""

EXEMPT = ("init.scope",)
"""Groups without a limit that are no trouble: systemd keeps nothing but process 1 there."""


@dataclass(frozen=True)
class Containment:
    """The sum of the limits, the groups without one, and how many processes are in the root or in our
    groups."""

    limits_bytes: int
    unlimited_groups: tuple[str, ...]
    stray_processes: int


def examine(
    own_pids: Collection[int], proc: Path = Path("/proc"), root: Path | None = None
) -> Containment | None:
    """Look at the groups of everything but the processes `own_pids`; None without a memory controller.

    `root` is the group below which to look, by default the root of the hierarchy.
    """
    root = root or cgroup.mount_point(proc)
    if root is None:
        return None
    own = {name for pid in own_pids if (name := first_level(pid, root, proc)) is not None}
    limits, unlimited = 0, []
    stray = set(cgroup.user_processes(root, recursive=False, proc=proc))
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        members = set(cgroup.user_processes(group, recursive=True, proc=proc))
        if group.name in OURS:
            continue  # whoever puts a process there says that it belongs to us
        if group.name in own and cgroup.limit_of(group) is None:
            stray |= members
        elif members and group.name not in EXEMPT:
            limit = cgroup.limit_of(group)
            if limit is None:
                unlimited.append(group.name)
            else:
                limits += limit
    stray -= {1, *own_pids}
    return Containment(limits, tuple(unlimited), len(stray))


def first_level(pid: int, root: Path, proc: Path = Path("/proc")) -> str | None:
    """Return the name of the group directly below `root` that holds process `pid`; None if none does."""
    group = cgroup.group_of(pid, proc)
    if group is None or root not in group.parents:
        return None
    return group.relative_to(root).parts[0]


def swap_forbidden(pid: int, proc: Path = Path("/proc")) -> bool:
    """Return whether the kernel, when it swaps, spares what is charged to the control group of process `pid`.

    In v2 (memory.swap.max 0, also of a parent) it never swaps that out. In v1 (memory.swappiness 0) it does,
    but only when the machine has no page cache left.
    """
    root, group = cgroup.mount_point(proc), cgroup.group_of(pid, proc)
    if root is None or group is None:
        return False
    if cgroup.version(proc) == 1:
        return group != root and _text(group / "memory.swappiness") == "0"
    above = [group, *group.parents]
    return any(_text(at / "memory.swap.max") == "0" for at in above[: above.index(root)])


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii").strip()
    return ""
