"""Gives everything that is not ours a memory limit, so that it reclaims before the machine has no memory.

    RAM = what is taken outside of groups (the kernel, its watermarks, memory charged before a move)
        + the segments at their ceilings + room for our processes and the kernel's growth
        + the limits of everything else

`look` reads the machine, `plan` decides (pure), `apply` does the steps one by one. Three kinds of machine,
one way of counting: systemd (limits by ``systemctl set-property`` on its slices), and cgroup v2 and v1
without it (two groups below the root: ``tmem``, never swapped out, and ``rest``, for every process that was
in no group). Groups that exist directly below the root get a limit as well, unless they have one.

Memory does not move with a process: what a moved process has touched stays charged to the root, counts there,
and so the limits grow when this is done again later. `undo` takes everything back. Needs root; one at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tmem.backends import cgroup, groups, meminfo
from tmem.backends.groups import OWN, REST, Record
from tmem.errors import TmemError
from tmem.nbd import steps
from tmem.nbd.containment import EXEMPT, KERNEL_SHARE, ROOM_BYTES, first_level, growth_bytes
from tmem.nbd.steps import Enable, Make, Move, Remove, Run, Step, Write
from tmem.types import format_size

SLICES = ("system.slice", "user.slice")
"""Where systemd starts services and sessions; limited also while nobody is in them."""

_OWN_SLICE = "tmem.slice"


@dataclass(frozen=True)
class Group:
    """A group directly below the root: name, user processes, bytes that are no page cache, limit in bytes."""

    name: str
    processes: int = 0
    held_bytes: int = 0
    limit_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """What there is before anything is done."""

    version: int
    root: Path
    systemd: bool
    ram_bytes: int
    taken_bytes: int
    """RAM that cannot be had without swapping, whoever has it."""
    groups: tuple[Group, ...]
    """Without those of our own processes, and without systemd's for process 1."""
    own_held_bytes: int
    """What our own groups hold, pages of segments included."""
    own_process_bytes: int
    """The same without those pages."""
    loose: int
    """User processes in the root that are not ours."""
    own_pids: frozenset[int]
    misplaced: int
    """Our processes that are not in the group or slice that is ours."""


@dataclass(frozen=True)
class Wanted:
    """What the user asks for: bytes of all segments at their largest, of room (None: by default), and shares
    in percent by the names of groups."""

    segments_bytes: int
    room_bytes: int | None = None
    shares: Mapping[str, float] | None = None
    permanent: bool = False


@dataclass(frozen=True)
class Plan:
    """The limits in bytes by the names of groups, what all of them may have, the steps, and the record."""

    budget_bytes: int
    limits: Mapping[str, int]
    steps: tuple[Step, ...]
    record: Record


def look(own_pids: Collection[int], proc: Path = Path("/proc"), root: Path | None = None) -> Machine:
    """Read the machine below the group `root`, by default all of it. Raises `TmemError` if it has no memory
    controller."""
    version, mounted = cgroup.version(proc), cgroup.mount_point(proc)
    if version is None or mounted is None:
        raise TmemError("this machine has no memory controller: boot it with cgroup_enable=memory")
    root = root or mounted
    ours = {OWN, _OWN_SLICE, *(name for pid in own_pids if (name := first_level(pid, root, proc)))}
    # A process of ours that was started in the group of all the rest does not make that group ours.
    ours -= {REST, *SLICES}
    found, own_held, own_shared = [], 0, 0
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        if directory.name in ours:
            own_held += cgroup.held_bytes(directory)
            own_shared += cgroup.shared_bytes(directory)
        elif directory.name not in EXEMPT:
            members = set(cgroup.user_processes(directory, recursive=True, proc=proc)) - set(own_pids)
            held, limit = cgroup.held_bytes(directory), cgroup.limit_of(directory)
            found.append(Group(directory.name, len(members), held, limit))
    loose = set(cgroup.user_processes(root, recursive=False, proc=proc)) - set(own_pids)
    memory = meminfo.read(proc)
    return Machine(
        version,
        root,
        groups.systemd(),
        memory.total_bytes,
        memory.taken_bytes,
        tuple(found),
        own_held,
        own_held - own_shared,
        len(loose),
        frozenset(own_pids),
        sum(first_level(pid, root, proc) not in (OWN, _OWN_SLICE) for pid in own_pids),
    )


def default_room(ram_bytes: int) -> int:
    """Return the room that is left for our processes and the kernel's growth when nobody says how much."""
    return ROOM_BYTES + ram_bytes // KERNEL_SHARE


def plan(machine: Machine, wanted: Wanted, record: Record | None = None) -> Plan:
    """Decide what has to be done; `record` is what an earlier time did. Raises `TmemError` if it cannot be
    done."""
    if record is not None and record.root != str(machine.root):
        record = None
    ours = record.limits if record is not None else {}
    members = [one for one in machine.groups if _wants_limit(one, machine, ours)]
    missing = SLICES if machine.systemd else (REST,)
    members += [Group(name) for name in missing if name not in {one.name for one in members}]
    shares = wanted.shares or {}
    if unknown := sorted(set(shares) - {one.name for one in members}):
        known = ", ".join(one.name for one in members)
        raise TmemError(f"there is no group {unknown[0]!r} to limit: there are {known}")
    # A limit that somebody else has set stays, and counts.
    fixed = {
        one.name: one.limit_bytes
        for one in members
        if one.limit_bytes is not None and one.name not in ours and one.name not in shares
    }
    budget = _budget(machine, wanted)
    free = [one for one in members if one.name not in fixed]
    limits = _share_out(budget - sum(fixed.values()), free, shares)
    before = {one.name: one.limit_bytes for one in members if one.name in limits}
    made = Record(
        str(machine.root),
        None if machine.systemd else str(machine.root / OWN),
        dict(limits),
        before | ({name: record.before.get(name) for name in record.limits} if record is not None else {}),
        record is not None and record.enabled,
        wanted.permanent or (record is not None and record.permanent),
    )
    done = _systemd_steps(limits, made.permanent) if machine.systemd else _group_steps(machine, limits)
    return Plan(budget, limits, tuple(done), made)


def apply(planned: Plan, directory: Path | None = None) -> Record:
    """Do the steps of `planned` and return the record, which is in the run-time `directory` before the first.

    Raises `TmemError`; what was done until then is undone by `undo`.
    """
    record = planned.record
    _save(record, directory)
    for step in planned.steps:
        if steps.do(step) and isinstance(step, Enable):
            record = replace(record, enabled=True)
            _save(record, directory)
    return record


def undo_steps(record: Record) -> list[Step]:
    """Return the steps that take back what `record` says."""
    root = Path(record.root)
    if record.own_group is None:
        limits = [
            _set_property(name, "MemoryMax", record.before.get(name), record.permanent)
            for name in record.limits
        ]
        swap = [_set_property(name, "MemorySwapMax", None, record.permanent) for name in EXEMPT]
        return [*limits, *swap]
    done: list[Step] = []
    for name in record.limits:
        if name != REST and (limit := _limit_file(root / name)) is not None:
            done.append(Write(limit, _limit_text(limit, record.before.get(name))))
    ours = [root / REST, root / OWN]
    # Only an outermost group may have processes beside a controller for its children, and other groups may
    # have come to rely on it.
    others = any(path.is_dir() and path not in ours for path in root.iterdir())
    if record.enabled and not others:
        done.append(Enable(root, False))
    for group in ours:
        if group.is_dir():
            done += [Move(group, root, recursive=True), Remove(group)]
    return done


def undo(directory: Path | None = None) -> list[Step]:
    """Take back what was done, forget it, and return the steps; empty if there is nothing to undo."""
    record = groups.load(directory)
    if record is None:
        return []
    done = undo_steps(record)
    for step in done:
        steps.do(step)
    groups.forget(directory)
    return done


def _budget(machine: Machine, wanted: Wanted) -> int:
    """Return what all limits may come to; `TmemError` if that is nothing."""
    inside = sum(one.held_bytes for one in machine.groups) + machine.own_held_bytes
    outside = max(machine.taken_bytes - inside, 0)
    room = wanted.room_bytes
    if room is None:
        running = machine.own_process_bytes + growth_bytes(machine.ram_bytes)
        room = max(default_room(machine.ram_bytes), running)
    budget = machine.ram_bytes - outside - wanted.segments_bytes - room
    if budget <= 0:
        raise TmemError(
            f"nothing is left for everything else: of {format_size(machine.ram_bytes)} RAM "
            f"{format_size(outside)} are taken, {format_size(wanted.segments_bytes)} go to segments and "
            f"{format_size(room)} are room: make the segment smaller, or give --room less"
        )
    return budget


def _wants_limit(group: Group, machine: Machine, ours: Mapping[str, int]) -> bool:
    always = SLICES if machine.systemd else (REST,)
    return group.name in always or group.name in ours or group.processes > 0


def _share_out(budget: int, members: Collection[Group], shares: Mapping[str, float]) -> dict[str, int]:
    """Return the limit of each group: its percentage, or what it holds now and an equal part of what is left.

    Raises `TmemError` if a group would have to give up what it holds.
    """
    given = {name: int(budget * percent / 100) for name, percent in shares.items()}
    others = [one for one in members if one.name not in given]
    left = budget - sum(given.values()) - sum(one.held_bytes for one in others)
    if left < 0 or (others and left == 0):
        held = sum(one.held_bytes for one in others)
        raise TmemError(
            f"what runs holds {format_size(held)} now, but only {format_size(max(budget, 0))} could be left "
            "for it: make the segment smaller, give --room or --share less, or end something"
        )
    limits = given | {one.name: one.held_bytes + left // len(others) for one in others}
    for one in members:
        if limits[one.name] < one.held_bytes:
            raise TmemError(
                f"{one.name} holds {format_size(one.held_bytes)} now, more than its share of "
                f"{format_size(limits[one.name])}: give it a larger --share"
            )
    return {name: limit >> 12 << 12 for name, limit in limits.items()}


def _systemd_steps(limits: Mapping[str, int], permanent: bool) -> list[Step]:
    return [
        # Process 1 must be able to run whatever happens to swap.
        *(_set_property(name, "MemorySwapMax", 0, permanent) for name in EXEMPT),
        *(_set_property(name, "MemoryMax", limit, permanent) for name, limit in limits.items()),
    ]


def _set_property(unit: str, name: str, value: int | None, permanent: bool) -> Run:
    kept = () if permanent else ("--runtime",)
    return Run(("systemctl", "set-property", *kept, unit, f"{name}={'infinity' if value is None else value}"))


def _group_steps(machine: Machine, limits: Mapping[str, int]) -> list[Step]:
    root, version = machine.root, machine.version
    own, rest = root / OWN, root / REST
    unswapped = Write(own / ("memory.swap.max" if version == 2 else "memory.swappiness"), "0")
    moves = [
        Move(root, own, only=machine.own_pids, recursive=True),
        Move(root, rest, besides=machine.own_pids),
    ]
    limited = [Write(root / name / cgroup.LIMIT_FILES[version], str(limit)) for name, limit in limits.items()]
    made: list[Step] = [Make(own), Make(rest)]
    # Twice: at the root of all groups the controller should be there first; elsewhere it cannot be enabled
    # before the last process has left.
    enable: list[Step] = [Enable(root, True, early=True)] if version == 2 else []
    return [*made, *enable, *moves, *([Enable(root, True)] if version == 2 else []), unswapped, *limited]


def _limit_file(group: Path) -> Path | None:
    return next((group / name for name in cgroup.LIMIT_FILES.values() if (group / name).exists()), None)


def _limit_text(file: Path, limit_bytes: int | None) -> str:
    if limit_bytes is not None:
        return str(limit_bytes)
    return "max" if file.name == cgroup.LIMIT_FILES[2] else "-1"


def _save(record: Record, directory: Path | None) -> None:
    try:
        record.save(directory)
    except OSError as error:
        raise TmemError(f"what is done cannot be noted ({error}): run this as root") from None
