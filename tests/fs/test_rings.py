"""A mount whose requests come over io_uring: what is special about it. The rest is a mode of other tests."""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tasks import of_threads
from tmem.bench.mounts import pin
from tmem.errors import AttachError, TmemError
from tmem.fs import mounts, uring
from tmem.fs.options import MountOptions
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, READ, busy, program, two_files
from .rings import BY_RINGS, permitted

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
ENTRIES = 32
"""Requests of a CPU that can be under way (backends/native/reader_rings.c)."""


@pytest.fixture
def place(segment: "_native.Segment", mounter: Mounter) -> Place:
    made = mounter(f"timeout=0,{BY_RINGS}")
    assert made.statistics().io_uring
    return made


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    with two_files(tmp_path) as lower:
        yield lower


@pytest.fixture
def slow(faulty: Faulty, segment: "_native.Segment", mounter: Mounter) -> Iterator[Place]:
    """A mount of a lower that can be made to hang."""
    made = mounter(f"timeout=0,cache=direct,{BY_RINGS}", lower=faulty.point)
    assert (made.point / "other").read_bytes() == CONTENT
    yield made
    with contextlib.suppress(OSError):
        faulty.heal()


def pinned(number: int) -> None:
    """Run on one CPU from now on."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[number % len(cpus)]})


def on_every_cpu(work: Callable[[], None]) -> None:
    """Have a thread on each CPU do it: each CPU has a ring of its own."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            pinned(number)
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_hits_misses_and_ends_of_files_on_every_cpu(place: Place, segment: "_native.Segment") -> None:
    content = random.Random(1).randbytes(2 * MIB + 777)
    (place.lower / "file").write_bytes(content)

    def read() -> None:
        random_ = random.Random(2)
        with (place.point / "file").open("rb", buffering=0) as file:
            for _ in range(200):
                start = random_.randrange(len(content) + 5000)
                size = random_.choice([1, 100, 4096, 70000, MIB])
                assert os.pread(file.fileno(), size, start) == content[start : start + size]

    for _ in range(3):
        on_every_cpu(read)
    counted = place.statistics()
    assert counted.hit_reads > counted.miss_reads > 0
    assert segment.check() == []


def sleeps(pid: int) -> int:
    """Return how often threads of a process have gone to sleep so far."""
    fields = (line.split(":") for text in of_threads(pid, "status") for line in text.splitlines())
    return sum(int(value[0]) for name, *value in fields if name == "voluntary_ctxt_switches")


def test_the_next_is_looked_for_before_a_thread_sleeps(
    mounter: Mounter, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    """Where the program has a CPU of its own: else each request finds a thread that sleeps, and wakes it."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    place = mounter(f"timeout=0,cache=direct,{BY_RINGS}")
    (place.lower / "file").write_bytes(CONTENT)
    for _ in range(3):
        assert (place.point / "file").read_bytes() == CONTENT
    pin(place.pid, {cpus[1]})
    os.sched_setaffinity(0, {cpus[0]})
    count = 500
    try:
        with (place.point / "file").open("rb", buffering=0) as file:

            def most_are_found_awake() -> bool:
                before = sleeps(place.pid)
                for number in range(count):
                    start = number * PAGE_SIZE % len(CONTENT)
                    assert os.pread(file.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]
                return sleeps(place.pid) - before < count / 2

            eventually(most_are_found_awake)
    finally:
        os.sched_setaffinity(0, cpus)
    place.umount()


@pytest.mark.parametrize("size", [1, PAGE_SIZE + 1, MIB])
def test_writes_and_the_largest_attribute(place: Place, size: int) -> None:
    data, value = mmap.mmap(-1, MIB), random.Random(size).randbytes(min(size, 60_000))
    data[:size] = random.Random(size).randbytes(size)  # aligned, so that one request brings all of it

    def write() -> None:
        path = place.point / f"file-{threading.get_ident()}"
        with path.open("wb", buffering=0) as file:
            assert os.pwrite(file.fileno(), memoryview(data)[:size], 5) == size
            os.setxattr(file.fileno(), "user.name", value[: 3000 if size > PAGE_SIZE else None])
        below = (place.lower / path.name).read_bytes()
        assert below == bytes(5) + data[:size] == path.read_bytes()
        assert os.getxattr(path, "user.name") == os.getxattr(place.lower / path.name, "user.name")
        assert path.name in os.listdir(place.point)  # noqa: PTH208 - names are all that is asked for

    on_every_cpu(write)


def test_a_restart_says_that_it_cannot_be_and_the_mount_goes_on(place: Place) -> None:
    (place.lower / "file").write_bytes(CONTENT)
    with (place.point / "file").open("rb") as file:
        with pytest.raises(AttachError, match=r"io_uring.*unmount and mount again"):
            place.restart()
        assert file.read() == CONTENT
    assert place.statistics().io_uring


def test_programs_that_are_killed_leave_no_entry_behind(
    slow: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """More of them than there are entries; each is answered at once, and its late answer goes nowhere."""
    cpus = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus[:1])  # and the programs, so that all are of one ring
    try:
        for round_ in range(3):
            faulty.fail("read", hangs=True, name="slow")
            code = (
                f"import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, {5 * round_ * PAGE_SIZE})"
            )
            with contextlib.ExitStack() as stack:
                many = [stack.enter_context(program(code, slow.point / "slow")) for _ in range(ENTRIES // 2)]
                eventually(lambda: len(faulty.waiting()) >= ENTRIES // 2)
                for one in many:
                    one.kill()
                for one in many:
                    assert one.wait(60) == -signal.SIGKILL
                assert (slow.point / "other").read_bytes() == CONTENT
            faulty.heal()
        assert (slow.point / "slow").read_bytes() == CONTENT
    finally:
        os.sched_setaffinity(0, before)
    slow.umount()
    assert os.waitpid(slow.pid, 0)[1] == 0


def test_hits_go_on_beside_requests_that_hang(
    slow: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    with (slow.point / "other").open("rb", buffering=0) as other, contextlib.ExitStack() as stack:
        faulty.fail("read", hangs=True, name="slow")
        many = [stack.enter_context(program(READ, slow.point / "slow")) for _ in range(ENTRIES // 2)]
        eventually(lambda: len(faulty.waiting()) >= ENTRIES // 2)

        def read() -> None:
            for start in range(0, len(CONTENT), PAGE_SIZE):
                assert os.pread(other.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]

        on_every_cpu(read)
        faulty.heal()
        assert [one.wait(60) for one in many] == [0] * len(many)


def test_programs_that_are_killed_under_load(place: Place) -> None:
    (place.lower / "file").write_bytes(CONTENT)
    for _ in range(5):
        with busy(place.point / "file", 8) as programs:
            for one in programs:
                one.kill()

    def read() -> None:
        for _ in range(2 * ENTRIES):
            assert (place.point / "file").read_bytes() == CONTENT

    on_every_cpu(read)
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_where_it_is_switched_off_the_mount_goes_on_without(
    mounter: Mounter, segment: "_native.Segment", tmp_path: Path
) -> None:
    if uring.lacking():
        place = mounter("loop=native", point=tmp_path / "mount")
        place.umount()
    with permitted(BY_RINGS):  # nobody else switches it meanwhile
        before = uring.SWITCH.read_text()
        assert uring.lacking() == ""
        uring.SWITCH.write_text("N")
        try:
            assert f"echo 1 > {uring.SWITCH}" in uring.lacking()
            (tmp_path / "lower").mkdir(exist_ok=True)
            (tmp_path / "lower" / "file").write_bytes(CONTENT)
            (tmp_path / "mount").mkdir(exist_ok=True)
            command = [sys.executable, "-m", "tmem", "mount", "-o", BY_RINGS]
            said = subprocess.run(
                [*command, str(tmp_path / "lower"), str(tmp_path / "mount")],
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            uring.SWITCH.write_text(before)
    place = Place(tmp_path / "lower", tmp_path / "mount", mounts.restart_status(str(tmp_path / "mount")).pid)
    try:
        (line,) = said.stderr.splitlines()
        assert f"echo 1 > {uring.SWITCH}" in line
        assert not place.statistics().io_uring
        with (place.point / "file").open("rb") as file:
            assert file.read(5) == CONTENT[:5]
            assert place.restart().count == 1  # what was not agreed upon is not asked for again
            assert file.read() == CONTENT[5:]
        assert not place.statistics().io_uring
    finally:
        place.umount()


def test_a_kernel_without_it(tmp_path: Path) -> None:
    assert "6.14" in uring.lacking(tmp_path / "enable_uring")


def test_it_needs_the_native_reader() -> None:
    with pytest.raises(TmemError, match="loop=native"):
        MountOptions.parse(["io_uring=on,loop=fast"], "/mnt")
