"""Has a control group give up cold pages, a little at a time, before anybody needs the memory.

What historic tmem called self-ballooning, in the form of today (senpai, TMO): in a guest, or for a group of
this machine, a part of what the group uses is reclaimed at each step, so that page cache goes and cold pages
go to swap; how much is a matter of how long the group waits for memory. `decide` is pure; `look` and
`reclaim` do the rest through the files of cgroups:

- ``memory.reclaim`` (v2, Linux 5.19) takes an amount, and no limit changes;
- ``memory.high`` (v2 before that) and ``memory.limit_in_bytes`` (v1) are lowered by the amount and put back
  at once: the kernel reclaims while it takes the lower one, so the group lives under it for moments only. v1
  sets it when it has reclaimed, and refuses if it could not.

Not for the root group, which has none of these, nor for a group with processes of ours: swap would wait for
itself. One process a group; the main thread only, since signals must wait while a limit is lowered.
"""

import contextlib
import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path

from tmem.backends import cgroup, interrupts, pressure
from tmem.backends.paths import runtime_dir
from tmem.errors import TmemError
from tmem.nbd import family, swap
from tmem.nbd.containment import OURS
from tmem.types import PAGE_SIZE

LEAST_RATIO, MOST_RATIO, GROWTH = 0.0005, 0.01, 1.5
"""Which part of what is used a step takes: at first and after a stall (as TMO), at most, and how it grows."""

MOST_REST = 64
"""Steps that are sat out after a stall, at most; twice as many as after the one before."""

SWAP_SHARE = 16
"""This part of swap is left for those who need it at once."""

BATCH_BYTES = 512 << 10
"""How far the kernel may go beyond what it was asked for: it takes whole batches, and gives back what each
CPU has charged ahead (0.3 MiB seen with two CPUs, Linux 6.1)."""

_ASK, _LIMITS = "memory.reclaim", ("memory.high", cgroup.LIMIT_FILES[1])


@dataclass(frozen=True)
class Rules:
    """What the user asks for: never below these bytes, and the share of time (0 to 1) that may be lost."""

    least_bytes: int
    target: float = 0.001


@dataclass(frozen=True)
class Look:
    """What is seen before a step: bytes, and the share of the time since the last step that was lost."""

    used_bytes: int
    swap_bytes: int
    swap_free_bytes: int
    stalled: float


@dataclass(frozen=True)
class Pace:
    """What is kept from step to step: the ratio, how many steps are still sat out, and how many the next
    stall costs."""

    ratio: float = LEAST_RATIO
    rest: int = 0
    patience: int = 1


def decide(pace: Pace, seen: Look, rules: Rules) -> tuple[Pace, int, str]:
    """Return the next pace, the bytes to reclaim now, and why there are none (or ``""``)."""
    if seen.stalled >= rules.target:
        patience = pace.patience if pace.rest else min(pace.patience * 2, MOST_REST)
        return Pace(LEAST_RATIO, pace.patience, patience), 0, "somebody waits for memory"
    if pace.rest:
        return replace(pace, rest=pace.rest - 1), 0, "somebody waited for memory"
    above = seen.used_bytes - rules.least_bytes - BATCH_BYTES
    if above < PAGE_SIZE:
        return pace, 0, "no more is used than the least"
    spare = seen.swap_free_bytes - seen.swap_bytes // SWAP_SHARE
    if spare < PAGE_SIZE:
        return pace, 0, "swap is nearly full" if seen.swap_bytes else "there is no swap"
    wanted = int(seen.used_bytes * pace.ratio * (1 - seen.stalled / rules.target))
    amount = min(max(wanted, PAGE_SIZE), above, spare)
    ratio = min(pace.ratio * GROWTH, MOST_RATIO)
    patience = max(pace.patience // 2, 1) if ratio == MOST_RATIO else pace.patience
    return Pace(ratio, 0, patience), amount // PAGE_SIZE * PAGE_SIZE, ""


def find(name: str | None) -> Path:
    """Return the directory of the group called `name`, a path below the root of the memory controller.

    Raises `TmemError` if it is none that could be asked.
    """
    root = cgroup.mount_point()
    if root is None:
        raise TmemError("this machine has no memory controller: boot it with cgroup_enable=memory")
    root = root.resolve()
    group = (root / (name or "")).resolve()
    if group == root or root not in group.parents or not group.is_dir():
        names = sorted(path.parent.name for path in root.glob("*/cgroup.procs"))
        what = "the root group cannot be reclaimed from" if group == root else f"there is no group {name!r}"
        known = f"such as {', '.join(names[:4])}" if names else "and start what may give up memory in it"
        raise TmemError(f"{what}: name a group below {root}, {known}")
    if not any((group / file).exists() for file in (_ASK, *_LIMITS)):
        raise TmemError(
            f"{group} has no memory controller: enable it with 'echo +memory > "
            f"{group.parent}/cgroup.subtree_control'"
        )
    if group.relative_to(root).parts[0] in OURS or any(
        group in cgroup.groups_of(pid) for pid in family.everybody(runtime_dir())
    ):
        raise TmemError(
            f"{group} holds processes of tmem, and swap would wait for itself: name another group"
        )
    return group


def stalls(group: Path) -> pressure.Stalls:
    """Return what tells how long the group waits; with v1 the machine. Raises `TmemError` without PSI."""
    for file in (group / "memory.pressure", pressure.MACHINE):
        if pressure.figures(file):
            return pressure.Stalls([file])
    raise TmemError("the kernel does not say who waits for memory: boot it with psi=1")


def look(group: Path, stalled: float) -> Look:
    """Look at the group and at all swap. Raises `TmemError` if the group is gone."""
    used = cgroup.usage_of(group)
    if used is None:
        raise TmemError(f"{group} is gone: name another group")
    areas = swap.entries()
    size = sum(area.size_bytes for area in areas)
    return Look(used, size, size - sum(area.used_bytes for area in areas), stalled)


def limit_file(group: Path) -> Path | None:
    """Return the limit that each `reclaim` lowers for a moment, None where the kernel can be asked."""
    if (group / _ASK).exists():
        return None
    return next(file for name in _LIMITS if (file := group / name).exists())


def reclaim(group: Path, amount_bytes: int) -> None:
    """Reclaim so much from the group, or what can be had of it; every limit is afterwards as it was."""
    limit = limit_file(group)
    if limit is None:
        _write(group / _ASK, amount_bytes)
        return
    with interrupts.deferred():
        before = limit.read_text(encoding="ascii").strip()
        lower = max((cgroup.usage_of(group) or 0) - amount_bytes, 0) // PAGE_SIZE * PAGE_SIZE
        if before != "max" and int(before) <= lower:
            return  # it is kept so low already
        try:
            _write(limit, lower)
        finally:
            with contextlib.suppress(FileNotFoundError):
                limit.write_text(before, encoding="ascii")


def _write(file: Path, number: int) -> None:
    """Write to a file of the kernel; that it could not reclaim as much is no error."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(number).encode())
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EBUSY):
            raise
    finally:
        os.close(descriptor)
