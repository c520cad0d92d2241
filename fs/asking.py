"""Asks the mounts of a segment for their statistics, and waits for none that does not answer.

A process of its own asks them one after the other; one that is kept waiting is left behind and another
asks the rest. It is no thread, because who waits for the answer to a request that the daemon has taken cannot
even be killed: such a thread would keep its process, and the port that it listens on, beyond its end. At most
one process waits at each mount. Not for commands that may wait: `mounts`. For one thread.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from tmem.backends.paths import SegmentPaths
from tmem.fs import mounts
from tmem.fs.statistics import MountStatistics

PATIENCE_S = 1.0
"""How long one mount is waited for, and the start of a process."""
DEADLINE_S = 2.0
"""How long all of them are; whom nobody asked by then has not answered."""
_DYING_S = 0.1
_ASK = f"""
import os, sys
for mountpoint in sys.argv[1:]:
    try:
        told = os.getxattr(mountpoint, {os.fsdecode(mounts.STATISTICS_ATTRIBUTE)!r})
    except OSError:
        told = b""
    os.write(1, told + b"\\n")
"""


@dataclass(frozen=True)
class Recorded:
    """A mount that has a record beside the segment."""

    client: str
    mountpoint: str
    tier: str | None = None
    """The servers that other hosts ask, too, as they may be shown."""


def recorded(paths: SegmentPaths) -> list[Recorded]:
    """Return the mounts of the segment that are mounted, also those whose daemon is dead. Touches none."""
    mounted = {mount.mountpoint for mount in mounts.mounts() if mount.kind == mounts.KIND}
    found = []
    for record in sorted(paths.state.glob("mount-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it ended while we looked
            told = json.loads(record.read_text(encoding="utf-8"))
            if told["mountpoint"] in mounted:
                found.append(Recorded(str(told["client"]), told["mountpoint"], told.get("tier")))
    return found


class Asker:
    """Asks again and again, and remembers where its processes wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, subprocess.Popen[bytes]] = {}

    def ask(self, mountpoints: Iterable[str]) -> dict[str, MountStatistics | None]:
        """Return what each mount has counted, None for one that does not answer."""
        end = time.monotonic() + DEADLINE_S
        self._waiting = {point: child for point, child in self._waiting.items() if child.poll() is None}
        answers: dict[str, MountStatistics | None] = dict.fromkeys(mountpoints)
        left = [point for point in answers if point not in self._waiting]
        while left and time.monotonic() < end:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _ASK, *left],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                told = _lines(child, len(left), end)
            finally:
                _leave(child)
            answers.update((point, _parsed(line)) for point, line in zip(left, told, strict=False))
            if len(told) < len(left) and child.poll() is None:
                self._waiting[left[len(told)]] = child
            left = left[len(told) + 1 :]
        return answers


def _lines(child: "subprocess.Popen[bytes]", most: int, end: float) -> list[bytes]:
    """Return the lines that it writes, up to one that takes too long."""
    assert child.stdout is not None
    descriptor, text = child.stdout.fileno(), b""
    patience = time.monotonic() + PATIENCE_S
    while (done := text.count(b"\n")) < most:
        if not select.select([descriptor], [], [], max(min(patience, end) - time.monotonic(), 0))[0]:
            break
        if not (more := os.read(descriptor, 1 << 16)):
            break
        text += more
        if text.count(b"\n") > done:
            patience = time.monotonic() + PATIENCE_S
    return text.split(b"\n")[:-1]


def _leave(child: "subprocess.Popen[bytes]") -> None:
    """End it if that can be; what waits where nothing ends it goes when the daemon answers or ends."""
    assert child.stdout is not None
    child.stdout.close()
    child.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(_DYING_S)


def _parsed(line: bytes) -> MountStatistics | None:
    try:
        return mounts.parsed(line)
    except (ValueError, AttributeError):
        return None
