"""Has this machine room for what a swap device holds, once swapoff brings it back into RAM?

Two things can be in the way: RAM as a whole, and the limits of the control groups whose pages were swapped
out, because swapoff charges every page to its group again and the kernel kills processes of a group that is
full. How much a group has on which of several devices is not to be seen, so all of it counts. Reads /proc and
the control groups, changes nothing; any thread.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tmem.backends import cgroup
from tmem.types import format_size

LEAST_MARGIN_BYTES = 64 << 20
_MARGIN_SHARE = 32
_UNLIMITED = 1 << 60


def lacking(used_bytes: int, proc: Path = Path("/proc")) -> list[str]:
    """Return why `used_bytes` of swapped-out pages do not fit into RAM, a phrase each; [] if they do."""
    meminfo = _numbers(proc / "meminfo", 1024)
    available = meminfo.get("MemAvailable:", 0)
    margin = max(LEAST_MARGIN_BYTES, meminfo.get("MemTotal:", 0) // _MARGIN_SHARE)
    reasons = []
    if available < used_bytes + margin:
        reasons.append(
            f"{format_size(available)} of RAM are available, less than {format_size(used_bytes)} "
            f"and {format_size(margin)} to spare"
        )
    for group, need_bytes, limit_bytes in _groups(used_bytes, proc):
        if need_bytes > limit_bytes:
            reasons.append(
                f"the control group {group} would need {format_size(need_bytes)} "
                f"and is limited to {format_size(limit_bytes)}"
            )
    return reasons


def _groups(used_bytes: int, proc: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield each group with a limit and swapped-out pages, what it needs with them, and the limit; bytes."""
    version = cgroup.version(proc)
    root = cgroup.mount_point(proc)
    if root is None:
        return
    limit_file = "memory.max" if version == 2 else "memory.limit_in_bytes"
    for file in sorted(root.rglob(limit_file)):
        group = file.parent
        limit = _number(file)
        counts = _numbers(group / "memory.stat")
        if version == 2:
            here = counts.get("anon", 0) + counts.get("shmem", 0)
            swapped = _number(group / "memory.swap.current") or 0
        else:
            here = counts.get("total_rss", 0) + counts.get("total_shmem", 0)
            swapped = counts.get("total_swap", 0)
        if limit is not None and limit < _UNLIMITED and swapped:
            yield group, here + min(swapped, used_bytes), limit


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none, as in "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _numbers(file: Path, unit: int = 1) -> dict[str, int]:
    """Return the lines ``NAME NUMBER`` of a file, the numbers times `unit`."""
    found = {}
    with contextlib.suppress(OSError):  # a group may end while we look
        for line in file.read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 1 and fields[1].isdigit():
                found[fields[0]] = int(fields[1]) * unit
    return found
