"""Control groups of a test's own, in either version of the kernel's interface; made by the fixture
`control_group`.

While there is one, a thread reads its memory.stat. Without that, Linux (6.18 at least; on zram as well, with
no tmem anywhere) kills a process in it now and then although swap has room. Reclaim takes the sizes of a
group's lists from statistics that may be two seconds old: where all pages have become active in this time
(each page that comes back from swap may), it believes the inactive list to be long enough, deactivates
nothing, scans the empty list and gives up. Reading the file brings the numbers up to date: a program made for
it was killed in 20 of 20 runs without, in none of 20 with it.
"""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest

from tmem.backends import cgroup

from .waiting import wait_until

_READ_INTERVAL_S = 0.02
"""Far less than it takes a group of some MiB to have all of its pages come back."""


class Groups:
    """Makes control groups and takes them down again, with what is in and below them."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Groups":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._reader.ident is not None:
            self._reader.join()
        for directory in self._made:
            for pid in set(cgroup.user_processes(directory, recursive=True)) - {os.getpid()}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            below = [listing.parent for listing in directory.rglob("cgroup.procs")]
            for group in sorted(below, key=lambda path: len(path.parts), reverse=True):
                wait_until(lambda at=group: removed(at), what=f"{group} is empty")  # type: ignore[misc]

    def make(self, limit_bytes: int | None = None) -> Path:
        """Return the directory of a new group; skips the test where there can be none."""
        mounted, version = cgroup.mount_point(), cgroup.version()
        if mounted is None or version is None:
            pytest.skip("no memory cgroup controller")
        directory = mounted / f"tmem-test-{os.getpid()}-{len(self._made)}"
        try:
            directory.mkdir()
        except OSError as error:
            pytest.skip(f"cannot make a control group: {error}")
        self._made.append(directory)
        if not _limit_file(directory).exists():
            pytest.skip("the memory controller is not enabled for child groups")
        if limit_bytes is not None:
            set_limit(directory, limit_bytes)
        if self._reader.ident is None:
            self._reader.start()
        return directory

    def _read(self) -> None:
        while not self._done.wait(_READ_INTERVAL_S):
            for directory in tuple(self._made):
                cgroup.statistics(directory)


def set_limit(group: Path, limit_bytes: int) -> None:
    """Change the limit of a group."""
    _limit_file(group).write_text(str(limit_bytes))


def used_bytes(group: Path) -> int:
    """Return what is charged to a group."""
    name = "memory.usage_in_bytes" if cgroup.version() == 1 else "memory.current"
    return int((group / name).read_text())


def reclaim(group: Path) -> None:
    """Have the kernel take back what it can of a group, also pages of the dead, at which it looks no more."""
    with suppress(OSError):  # there is less, or nothing
        if cgroup.version() == 1:
            (group / "memory.force_empty").write_text("0")
        else:
            (group / "memory.reclaim").write_text("1G")


def removed(group: Path) -> bool:
    """Remove a group if it is empty; say whether it is gone. The last of its dead leave it late."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _limit_file(group: Path) -> Path:
    return group / cgroup.LIMIT_FILES[cgroup.version() or 2]
