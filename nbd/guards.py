"""The guards of swap that is served by this very machine, each as data: what holds, why, and what to do.

A kernel that swaps to its own userspace waits for itself as soon as the server, or anything on its way, needs
a page while none is free. Locked memory, PR_SET_IO_FLUSHER and the OOM score are needed and not enough: only
two measures have kept a machine from hanging, *containment* (everything else lives in groups whose limits
leave room) and *realtime* (SCHED_RR with enough free memory kept). Without one of them `require` refuses.

A device that another machine swaps to needs none of this. Reads /proc and the control groups, changes
nothing; `proc` is a parameter so that tests can show a machine made of files. Any thread.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tmem.backends import locking, service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, ServiceError
from tmem.nbd import containment, server
from tmem.nbd.export import Export, load_all
from tmem.types import format_size

_SCHED_FIFO, _SCHED_RR = 1, 2


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


def inspect(paths: SegmentPaths, export: Export, proc: Path = Path("/proc")) -> list[Guard]:
    """Return the guards of `export` as they are now; its server should be running."""
    process = server.running(paths, export.client)
    said = server.read_report(paths, export.client) or {}
    attached = export.attachment.process if export.attachment is not None else None
    pids = [found.pid for found in (process, attached) if found is not None]
    # The manager lives in the servers' control group and is no stranger there.
    family = [*pids, *_manager(paths)]
    memory_bytes = paths.segment.stat().st_size if paths.segment.exists() else 0
    found = [
        containment_guard(family, memory_bytes, proc),
        realtime_guard(pids, proc),
        _locked(process.pid if process else None, said, proc),
        _io_flusher(said if process else {}),
        _oom(pids, proc),
        _segment(paths.segment, (proc / "self/mountinfo").read_text(encoding="utf-8")),
        _unswappable(pids, proc),
    ]
    if export.attachment is not None:
        found.append(_attachment(export.attachment.kind))
    return found


def require(guards: Iterable[Guard], force: bool) -> None:
    """Raise `AttachError` unless containment or realtime holds, or the caller insists."""
    decisive = [guard for guard in guards if guard.name in ("containment", "realtime")]
    if force or any(guard.state is State.ON for guard in decisive):
        return
    advice = "; or ".join(guard.remedy for guard in decisive if guard.remedy)
    raise AttachError(
        "this machine could hang while it swaps to itself, for neither containment nor realtime holds: "
        f"{advice}; or insist with --force"
    )


def containment_guard(pids: Sequence[int], memory_bytes: int, proc: Path) -> Guard:
    """Say whether the limits of everything else leave room for a segment of `memory_bytes` and its
    servers."""
    found = containment.examine(pids, proc)
    budget = _ram_bytes(proc) - memory_bytes - containment.ROOM_BYTES
    advice = (
        f"let control groups limit everything else to {format_size(max(budget, 0))} in all, such as with "
        "'systemctl set-property system.slice MemoryMax=...' and the same for user.slice and machine.slice, "
        "and run the manager in a slice of its own"
    )
    if found is None:
        return Guard("containment", State.MISSING, "there is no memory controller", advice)
    if found.stray_processes or found.unlimited_groups:
        reasons = [f"{name} has no limit" for name in found.unlimited_groups[:3]]
        if found.stray_processes:
            reasons.insert(
                0, f"{found.stray_processes} processes are in the root group or in the servers' own"
            )
        return Guard("containment", State.MISSING, ", ".join(reasons), advice)
    total = format_size(found.limits_bytes)
    if found.limits_bytes > budget:
        return Guard("containment", State.PARTIAL, f"everything else is limited to {total}: too much", advice)
    return Guard("containment", State.ON, f"everything else is limited to {total}")


def realtime_guard(pids: Sequence[int], proc: Path) -> Guard:
    """Say whether the servers run under SCHED_RR and the kernel keeps enough memory free for them."""
    threads = [task for pid in pids for task in (proc / str(pid) / "task").glob("[0-9]*/stat")]
    others = [task for task in threads if _policy(task) not in (_SCHED_FIFO, _SCHED_RR)]
    want_kb = _ram_bytes(proc) // 20 >> 10
    free_kb = _number(proc / "sys/vm/min_free_kbytes")
    boost = _number(proc / "sys/vm/watermark_boost_factor")
    lacks, advice = [], []
    if others or not threads:
        lacks.append("the server does not run under SCHED_RR")
        advice.append("add the device with --realtime")
    if free_kb < want_kb:
        lacks.append(f"vm.min_free_kbytes is {free_kb}")
        advice.append(f"sysctl vm.min_free_kbytes={want_kb}")
    if boost != 0:
        lacks.append(f"vm.watermark_boost_factor is {boost}")
        advice.append("sysctl vm.watermark_boost_factor=0")
    if not lacks:
        return Guard("realtime", State.ON, "SCHED_RR, and the kernel keeps a twentieth of RAM free")
    state = State.MISSING if len(lacks) == 3 else State.PARTIAL
    return Guard("realtime", state, ", ".join(lacks), " and ".join(advice))


def _locked(pid: int | None, report: dict[str, object], proc: Path) -> Guard:
    name = "locked memory"
    if pid is None:
        return Guard(name, State.UNKNOWN, "the server does not run", "start the manager with tmem start -d")
    locked_kb = locked_bytes(pid, proc) >> 10
    refused = report.get("refused")
    advice = "run the server as root, or raise its LimitMEMLOCK"
    if not locked_kb:
        return Guard(name, State.MISSING, "nothing of the server is locked", advice)
    if isinstance(refused, list) and refused:
        return Guard(name, State.PARTIAL, f"{locked_kb} kB are locked, but {refused[0]}", advice)
    return Guard(name, State.ON, f"{locked_kb} kB of the server are locked")


def _io_flusher(report: dict[str, object]) -> Guard:
    if report.get("io_flusher") is True:
        return Guard("io flusher", State.ON, "PR_SET_IO_FLUSHER is set")
    if not report:
        return Guard(
            "io flusher", State.UNKNOWN, "the server does not run", "start the manager with tmem start -d"
        )
    return Guard(
        "io flusher",
        State.MISSING,
        "the server may wait for its own device",
        "give the manager CAP_SYS_RESOURCE",
    )


def _oom(pids: Sequence[int], proc: Path) -> Guard:
    scores = [_number(proc / str(pid) / "oom_score_adj") for pid in pids]
    if scores and all(score == -1000 for score in scores):
        return Guard("oom score", State.ON, "the OOM killer spares the server")
    return Guard(
        "oom score",
        State.MISSING if scores else State.UNKNOWN,
        f"oom_score_adj is {', '.join(map(str, scores)) or 'not to be seen'}",
        "give the manager CAP_SYS_RESOURCE, or OOMScoreAdjust=-1000 in its service file",
    )


def _segment(path: Path, mountinfo: str) -> Guard:
    if not locking.swappable(path, mountinfo):
        return Guard("segment", State.ON, "its file system is never swapped out")
    return Guard(
        "segment",
        State.PARTIAL,
        "it lies on a tmpfs without noswap: only the locks of running servers keep it in memory",
        "use a kernel from 6.4 on and the run-time directory /run/tmem",
    )


def _unswappable(pids: Sequence[int], proc: Path) -> Guard:
    names = {containment.swap_forbidden(pid, proc) for pid in pids}
    if names == {True}:
        return Guard("own group", State.ON, "the server's control group is never swapped out")
    return Guard(
        "own group",
        State.MISSING,
        "what the server has not locked can be swapped out to its own device",
        "run the manager in a group with memory.swap.max 0 (MemorySwapMax=0; cgroup v1: memory.swappiness 0)",
    )


def _attachment(kind: str) -> Guard:
    if kind == "nbd":
        return Guard(
            "attachment",
            State.PARTIAL,
            "requests wait when the server dies, but nothing reconnects them",
            "swapoff",
        )
    return Guard(
        "attachment",
        State.PARTIAL,
        "nbdfuse is not locked and does not reconnect: when the server dies, swapped pages are out of reach",
        "use a kernel with the nbd driver for more than a trial",
    )


def locked_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Return how much memory process `pid` has locked (VmLck)."""
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmLck:"):
                return int(line.split()[1]) << 10
    return 0


def _manager(paths: SegmentPaths) -> list[int]:
    """Return the process of the manager, if one runs."""
    try:
        pid = service.request(paths, {"op": "ping"}).get("pid")
    except ServiceError:
        return []
    return [pid] if isinstance(pid, int) else []


def _policy(stat: Path) -> int:
    """Return the scheduling policy of a thread (field 41 of its stat file), -1 if it is gone."""
    try:
        return int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[38])
    except OSError:
        return -1


def _number(path: Path) -> int:
    """Return the number in a file of /proc, -1 if it cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return -1


def _ram_bytes(proc: Path) -> int:
    text = (proc / "meminfo").read_text(encoding="ascii")
    return int(text.split("MemTotal:")[1].split()[0]) << 10
