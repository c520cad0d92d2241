"""The native reader asleep in read(2) of the device: whatever else comes, and its deadline, is seen in time.

By a reader with two neighbours, and by mounts. A thread sleeps so only after some hits in a row whose program
does not run beside it, so daemon and program share a CPU here.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.bench.mounts import pin
from tmem.fs.reading import GONE, NOTHING, REQUEST
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .reader_desk import SETXATTR, Desk, make

if TYPE_CHECKING:
    from tmem.backends import _native

SYS_READ = 0 if os.uname().machine == "x86_64" else 63
SOON_S = 5.0
LONG_MS = 60_000


def sleeps_in_read(process: int, thread: int, descriptor: int) -> bool:
    """Say whether a thread sleeps in read(2) of this descriptor."""
    words = Path(f"/proc/{process}/task/{thread}/syscall").read_text().split()
    return (
        words[0] != "running"
        and words[0] != "-1"
        and (int(words[0]), int(words[1], 16)) == (SYS_READ, descriptor)
    )


@pytest.fixture(autouse=True)
def one_cpu() -> Iterator[None]:
    """Have the test, and what it starts, on one CPU: a program never runs while its reply is written."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


class Served:
    """A desk whose reader serves in a thread, again and again after mere calls."""

    def __init__(self, desk: Desk, wake: int = -1, timeout_ms: int = LONG_MS) -> None:
        self.desk = desk
        self.events: list[int] = []
        self.ends = False
        self._wake, self._timeout_ms = wake, timeout_ms
        self._device = desk.device.fileno()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while not self.ends:
            self.events.append(self.desk.reader.serve(self._wake, self._timeout_ms))
            if self.events[-1] != NOTHING:
                return

    def hit(self, page: int) -> None:
        unique = self.desk.read(page * PAGE_SIZE, PAGE_SIZE)
        assert self.desk.answer() == (unique, 0, self.desk.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

    def asleep(self) -> bool:
        assert self.thread.native_id is not None
        return sleeps_in_read(os.getpid(), self.thread.native_id, self._device)

    def put_to_sleep(self) -> None:
        """Send hits, one at a time, until the thread sleeps in read."""

        def sleeps() -> bool:
            for page in range(20):
                self.hit(page)
            with suppress(AssertionError):
                wait_until(self.asleep, 0.1)
            return self.asleep()

        wait_until(sleeps, what="the thread sleeps in read")
        assert self.desk.reader.counters()["read_sleeps"] > 0

    def ended(self, event: int) -> bool:
        self.thread.join(SOON_S)
        return not self.thread.is_alive() and self.events[-1] == event


@contextmanager
def serving(desk: Desk, wake: int = -1, timeout_ms: int = LONG_MS) -> Iterator[Served]:
    served = Served(desk, wake, timeout_ms)
    try:
        yield served
    finally:
        served.ends = True
        if served.thread.is_alive():
            with suppress(OSError):
                desk.request(SETXATTR, bytes(16))  # for libfuse: ends it
        served.thread.join()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


def test_a_request_for_libfuse_is_passed_on(desk: Desk) -> None:
    with serving(desk) as served:
        served.put_to_sleep()
        unique = desk.request(SETXATTR, bytes(16))
        assert served.ended(REQUEST)
        assert desk.forwarded() == (SETXATTR, unique)


def test_what_wakes_the_event_loop_does(desk: Desk) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, serving(desk, ours.fileno()) as served:
        served.put_to_sleep()
        before = len(served.events)
        theirs.send(b"x")
        wait_until(lambda: len(served.events) > before, SOON_S)
        assert served.events[-1] == NOTHING
        assert not os.get_blocking(desk.device.fileno()) or served.asleep()


def test_replies_of_libfuse_are_passed_on_at_once(desk: Desk) -> None:
    """Some are late, when hits come again."""
    unique = desk.request(SETXATTR, bytes(16))
    assert desk.serve() == REQUEST
    desk.forwarded()
    with serving(desk) as served:
        served.put_to_sleep()
        desk.libfuse.send((16).to_bytes(4, "little") + bytes(4) + unique.to_bytes(8, "little"))
        assert desk.answer() == (unique, 0, b"")


def test_its_deadline_ends_it(desk: Desk) -> None:
    with serving(desk, timeout_ms=500) as served:
        served.put_to_sleep()
        before = len(served.events)
        wait_until(lambda: len(served.events) > before, SOON_S)
        assert served.events[-1] == NOTHING


def test_it_ends_with_the_connection(desk: Desk) -> None:
    with serving(desk) as served:
        served.put_to_sleep()
        desk.kernel.shutdown(socket.SHUT_RDWR)
        assert served.ended(GONE)


def test_the_device_does_not_block_when_nobody_serves(desk: Desk) -> None:
    with serving(desk) as served:
        served.put_to_sleep()
        assert os.get_blocking(desk.device.fileno())
        desk.request(SETXATTR, bytes(16))
        assert served.ended(REQUEST)
    assert not os.get_blocking(desk.device.fileno())


@pytest.fixture
def asleep(mounter: Mounter, segment: "_native.Segment") -> Iterator[Place]:
    """A mount whose event loop's thread sleeps in read(2) of /dev/fuse, with one open file: `file`."""
    place = mounter("loop=native,timeout=0")
    (place.lower / "file").write_bytes(os.urandom(64 * PAGE_SIZE))
    pin(place.pid, os.sched_getaffinity(0))
    file = os.open(place.point / "file", os.O_RDONLY | os.O_DIRECT)
    put_to_sleep(place, file)
    yield place
    with suppress(OSError):  # the daemon may be gone
        os.close(file)


def is_asleep(place: Place) -> bool:
    devices = []
    for one in Path(f"/proc/{place.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed meanwhile
            if str(one.readlink()) == "/dev/fuse":
                devices.append(int(one.name))
    return any(sleeps_in_read(place.pid, place.pid, device) for device in devices)


def put_to_sleep(place: Place, file: int) -> None:
    def sleeps() -> bool:
        for page in range(64):
            os.pread(file, PAGE_SIZE, page * PAGE_SIZE)
        return is_asleep(place)

    wait_until(sleeps, what="the daemon sleeps in read")


def ends_in_time(place: Place) -> bool:
    began = time.monotonic()
    wait_until(lambda: os.waitpid(place.pid, os.WNOHANG)[0] == place.pid)
    return time.monotonic() - began < SOON_S


def test_a_signal_ends_the_mount(asleep: Place) -> None:
    os.kill(asleep.pid, signal.SIGTERM)
    assert ends_in_time(asleep)


def test_unmounting_ends_it(mounter: Mounter, segment: "_native.Segment") -> None:
    place = mounter("loop=native,timeout=0")
    (place.lower / "file").write_bytes(os.urandom(64 * PAGE_SIZE))
    pin(place.pid, os.sched_getaffinity(0))
    with (place.point / "file").open("rb", buffering=0) as file:
        put_to_sleep(place, file.fileno())
    place.umount()
    assert ends_in_time(place)


def test_an_aborted_connection_ends_it(asleep: Place, tmp_path: Path) -> None:
    number = os.minor(asleep.point.stat().st_dev)
    file = os.open(asleep.point / "file", os.O_RDONLY | os.O_DIRECT)
    (tmp_path / "control").mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", str(tmp_path / "control")], check=True)
    try:
        put_to_sleep(asleep, file)
        (tmp_path / f"control/{number}/abort").write_text("1")
        assert ends_in_time(asleep)
    finally:
        subprocess.run(["umount", str(tmp_path / "control")], check=True)
        with suppress(OSError):
            os.close(file)


def test_new_code_takes_over(asleep: Place) -> None:
    file = os.open(asleep.point / "file", os.O_RDONLY | os.O_DIRECT)
    content = (asleep.lower / "file").read_bytes()
    for count in (1, 2):
        put_to_sleep(asleep, file)
        status = asleep.restart()
        assert (status.count, status.failure) == (count, "")
        assert os.pread(file, PAGE_SIZE, PAGE_SIZE) == content[PAGE_SIZE : 2 * PAGE_SIZE]
    os.close(file)


def test_deadlines_of_the_event_loop_hold(asleep: Place, eventually: Callable[..., None]) -> None:
    """It sleeps for a second at most: trio is asked again then."""
    before = switches(asleep.pid)
    eventually(lambda: switches(asleep.pid) > before)


def switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("voluntary")).split()[1])


def test_names_files_and_hits_in_turn(asleep: Place) -> None:
    """Each of the others ends the sleep, and hits begin it again; nothing waits for long."""
    content = (asleep.lower / "file").read_bytes()
    file = os.open(asleep.point / "file", os.O_RDONLY | os.O_DIRECT)
    slowest = 0.0
    for number in range(30):
        for page in range(64):
            assert (
                os.pread(file, PAGE_SIZE, page * PAGE_SIZE)
                == content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            )
        began = time.monotonic()
        new = asleep.point / f"new-{number}"
        new.write_bytes(b"x" * number)
        assert new.read_bytes() == b"x" * number
        os.setxattr(new, "user.x", b"y")
        new.unlink()
        slowest = max(slowest, time.monotonic() - began)
    os.close(file)
    assert slowest < SOON_S
