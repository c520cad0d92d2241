"""The guards of swap that is served by this very machine, each as data: what holds, why, and what to do.

A kernel that swaps to its own userspace waits for itself as soon as the server, or anything on its way, needs
a page while none is free. Locked memory, PR_SET_IO_FLUSHER and the OOM score are needed and not enough.
*Realtime* (SCHED_RR with more memory kept free) has been enough only where the segment could not be swapped
out and there were two CPUs: three of three emulated machines hung without the former, one CPU did with both.
*Containment* (everything else lives in groups whose limits leave room) is enough, so `require` refuses
without it, and for a device that its segment cannot hold: a kernel whose swap writes are refused tries again
without end.

A device that another machine swaps to needs none of this. Reads /proc and the control groups, changes
nothing; `proc` is a parameter so that tests can show a machine made of files. Any thread.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tmem.backends import cgroup, locking, meminfo, procfiles, segment
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, SegmentError, TmemError
from tmem.nbd import contain, containment, family, server, watermarks
from tmem.nbd.export import Export, load, load_all
from tmem.nbd.family import KEEPER, MANAGER, NBDFUSE, SERVER, STANDBY, Member
from tmem.types import format_size, size_within

_CONTAINMENT, _ROOM = "containment", "room"
_SCHED_FIFO, _SCHED_RR = 1, 2
# What PR_SET_IO_FLUSHER sets in a thread's flags: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
_IO_FLUSHER = 0x180000
_FULL_RATIO = 2
"""LZ4 keeps two to three times its memory of most programs' pages."""
_START = "start the manager with 'tmem start -d'"


class State(StrEnum):
    """Whether a guard holds: wholly, in part, not at all; UNKNOWN when it cannot be seen."""

    ON = "on"
    PARTIAL = "partial"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Guard:
    """One guard: its name, its state, why it is so, and what to do about it (empty when it holds)."""

    name: str
    state: State
    why: str
    remedy: str = ""


def report(paths: SegmentPaths) -> list[Guard]:
    """Return the guards of every device of the segment that is attached to this machine."""
    attached = [found for found in load_all(paths) if found.attachment is not None]
    return [
        dataclasses.replace(guard, name=f"{found.client}: {guard.name}")
        for found in attached
        for guard in inspect(paths, found)
    ]


def swapped_to(paths: SegmentPaths) -> list[str]:
    """Return the clients to whose devices this machine swaps, as far as their records can be read."""
    found = []
    for record in paths.state.glob("swap-*.json"):
        with contextlib.suppress(TmemError, OSError):
            export = load(paths, record.stem.removeprefix("swap-"))
            if export.attachment is not None:
                found.append(export.client)
    return found


def inspect(paths: SegmentPaths, export: Export, proc: Path = Path("/proc")) -> list[Guard]:
    """Return the guards of `export` as they are now; its server should be running."""
    members = family.of_device(paths, export)
    memory_bytes = paths.segment.stat().st_size if paths.segment.exists() else 0
    # Others of ours share the group of these, and are no strangers there.
    own = family.everybody(paths.directory) | {one.pid for one in members}
    found = [
        containment_guard(own, memory_bytes, proc, resident_bytes=_resident(paths.segment)),
        realtime_guard(members, proc),
        locked_guard(members, server.read_report(paths, export.client) or {}, proc),
        io_flusher_guard(members, proc),
        oom_guard(members, proc),
        segment_guard(paths.segment, members, proc),
        own_group_guard(members, proc),
        room_guard(export, _bound_bytes(paths.segment)),
    ]
    if export.attachment is not None:
        found.append(attachment_guard(export.attachment.kind, members))
    return found


def prospect(paths: SegmentPaths, proc: Path = Path("/proc")) -> list[Guard]:
    """Return what this machine would need to swap to a device of the segment, which may be yet to be made."""
    pid = family.manager(paths)
    members = [] if pid is None else [Member(MANAGER, pid)]
    ram = meminfo.read(proc).total_bytes
    memory_bytes = paths.segment.stat().st_size if paths.segment.exists() else ram // 2
    return [
        _ram_guard(memory_bytes, proc),
        containment_guard(family.everybody(paths.directory), memory_bytes, proc),
        realtime_guard(members, proc),
        own_group_guard(members, proc),
    ]


def require(guards: Iterable[Guard], force: bool) -> None:
    """Raise `AttachError` unless containment holds and there is room, or the caller insists."""
    if force:
        return
    guards = list(guards)
    for guard in guards:
        if guard.name == _ROOM and guard.state is State.MISSING:
            raise AttachError(f"the device is too large: {guard.why}; {guard.remedy}; or insist with --force")
    for guard in guards:
        if guard.name == _CONTAINMENT and guard.state is not State.ON:
            raise AttachError(
                f"this machine could hang while it swaps to itself, for {guard.why}: {guard.remedy}; "
                "or insist with --force"
            )


def require_bound(paths: SegmentPaths, memory_bytes: int) -> None:
    """Raise `AttachError` if a segment bounded to `memory_bytes` could not hold a device that this machine
    swaps to."""
    for export in load_all(paths):
        guard = room_guard(export, memory_bytes)
        if export.attachment is not None and guard.state is State.MISSING:
            raise AttachError(
                f"this machine swaps to {export.client!r}, and {guard.why}: use at least "
                f"{format_size(export.size_bytes // _FULL_RATIO)}, or insist with --force"
            )


def room_guard(export: Export, memory_bytes: int) -> Guard:
    """Say whether a segment of `memory_bytes` can hold what the kernel may write to the device."""
    if export.reserve:
        return Guard(_ROOM, State.ON, "the whole device is promised, even uncompressed")
    if export.size_bytes <= memory_bytes * 15 // 16:
        return Guard(_ROOM, State.ON, "the segment holds the whole device, even uncompressed")
    ratio = export.size_bytes / max(memory_bytes, 1)
    state = State.PARTIAL if ratio <= _FULL_RATIO else State.MISSING
    most = size_within(memory_bytes * 15 // 16 if state is State.PARTIAL else _FULL_RATIO * memory_bytes)
    remedy = f"make it no larger than {most}, or the segment larger"
    return Guard(_ROOM, state, f"the segment holds it if pages compress {ratio:.1f} to 1", remedy)


def containment_guard(
    own_pids: Collection[int],
    memory_bytes: int,
    proc: Path,
    root: Path | None = None,
    resident_bytes: int | None = None,
) -> Guard:
    """Say whether the limits of everything but `own_pids` leave room for a segment of `memory_bytes` and its
    servers.

    `resident_bytes` of the segment are in RAM, and the servers run; None: they are yet to come.
    """
    name = _CONTAINMENT
    found = containment.examine(own_pids, proc, root)
    memory = meminfo.read(proc)
    budget = memory.total_bytes - memory_bytes - containment.ROOM_BYTES
    if found is not None and resident_bytes is not None:
        budget = min(budget, containment.left_for_limits(found, memory_bytes, resident_bytes, memory))
    advice = f"run 'tmem contain', which limits everything else to {format_size(max(budget, 0))} at most"
    if found is None:
        advice = "boot with cgroup_enable=memory"
        return Guard(name, State.MISSING, "there is no memory controller", advice)
    if found.stray_processes or found.unlimited_groups:
        reasons = [f"{group} has no limit" for group in found.unlimited_groups[:3]]
        if found.stray_processes:
            reasons.insert(
                0, f"{found.stray_processes} processes are in the root group or in the servers' own"
            )
        return Guard(name, State.MISSING, ", ".join(reasons), advice)
    total = format_size(found.limits_bytes)
    if found.limits_bytes > budget:
        return Guard(name, State.PARTIAL, f"everything else is limited to {total}: too much", advice)
    return Guard(name, State.ON, f"everything else is limited to {total}")


def _resident(file: Path) -> int:
    """Return the bytes of the segment that are in RAM."""
    return file.stat().st_blocks * 512 if file.exists() else 0


def _bound_bytes(file: Path) -> int:
    """Return what the segment may have at most as it is now: its file has the size of its ceiling."""
    try:
        with contextlib.closing(segment.core().attach(str(file))) as opened:
            return int(opened.size_range[1])
    except (SegmentError, OSError):  # missing or damaged
        return file.stat().st_size if file.exists() else 0


def realtime_guard(members: Sequence[Member], proc: Path) -> Guard:
    """Say whether every thread of `members` runs under SCHED_RR and the kernel keeps enough memory free."""
    others = [one.role for one in members if not _every_thread(one.pid, proc, _is_realtime)]
    lacks, advice = [], []
    if others or not members:
        lacks.append(f"{_roles(others) or 'the server'} does not run under SCHED_RR")
        advice.append("start the manager with --realtime (and add the device anew)")
    want_kb, now = watermarks.wanted_free_kb(proc), watermarks.current(proc)
    if now[watermarks.FREE] < want_kb:
        lacks.append(f"vm.{watermarks.FREE} is {now[watermarks.FREE]}, not {want_kb}")
    if now[watermarks.BOOST] > 0:
        lacks.append(f"vm.{watermarks.BOOST} is {now[watermarks.BOOST]}")
    if len(lacks) > len(advice):
        advice.append("run 'tmem watermarks'")
    if not lacks:
        return Guard("realtime", State.ON, "SCHED_RR, and the kernel keeps a twentieth of RAM free")
    state = State.MISSING if len(lacks) == 3 else State.PARTIAL
    return Guard("realtime", state, ", ".join(lacks), " and ".join(advice))


def locked_guard(members: Sequence[Member], report: dict[str, object], proc: Path) -> Guard:
    """Say whether the members have locked their memory; `report` is what the server said of itself."""
    name = "locked memory"
    if not any(one.role == SERVER for one in members):
        return Guard(name, State.UNKNOWN, "the server does not run", _START)
    # nbdfuse cannot: that is told by the attachment.
    locked = {one.role: locked_bytes(one.pid, proc) for one in members if one.role != NBDFUSE}
    advice = "run the manager as root, or raise its LimitMEMLOCK"
    if not locked[SERVER]:
        return Guard(name, State.MISSING, "nothing of the server is locked", advice)
    without = [role for role, size in locked.items() if not size]
    refused = report.get("refused")
    kb = locked[SERVER] >> 10
    if without:
        return Guard(name, State.PARTIAL, f"nothing of {_roles(without)} is locked", advice)
    if isinstance(refused, list) and refused:
        return Guard(name, State.PARTIAL, f"{kb} kB of the server are locked, but {refused[0]}", advice)
    why = f"{_roles(locked)} locked themselves, {kb} kB of the server"
    return Guard(name, State.ON, why)


def io_flusher_guard(members: Sequence[Member], proc: Path) -> Guard:
    """Say whether every thread of `members` is spared from waiting for I/O when it needs memory."""
    name = "io flusher"
    if not members:
        return Guard(name, State.UNKNOWN, "the server does not run", _START)
    others = [one.role for one in members if not _every_thread(one.pid, proc, _is_io_flusher)]
    if not others:
        return Guard(name, State.ON, "PR_SET_IO_FLUSHER is set")
    return Guard(
        name, State.MISSING, f"{_roles(others)} may wait for the device", "give the manager CAP_SYS_RESOURCE"
    )


def oom_guard(members: Sequence[Member], proc: Path) -> Guard:
    """Say whether the OOM killer spares all `members`."""
    name = "oom score"
    if not members:
        return Guard(name, State.UNKNOWN, "the server does not run", _START)
    scores = {one.role: _number(proc / str(one.pid) / "oom_score_adj") for one in members}
    wrong = [f"{score} of the {role}" for role, score in scores.items() if score != -1000]
    if not wrong:
        return Guard(name, State.ON, "the OOM killer spares the servers")
    advice = "give the manager CAP_SYS_RESOURCE, or OOMScoreAdjust=-1000 in its service file"
    return Guard(name, State.MISSING, f"oom_score_adj is {', '.join(wrong)}", advice)


def segment_guard(file: Path, members: Sequence[Member], proc: Path) -> Guard:
    """Say whether the kernel can swap out the pages of the segment."""
    name = "segment"
    mounts = procfiles.text(proc / "self/mountinfo")
    if not locking.swappable(file, mounts):
        return Guard(name, State.ON, "its file system is never swapped out")
    advice = "use a kernel from 6.4 on and the run-time directory /run/tmem, or run 'tmem contain' before "
    advice += "'tmem start' on a machine with cgroup v2"
    groups = {cgroup.group_of(one.pid, proc) for one in members}
    if cgroup.version(proc) == 2 and members and _forbidden(members, proc):
        backed = _resident(file)
        charged = sum(cgroup.statistics(group).get("shmem", 0) for group in groups if group is not None)
        if charged >= backed:
            return Guard(name, State.ON, "it is charged to the manager's group, which is never swapped out")
        why = (
            f"at most {format_size(charged)} of its {format_size(backed)} are charged to the manager's group"
        )
        return Guard(
            name, State.PARTIAL, why, "end it with 'tmem destroy --all', and start again in the group"
        )
    why = "it lies on a tmpfs without noswap: only the locks of running processes keep it in memory"
    return Guard(name, State.PARTIAL, why, advice)


def own_group_guard(members: Sequence[Member], proc: Path) -> Guard:
    """Say whether what the members have not locked can be swapped out."""
    name = "own group"
    advice = "run 'tmem contain', then start the manager anew (with systemd: in a slice with MemorySwapMax=0)"
    if not members or not _forbidden(members, proc):
        others = [one.role for one in members if not containment.swap_forbidden(one.pid, proc)]
        why = f"what {_roles(others) or 'the server'} has not locked can be swapped out to the device"
        return Guard(name, State.MISSING, why, advice)
    if cgroup.version(proc) == 1:
        why = "cgroup v1 swaps the servers' group out when no page cache is left"
        return Guard(name, State.PARTIAL, why, "boot with cgroup v2")
    return Guard(name, State.ON, "the servers' control group is never swapped out")


def _ram_guard(memory_bytes: int, proc: Path) -> Guard:
    """Say whether anything is left beside a segment of `memory_bytes`."""
    memory = meminfo.read(proc)
    left = memory.total_bytes - memory_bytes - contain.default_room(memory.total_bytes)
    why = (
        f"of {format_size(memory.total_bytes)} RAM a segment of {format_size(memory_bytes)} leaves "
        f"{format_size(max(left, 0))} for everything else, which takes {format_size(memory.taken_bytes)} now"
    )
    if left > memory.taken_bytes:
        return Guard("RAM", State.ON, why)
    return Guard("RAM", State.PARTIAL, why, "make the segment smaller ('tmem start --memory')")


def attachment_guard(kind: str, members: Sequence[Member]) -> Guard:
    """Say whether the device outlives its server."""
    name = "attachment"
    if kind == "nbdfuse":
        return Guard(
            name,
            State.PARTIAL,
            "nbdfuse is not locked and does not reconnect: when the server dies, its pages are out of reach",
            "use a kernel with the nbd driver for more than a trial",
        )
    absent = [role for role in (KEEPER, STANDBY, MANAGER) if role not in {one.role for one in members}]
    if not absent:
        return Guard(name, State.ON, "a second server and the keeper stand ready when the server dies")
    why = f"requests wait long when the server dies: there is no {' and no '.join(absent)}"
    return Guard(name, State.PARTIAL, why, _START)


def locked_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Return how much memory process `pid` has locked (VmLck)."""
    with contextlib.suppress(OSError):
        for line in procfiles.lines(proc / str(pid) / "status"):
            if line.startswith("VmLck:"):
                return int(line.split()[1]) << 10
    return 0


def _forbidden(members: Sequence[Member], proc: Path) -> bool:
    return all(containment.swap_forbidden(one.pid, proc) for one in members)


def _roles(roles: Iterable[str]) -> str:
    """Return ``the server, the manager``."""
    return ", ".join(f"the {role}" for role in roles)


def _every_thread(pid: int, proc: Path, holds: Callable[[list[str]], bool]) -> bool:
    """Return whether something holds for each thread, by the fields of its stat file from the third on."""
    seen = False
    for stat in (proc / str(pid) / "task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            text = stat.read_text(encoding="utf-8", errors="replace")
            if not holds(text.rpartition(")")[2].split()):
                return False
            seen = True
    return seen


def _is_realtime(fields: list[str]) -> bool:
    return int(fields[38]) in (_SCHED_FIFO, _SCHED_RR)


def _is_io_flusher(fields: list[str]) -> bool:
    return int(fields[6]) & _IO_FLUSHER == _IO_FLUSHER


def _number(path: Path) -> int:
    """Return the number in a file of /proc, -1 if it cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return -1
