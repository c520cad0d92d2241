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
from tmem.backends.meminfo import Memory

ROOM_BYTES = 144 << 20
"""What the limits must leave beside the segment, for the processes of one device and a mount.

Manager, two servers, keeper and a mount had 117 MiB locked in a guest (Linux 6.1), and one that was killed
takes up to 25 MiB once more while the new one starts. With 96 MiB a guest hung in one of some 60 runs: free
memory sank below the watermark at which a server waits for memory, to answer what would have freed some.
"""

OURS = ("tmem", "tmem.slice")
"""Our own groups, without systemd and with it."""

RESTART_BYTES = 25 << 20
"""What a process of ours needs once more that starts again before the one that was killed has ended."""

KERNEL_SHARE = 64
"""Of RAM this part is left for what the kernel will need beside what it takes now."""

EXEMPT = ("init.scope",)
"""Groups without a limit that are no trouble: systemd keeps nothing but process 1 there."""


@dataclass(frozen=True)
class Containment:
    """The sum of the limits, the groups without one, how many processes are in the root or in our groups,
    and what those groups with a limit hold now."""

    limits_bytes: int
    unlimited_groups: tuple[str, ...]
    stray_processes: int
    held_bytes: int = 0


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
    limits, held, unlimited = 0, 0, []
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
                held += cgroup.held_bytes(group)
    stray -= {1, *own_pids}
    return Containment(limits, tuple(unlimited), len(stray), held)


def growth_bytes(ram_bytes: int) -> int:
    """Return what our processes and the kernel may come to take beside what they have now."""
    return RESTART_BYTES + ram_bytes // KERNEL_SHARE


def left_for_limits(found: Containment, memory_bytes: int, resident_bytes: int, memory: Memory) -> int:
    """Return what all limits may come to, given what everybody holds right now; bytes.

    `memory_bytes` is the segment's size, of which `resident_bytes` are in RAM; `memory` is the machine's.
    """
    outside = max(memory.taken_bytes - found.held_bytes, 0)
    to_come = max(memory_bytes - resident_bytes, 0) + growth_bytes(memory.total_bytes)
    return memory.total_bytes - outside - to_come


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
