"""Has this machine room for what a swap device holds, once swapoff brings it back into RAM?

Two things can be in the way: RAM as a whole, and the limits of the control groups whose pages were swapped
out, because swapoff charges every page to its group again and the kernel kills processes of a group that is
full. How much a group has on which of several devices is not to be seen, so all of it counts. A page can be
on a device and in RAM at once (the swap cache): it needs no more room. Where that cannot be told exactly,
too few such pages are assumed. Reads /proc and the control groups, changes nothing; any thread.
"""

from collections.abc import Iterator
from pathlib import Path

from tmem.backends import cgroup, meminfo
from tmem.types import format_size

LEAST_MARGIN_BYTES = 64 << 20
_MARGIN_SHARE = 32


def lacking(used_bytes: int, proc: Path = Path("/proc")) -> list[str]:
    """Return why `used_bytes` of swapped-out pages do not fit into RAM, a phrase each; [] if they do."""
    memory = meminfo.read(proc)
    available = memory.available_bytes
    margin = max(LEAST_MARGIN_BYTES, memory.total_bytes // _MARGIN_SHARE)
    reasons = []
    elsewhere_bytes = max(memory.swapped_bytes - used_bytes, 0)  # what is cached may be of other devices
    need_bytes = used_bytes - min(max(memory.swap_cached_bytes - elsewhere_bytes, 0), used_bytes)
    if available < need_bytes + margin:
        reasons.append(
            f"{format_size(available)} of RAM are available, less than {format_size(need_bytes)} "
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
    if version is None or root is None:
        return
    for file in sorted(root.rglob(cgroup.LIMIT_FILES[version])):
        group = file.parent
        limit = cgroup.limit_of(group)
        counts = cgroup.statistics(group)
        if version == 2:
            here = counts.get("anon", 0) + counts.get("shmem", 0) - _counted_twice(counts)
            swapped = _number(group / "memory.swap.current")
        else:  # which does not count as swapped out what is in RAM as well
            here = counts.get("total_rss", 0) + counts.get("total_shmem", 0)
            swapped = counts.get("total_swap", 0)
        if limit is not None and swapped:
            yield group, here + min(swapped, used_bytes), limit


def _counted_twice(counts: dict[str, int]) -> int:
    """Return the bytes of mapped pages in the swap cache (v2): these are ``anon`` and swapped out.

    Those that nobody maps are swapped out only. Of them there are at most as many as pages on the lists
    beyond the mapped ones; ``unevictable`` has others too.
    """
    listed = sum(counts.get(name, 0) for name in ("inactive_anon", "active_anon", "unevictable"))
    unmapped = max(listed - counts.get("anon", 0) - counts.get("shmem", 0), 0)
    return max(counts.get("swapcached", 0) - unmapped, 0)


def _number(file: Path) -> int:
    """Return the number in a file, 0 if there is none."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
