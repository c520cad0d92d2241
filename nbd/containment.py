"""Are the processes that are not ours held in control groups with a memory limit? And may ours be swapped
out?

Looks at the first level below the root of the memory controller's hierarchy, v1 or v2: every group that has
processes needs a limit, except the groups of our own processes, in which nobody else may be. Processes in the
root can have no limit. Kernel threads and process 1 do not count. Only looks; any thread.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import cgroup

ROOM_BYTES = 60 << 20
"""What the limits must leave beside the segment, for the kernel and the servers."""

# systemd keeps nothing but process 1 there, and it cannot be limited.
_EXEMPT = ("init.scope",)
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Containment:
    """The sum of the limits, the groups without one, and how many processes are in the root or in our
    groups."""

    limits_bytes: int
    unlimited_groups: tuple[str, ...]
    stray_processes: int


def examine(own_pids: Sequence[int], proc: Path = Path("/proc")) -> Containment | None:
    """Look at the groups of everything but the processes `own_pids`; None without a memory controller."""
    version = cgroup.version(proc)
    root = cgroup.mount_point(proc)
    if version is None or root is None:
        return None
    own = {(_group(pid, version, proc) or "/").strip("/").split("/")[0] for pid in own_pids}
    limits, unlimited = 0, []
    stray = set(_user_processes(root, proc, recursive=False))
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        members = set(_user_processes(group, proc, recursive=True))
        if group.name in own:
            stray |= members
        elif members and group.name not in _EXEMPT:
            limit = _limit(group, version)
            if limit is None:
                unlimited.append(group.name)
            else:
                limits += limit
    stray -= {1, *own_pids}
    return Containment(limits, tuple(unlimited), len(stray))


def swap_forbidden(pid: int, proc: Path = Path("/proc")) -> bool:
    """Return whether the kernel may never swap out memory charged to the control group of process `pid`."""
    version = cgroup.version(proc)
    root, group = cgroup.mount_point(proc), _group(pid, version, proc)
    if version is None or root is None or group is None or not group.strip("/"):
        return False
    directory = root / group.strip("/")
    file = "memory.swap.max" if version == 2 else "memory.swappiness"
    with contextlib.suppress(OSError):
        return (directory / file).read_text(encoding="ascii").strip() == "0"
    return False


def _group(pid: int, version: int | None, proc: Path) -> str | None:
    """Return the path of the process's group within the hierarchy, such as ``/system.slice/x.service``."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if (version == 1 and "memory" in controllers.split(",")) or (version == 2 and not controllers):
            return path
    return None


def _user_processes(group: Path, proc: Path, recursive: bool) -> Iterator[int]:
    """Yield the processes of a group, without kernel threads: those have no command line."""
    for listing in group.rglob("cgroup.procs") if recursive else [group / "cgroup.procs"]:
        with contextlib.suppress(OSError):
            for word in listing.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    if (proc / word / "cmdline").read_bytes():
                        yield int(word)


def _limit(group: Path, version: int) -> int | None:
    try:
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        text = (group / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if text == "max" or int(text) >= _UNLIMITED else int(text)
