"""Files that are not cached are read and written by the kernel itself, and nobody can tell."""

import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

OPTIONS = "loop=native,client=web,skip_files=*.log"
CONTENT = random.Random(1).randbytes(40 * PAGE_SIZE + 100)


def kernel_passes_through() -> bool:
    major, minor = (int(number) for number in os.uname().release.split(".")[:2])
    return (major, minor) >= (6, 9) and os.geteuid() == 0


pytestmark = pytest.mark.skipif(not kernel_passes_through(), reason="needs root and kernel 6.9 or later")


@pytest.fixture(params=["", ",watch=off", ",cache=kernel"])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount that passes logs through, with the usual lifetimes of attributes."""
    return mounter(OPTIONS + request.param)


@pytest.fixture
def plain_place(segment: "_native.Segment", mounter: Mounter) -> Place:
    return mounter(OPTIONS)


def same_status(place: Place, name: str) -> bool:
    def told(path: Path) -> tuple[int, ...]:
        status = path.stat()
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        return (status.st_mode, status.st_size, status.st_blocks, *times)

    return told(place.point / name) == told(place.lower / name)


def test_the_daemon_reads_and_writes_nothing(place: Place) -> None:
    (place.lower / "a.log").write_bytes(CONTENT)
    before = place.read_by_daemon()
    with (place.point / "a.log").open("r+b", buffering=0) as file:
        assert file.read() == CONTENT
        os.pwrite(file.fileno(), b"new", 5)
        with mmap.mmap(file.fileno(), 0) as mapping:
            assert mapping[:8] == CONTENT[:5] + b"new"
    read = place.read_by_daemon() - before
    assert (place.lower / "a.log").read_bytes() == CONTENT[:5] + b"new" + CONTENT[8:]
    statistics = place.statistics()
    assert (statistics.declined_opens, statistics.backed_opens) == (1, 1)
    assert statistics.passthrough_reads == statistics.put_pages == 0
    assert read < len(CONTENT)


def test_sizes_and_times_show_at_once(place: Place) -> None:
    (place.lower / "a.log").write_bytes(CONTENT)
    assert same_status(place, "a.log")  # which the kernel keeps
    with (place.point / "a.log").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 100, 3 * len(CONTENT))
        assert os.fstat(file.fileno()).st_size == 3 * len(CONTENT) + 100
        assert same_status(place, "a.log")
        mapping = mmap.mmap(file.fileno(), PAGE_SIZE)
        mapping[0] = 1
        assert same_status(place, "a.log")
        os.ftruncate(file.fileno(), PAGE_SIZE)
        assert same_status(place, "a.log")
    mapping.flush()  # the kernel writes it back, so the next store is one to a clean page: it changes times
    assert same_status(place, "a.log")
    mapping[1] = 2  # by a mapping that has outlived its file
    assert same_status(place, "a.log")
    assert (place.point / "a.log").read_bytes() == mapping[:]
    mapping.close()


def test_a_new_file_is_passed_through(place: Place) -> None:
    with (place.point / "new.log").open("x+b", buffering=0) as file:
        assert same_status(place, "new.log")
        file.write(CONTENT)
        assert same_status(place, "new.log")
        assert os.pread(file.fileno(), 10, 20) == CONTENT[20:30]
    assert place.statistics().backed_opens == 1


def test_what_was_written_past_the_pool_is_not_read_from_it(place: Place) -> None:
    """Not even if size and time of modification are as before."""
    name = place.point / "file"
    name.write_bytes(CONTENT)
    for _ in range(2):
        assert name.read_bytes() == CONTENT
    before = name.stat()
    name.rename(place.point / "file.log")
    wait_until(lambda: opens_backed(place, "file.log"))
    with (place.point / "file.log").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"changed", PAGE_SIZE)
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    (place.point / "file.log").rename(name)
    assert place.statistics().backed_opens >= 1
    for _ in range(2):
        assert name.read_bytes() == (place.lower / "file").read_bytes() != CONTENT


def opens_backed(place: Place, name: str) -> bool:
    """Open a file once more; whether it is passed through."""
    before = place.statistics().backed_opens
    with (place.point / name).open("rb") as file:
        assert file.read(1)
    return place.statistics().backed_opens > before


def test_all_opens_of_a_file_are_of_one_kind(place: Place) -> None:
    """The kernel answers EIO otherwise."""
    (place.lower / "file").write_bytes(CONTENT)
    with (place.point / "file").open("r+b", buffering=0) as cached:
        cached.write(b"1")
        (place.point / "file").rename(place.point / "file.log")
        os.link(place.point / "file.log", place.point / "linked.log")
        with (place.point / "linked.log").open("rb") as second:
            assert second.read(1) == b"1"
        assert place.statistics().backed_opens == 0
    wait_until(lambda: opens_backed(place, "file.log"))  # the daemon is told of the last close afterwards
    before = place.statistics().backed_opens
    with (place.point / "file.log").open("r+b", buffering=0) as passed:
        passed.write(b"2")
        (place.point / "file.log").rename(place.point / "file")
        with (place.point / "file").open("rb") as second, (place.point / "linked.log").open("rb") as third:
            assert second.read(1) == third.read(1) == b"2"
        assert place.statistics().backed_opens == before + 3
    wait_until(lambda: not opens_backed(place, "file"))
    assert (place.point / "file").read_bytes() == b"2" + CONTENT[1:]


def test_open_files_live_through_a_restart(plain_place: Place) -> None:
    place = plain_place
    (place.lower / "a.log").write_bytes(CONTENT)
    with (place.point / "a.log").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as mapping:
        place.restart()
        mapping[:3] = b"map"
        os.pwrite(file.fileno(), b"write", 3)
        with (place.point / "a.log").open("rb") as second:  # of the same backing file
            assert second.read() == b"mapwrite" + CONTENT[8:]
        assert place.statistics().backed_opens == 2
        assert same_status(place, "a.log")
        place.restart()
    (place.point / "a.log").rename(place.point / "file")
    wait_until(lambda: not opens_backed(place, "file"))
    assert (place.point / "file").read_bytes() == b"mapwrite" + CONTENT[8:]
    with (place.point / "b.log").open("x+b", buffering=0) as file:
        file.write(CONTENT)
        assert os.pread(file.fileno(), 50, 0) == CONTENT[:50]
    assert opens_backed(place, "b.log")
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_a_write_takes_set_id_bits_away(plain_place: Place) -> None:
    place = plain_place
    path = place.point / "a.log"
    (place.lower / "a.log").write_bytes(CONTENT)
    with path.open("r+b", buffering=0) as file:
        path.chmod(0o6777)
        os.pwrite(file.fileno(), b"x", 0)
        assert (place.lower / "a.log").stat().st_mode & 0o7777 == path.stat().st_mode & 0o7777 == 0o777
    assert place.statistics().backed_opens == 1
    path.chmod(0o6777)
    wait_until(lambda: not opens_backed(place, "a.log"))  # has them already: who writes is asked for
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x", 0)
    assert path.stat().st_mode & 0o7777 == 0o6777


@pytest.mark.parametrize("options", ["loop=fast", "loop=native,passthrough=off"])
def test_it_can_be_done_without(segment: "_native.Segment", mounter: Mounter, options: str) -> None:
    place = mounter(f"{options},skip_files=*")
    (place.lower / "a").write_bytes(CONTENT)
    assert (place.point / "a").read_bytes() == CONTENT
    statistics = place.statistics()
    assert (statistics.declined_opens, statistics.backed_opens) == (1, 0)
    assert statistics.passthrough_reads > 0


def works_below(place: Place) -> None:
    """A lower that cannot be passed through is read by the daemon."""
    (place.lower / "a").write_bytes(CONTENT)
    with (place.point / "a").open("r+b", buffering=0) as file:
        assert file.read() == CONTENT
        os.pwrite(file.fileno(), b"new", 0)
    assert (place.point / "a").read_bytes() == (place.lower / "a").read_bytes() == b"new" + CONTENT[3:]
    statistics = place.statistics()
    assert (statistics.declined_opens, statistics.backed_opens) == (2, 0)


def test_below_another_mount_that_passes_through(mounter: Mounter, tmp_path: Path) -> None:
    below = mounter("loop=native,client=below,skip_files=*")
    works_below(mounter("loop=native,skip_files=*", below.point, tmp_path / "upper"))


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    base = Path("/dev/shm") / f"tmem-test-overlay-{os.getpid()}"
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir(parents=True)
    directories = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", directories, str(base / "merged")], capture_output=True
    )
    try:
        if done.returncode:
            pytest.skip(f"overlayfs cannot be mounted here: {done.stderr.decode().strip()}")
        yield base / "merged"
    finally:
        subprocess.run(["umount", str(base / "merged")], capture_output=True)
        shutil.rmtree(base)


def test_on_top_of_overlayfs(overlay: Path, mounter: Mounter) -> None:
    works_below(mounter("loop=native,skip_files=*", overlay))
