"""Looks at how much memory there is, and how long anybody waits for it.

Not for deciding anything (`tmem.backends.sizing`), nor for whoever looks often (native/headroom.c). Files
below ``/proc`` and ``/sys`` only; a look takes about 0.1 ms, one at memory a few times that. Threading: an
object belongs to one thread at a time; `Trigger.wait` blocks, so give it a thread.
"""

import os
import select
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import cgroup, meminfo

MACHINE = Path("/proc/pressure/memory")

# A fiftieth of half a second in which somebody waits for memory. Windows below two seconds are for root.
_TRIGGERS = (b"some 10000 500000", b"some 40000 2000000")


@dataclass(frozen=True)
class Room:
    """Memory of the machine, or of a control group: all of it, and what could be had without swapping."""

    total_bytes: int
    available_bytes: int


def rooms(pid: int | str = "self", proc: Path = Path("/proc")) -> list[Room]:
    """Return those of the machine and of every limited control group that a process is charged to."""
    memory = meminfo.read(proc)
    found = [Room(memory.total_bytes, memory.available_bytes)]
    for group in cgroup.groups_of(pid, proc):
        limit = cgroup.limit_of(group)
        if limit is not None and limit < memory.total_bytes:
            free = limit - (cgroup.usage_of(group) or 0)
            found.append(Room(limit, free + cgroup.cache_bytes(group)))
    return found


class Stalls:
    """How long anybody waited for memory, of the machine and where there is one of the control group."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._seen = [_stalled_us(file) for file in files]
        self._at_s: float | None = None

    def share(self, now_s: float) -> float:
        """Return the share of the time since the last call, from 0 to 1; 0 at the first and without PSI."""
        seen = [_stalled_us(file) for file in self._files]
        passed_s = 0.0 if self._at_s is None else now_s - self._at_s
        most_us = max((now - then for now, then in zip(seen, self._seen, strict=True)), default=0)
        self._seen, self._at_s = seen, now_s
        return min(most_us / passed_s / 1e6, 1.0) if passed_s > 0 else 0.0


class Trigger:
    """Ends a wait as soon as somebody waits for memory, where the kernel lets us ask for that."""

    def __init__(self, file: Path = MACHINE) -> None:
        self._poll = select.poll()
        self._descriptor: int | None = None
        for words in _TRIGGERS:
            with suppress(OSError):
                descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.write(descriptor, words + b"\0")
                except OSError:
                    os.close(descriptor)
                    continue
                self._poll.register(descriptor, select.POLLPRI)
                self._descriptor = descriptor
                return

    @property
    def works(self) -> bool:
        """Whether the kernel tells; if not, a wait is only a wait."""
        return self._descriptor is not None

    def wait(self, timeout_s: float) -> bool:
        """Wait for pressure, at most `timeout_s`; True if there is some."""
        events = self._poll.poll(int(timeout_s * 1000))
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in events):
            self.close()  # its control group is gone: from now on a wait is only a wait
            return False
        return bool(events)

    def close(self) -> None:
        """End it. Nobody may be waiting."""
        if self._descriptor is not None:
            self._poll.unregister(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def stall_files(pid: int | str = "self", proc: Path = Path("/proc")) -> list[Path]:
    """Return the files that say how long anybody waited: the machine's, and the control group's (v2)."""
    group = cgroup.group_of(pid, proc)
    files = [proc / "pressure" / "memory"] + ([] if group is None else [group / "memory.pressure"])
    return [file for file in files if file.exists()]


def figures(file: Path) -> dict[str, dict[str, float]]:
    """Return what a file says of who waits, for ``some`` and ``full``: ``avg10`` and the other averages in
    per cent, ``total`` in microseconds. Empty if it cannot be read."""
    found = {}
    with suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            kind, *words = line.split()
            found[kind] = {name: float(value) for name, value in (word.split("=") for word in words)}
    return found


def _stalled_us(file: Path) -> int:
    """Return the microseconds of "some" so far; 0 if it cannot be read."""
    return int(figures(file).get("some", {}).get("total", 0))
