"""Fixtures of the overlay's tests: real mounts in temporary directories, taken down whatever happens."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.backends import pressure
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.fs import mounts
from tmem.fs.mount import SUCCESSOR, daemonise
from tmem.fs.options import MountOptions
from tmem.fs.plan import Successor
from tmem.fs.statistics import MountStatistics, RestartStatus

from .faulty import Faulty
from .hanging import two_files
from .rings import BY_RINGS, permitted
from .underneath import Underneath

if TYPE_CHECKING:
    from tmem.backends import _native


LOOP = os.environ.get("TMEM_TEST_LOOP", "")
"""How mounts read requests where a test does not say; empty: as they are shipped."""


@dataclass
class Place:
    """A mount under test."""

    lower: Path
    point: Path
    pid: int
    kernel_caches: bool = False

    def statistics(self) -> MountStatistics:
        return mounts.statistics(str(self.point))

    def has_put(self, pages: int) -> MountStatistics:
        """Return the statistics once so many pages were put; fail if more are, or not as many come.

        What is read ahead is there, and may be read, before it is counted.
        """
        wait_until(lambda: self.statistics().put_pages >= pages, what=f"{pages} pages are put")
        counted = self.statistics()
        assert counted.put_pages == pages
        return counted

    def read_reports(self) -> None:
        """Wait until the mount has heard of all that has changed underneath so far, if it is told at all.

        Else a report may come when a file has been opened, and cost it the pages that were put by then.
        """
        if not self.statistics().watching:
            return
        (self.lower / "reported").touch()
        (self.point / "reported").stat()
        before = self.statistics().noticed_changes
        (self.lower / "reported").chmod(0o600)
        wait_until(lambda: self.statistics().noticed_changes > before, what="a change is reported")

    def umount(self) -> None:
        mounts.umount(str(self.point))

    def restart(self) -> RestartStatus:
        return mounts.restart(str(self.point))

    def kill(self) -> None:
        """Kill the daemon as a crash would, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def inherited(self) -> list[str]:
        """Return what a child of the daemon would inherit beyond the standard streams."""
        found = []
        for info in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is closed meanwhile
                flags = dict(line.split(":", 1) for line in info.read_text().splitlines())["flags"]
                if int(info.name) > 2 and not int(flags, 8) & os.O_CLOEXEC:
                    found.append(str(Path(f"/proc/{self.pid}/fd/{info.name}").readlink()))
        return found

    def read_by_daemon(self) -> int:
        """Return the bytes that the daemon's read calls have returned so far."""
        text = Path(f"/proc/{self.pid}/io").read_text()
        return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


Mounter = Callable[..., Place]


@pytest.fixture
def mounter(tmp_path: Path, runtime_dir: Path) -> Iterator[Mounter]:
    """A function that mounts: ``mounter(options="", lower=..., point=..., successor=..., segment=...)``."""
    places: list[Place] = []

    def mount(
        options: str = "",
        lower: Path | None = None,
        point: Path | None = None,
        successor: Successor = SUCCESSOR,
        segment: str = "default",
    ) -> Place:
        lower = lower or tmp_path / "lower"
        point = point or tmp_path / "mount"
        lower.mkdir(exist_ok=True)
        if mounts.top_mount(str(point)) is None:
            point.mkdir(exist_ok=True)
        if LOOP and "loop=" not in options:
            options = f"{options},loop={LOOP}".removeprefix(",")
        if "cache=" not in options:  # that reads come to the daemon does not hang on this machine's memory
            options = f"{options},cache=direct".removeprefix(",")
        parsed = MountOptions.parse([options], str(point))
        with permitted(options):
            # Locked, it would copy all of the tests' memory first: 0.3 s of CPU and more instead of 0.03.
            paths = SegmentPaths.of(segment)
            pid = daemonise(str(lower), str(point), parsed, paths, successor, locked=False)
        places.append(Place(lower, point, pid))
        return places[-1]

    yield mount
    for place in reversed(places):
        with contextlib.suppress(AttachError):
            mounts.umount(str(place.point))
        if mounts.top_mount(str(place.point)) is not None:
            mounts.detach(str(place.point))
        _end(place.pid)


def in_plenty(patch: pytest.MonkeyPatch) -> None:
    """Have mounts that are made from now on find memory in plenty, whatever else this machine does."""
    patch.setattr(pressure, "rooms", lambda: [pressure.Room(1 << 30, 1 << 30)])


@pytest.fixture
def place(mounter: Mounter) -> Place:
    """A mount of an empty directory, with names and attributes never kept by the kernel."""
    return mounter("timeout=0")


def _end(pid: int) -> None:
    """Wait for a daemon of ours to end, and kill it if it does not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.suppress(ChildProcessError):
        if not select.select([pidfd], [], [], 5)[0]:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(pidfd)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    """A lower whose files can be made to hang (`hanging`)."""
    with two_files(tmp_path) as lower:
        yield lower
        with contextlib.suppress(OSError):  # it may have been killed
            lower.heal()


@pytest.fixture(params=["loop=native", BY_RINGS])
def faulty_place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "_native.Segment", mounter: Mounter
) -> Iterator[Place]:
    """A mount of that lower."""
    yield mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    faulty.heal()


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """A temporary directory that other users can enter (pytest's own are private)."""
    directory = Path(tempfile.mkdtemp(prefix="tmem-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def program(eventually: Callable[..., None]) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that no signal but SIGKILL reaches: it is stopped. So what it gets stays pending."""
    process = subprocess.Popen(["sleep", "1000"])
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def underneath() -> Iterator[Underneath]:
    """A process that changes what is underneath a mount."""
    process = Underneath()
    yield process
    process.close()
