"""Which processes are ours: those in the path of one device, and all of a machine.

Nothing of this is kept in memory: the records in the state directories and the managers are asked. Only
looks; any thread.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import ServiceError, TmemError
from tmem.nbd import export, server
from tmem.nbd.export import Export

SERVER, STANDBY, KEEPER, MANAGER, NBDFUSE = "server", "standby", "keeper", "manager", "nbdfuse"


@dataclass(frozen=True)
class Member:
    """One process in the path of a device: what it is for, and its pid."""

    role: str
    pid: int


def of_device(paths: SegmentPaths, device: Export) -> list[Member]:
    """Return the running processes in the path of `device`: its server first, the manager among them."""
    found = [
        (SERVER, server.running(paths, device.client)),
        (STANDBY, service_process(paths, f"standby-{device.client}")),
        (KEEPER, service_process(paths, f"keeper-{device.client}")),
        (NBDFUSE, device.attachment.process if device.attachment is not None else None),
    ]
    pid = manager(paths)
    return [
        *(Member(role, process.pid) for role, process in found if process is not None and process.alive),
        *([Member(MANAGER, pid)] if pid is not None else []),
    ]


def manager(paths: SegmentPaths) -> int | None:
    """Return the process of the segment's manager, None if none runs."""
    try:
        pid = service.request(paths, {"op": "ping"}).get("pid")
    except ServiceError:
        return None
    return pid if isinstance(pid, int) else None


def segments(directory: Path) -> list[SegmentPaths]:
    """Return the segments in the run-time directory, by their state directories."""
    return [
        SegmentPaths(path.stem, directory)
        for path in sorted(directory.glob("*.d"))
        if (directory / path.stem).is_file()
    ]


def everybody(directory: Path) -> set[int]:
    """Return all our running processes: managers, what they keep running, servers, attachments, mounts."""
    found: set[int] = set()
    for paths in segments(directory):
        if (pid := manager(paths)) is not None:
            found.add(pid)
        found |= {process.pid for process in _recorded(paths) if process.alive}
    return found


def service_process(paths: SegmentPaths, name: str) -> Process | None:
    """Return the process that the manager noted for the service called `name`, None if it runs no more."""
    process = _process(paths.record("service", name), "process")
    return process if process is not None and process.alive else None


def _recorded(paths: SegmentPaths) -> Iterator[Process]:
    for record in paths.state.glob("service-*.json"):
        if (process := _process(record, "process")) is not None:
            yield process
    for record in paths.state.glob("mount-*.json"):
        if (process := _process(record)) is not None:
            yield process
    with contextlib.suppress(TmemError):  # a damaged record is doctor's to tell of
        for device in export.load_all(paths):
            if (process := server.running(paths, device.client)) is not None:
                yield process
            if device.attachment is not None and device.attachment.process is not None:
                yield device.attachment.process


def _process(record: Path, key: str | None = None) -> Process | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(record.read_text(encoding="utf-8"))
        value = value if key is None else value[key]
        return Process(int(value["pid"]), int(value["start_ticks"]))
    return None
