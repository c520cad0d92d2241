"""An ext4 on a disk that fails, and file systems that are full or taken away: real errors of real kernels."""

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.fs import syscalls
from tmem.types import PAGE_SIZE

from .conftest import Mounter
from .images import loop_device, make_ext4, mounted, needs

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

CONTENT = random.Random(3).randbytes(256 * PAGE_SIZE + 100)


@dataclass
class Disk:
    """A mounted ext4, and what makes its disk fail."""

    lower: Path
    reads_fail: Path
    writes_fail: Path


@pytest.fixture
def disk(tmp_path: Path, eventually: Callable[..., None]) -> Iterator[Disk]:
    """An ext4 over loop over nbdfuse over nbdkit with error filters that watch for two files."""
    needs("nbdkit", "nbdfuse", "mkfs.ext4")
    image, server, shown = tmp_path / "image", tmp_path / "socket", tmp_path / "shown"
    made = Disk(tmp_path / "lower", tmp_path / "reads-fail", tmp_path / "writes-fail")
    make_ext4(image, {"file": CONTENT, "other": CONTENT}, 32 << 20)
    shown.mkdir()
    writes = ["error-pwrite-rate=100%", f"error-pwrite-file={made.writes_fail}"]
    reads = ["error-pread-rate=100%", f"error-pread-file={made.reads_fail}"]
    command = ["nbdkit", "-f", "-U", str(server), "--filter=error", "file", str(image), *reads, *writes]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(command))
        eventually(server.exists)
        stack.enter_context(running(["nbdfuse", str(shown / "nbd"), f"nbd+unix:///?socket={server}"]))
        eventually((shown / "nbd").exists)
        stack.callback(syscalls.umount, str(shown), syscalls.MNT_DETACH)
        device = stack.enter_context(loop_device(shown / "nbd", direct=True))
        stack.enter_context(mounted(device, made.lower, "noatime,errors=remount-ro"))
        yield made
        made.reads_fail.unlink(missing_ok=True)
        made.writes_fail.unlink(missing_ok=True)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def drop_lower_caches(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def error_of(work: Callable[[], object]) -> int:
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("cache", ["direct", "kernel"])
def test_a_disk_that_cannot_be_read(
    disk: Disk, segment: "_native.Segment", mounter: Mounter, cache: str
) -> None:
    """Hits go on; the rest says EIO as the lower does; then all is right."""
    place = mounter(f"timeout=0,read_ahead=0,cache={cache}", lower=disk.lower)
    path = place.point / "file"
    with path.open("rb", buffering=0) as file, (place.point / "other").open("rb", buffering=0) as other:
        known = os.pread(file.fileno(), 64 * PAGE_SIZE, 0)
        assert known == CONTENT[: 64 * PAGE_SIZE]
        drop_lower_caches(disk.lower / "file")
        drop_lower_caches(disk.lower / "other")
        disk.reads_fail.touch()
        assert os.pread(file.fileno(), 32 * PAGE_SIZE, 0) == CONTENT[: 32 * PAGE_SIZE]
        assert error_of(lambda: os.pread(other.fileno(), PAGE_SIZE, 0)) == errno.EIO
        assert error_of(lambda: os.pread(file.fileno(), PAGE_SIZE, 200 * PAGE_SIZE)) == errno.EIO
        disk.reads_fail.unlink()
        for descriptor in (file.fileno(), other.fileno()):
            for start in range(0, len(CONTENT), 16 * PAGE_SIZE):
                part = os.pread(descriptor, 16 * PAGE_SIZE, start)
                assert part == CONTENT[start : start + 16 * PAGE_SIZE]
    for _ in range(2):
        assert path.read_bytes() == CONTENT == (place.point / "other").read_bytes()


def test_bytes_that_are_there_before_what_cannot_be_read(
    disk: Disk, segment: "_native.Segment", mounter: Mounter
) -> None:
    place = mounter("timeout=0,read_ahead=0,cache=direct", lower=disk.lower)
    size = 32 * PAGE_SIZE
    with (disk.lower / "file").open("rb", buffering=0) as below:
        os.posix_fadvise(below.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(below.fileno(), 8 * PAGE_SIZE, 0)
        with (place.point / "file").open("rb", buffering=0) as file:
            disk.reads_fail.touch()
            expected = os.pread(below.fileno(), size, 0)
            assert 0 < len(expected) < size
            assert os.pread(file.fileno(), size, 0) == expected == CONTENT[: len(expected)]
            assert error_of(lambda: os.pread(file.fileno(), size, len(expected))) == errno.EIO


def test_a_disk_that_cannot_be_written(disk: Disk, segment: "_native.Segment", mounter: Mounter) -> None:
    """fsync says so once; what is served afterwards is what the lower serves, whichever bytes these are."""
    place = mounter("timeout=0,cache=direct", lower=disk.lower)
    path = place.point / "file"
    assert path.read_bytes() == CONTENT
    with path.open("r+b", buffering=0) as file:
        disk.writes_fail.touch()
        assert os.pwrite(file.fileno(), b"new" * 5000, 0) == 15000
        assert os.pread(file.fileno(), 15000, 0) == b"new" * 5000
        assert error_of(lambda: os.fsync(file.fileno())) in (errno.EIO, errno.EROFS)
        disk.writes_fail.unlink()
        drop_lower_caches_quietly(disk.lower / "file")  # now the old bytes are back, as on any ext4
        shown = (disk.lower / "file").read_bytes()
        assert os.pread(file.fileno(), len(CONTENT), 0) == shown
    assert path.read_bytes() == shown
    # Whether it has become read-only or not: the mount says what the lower says.
    for name in ("new", "file"):
        below = error_of(lambda at=name: (disk.lower / at).open("ab").close())  # type: ignore[misc]
        assert error_of(lambda at=name: (place.point / at).open("ab").close()) == below  # type: ignore[misc]


def drop_lower_caches_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        drop_lower_caches(path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 pages and 20 inodes."""
    point = tmp_path / "small"
    point.mkdir()
    syscalls.mount("tmpfs", str(point), "tmpfs", 0, f"size={64 * PAGE_SIZE},nr_inodes=20")
    yield point
    syscalls.umount(str(point), syscalls.MNT_DETACH)


def test_a_lower_that_is_full(small: Path, segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,cache=direct", lower=small)
    data = random.Random(4).randbytes(100 * PAGE_SIZE)
    with (place.point / "file").open("wb", buffering=0) as file:
        written = os.pwrite(file.fileno(), data, 0)
        assert 0 < written < len(data)
        assert error_of(lambda: os.pwrite(file.fileno(), data, written)) == errno.ENOSPC
    for _ in range(2):
        assert (place.point / "file").read_bytes() == data[:written] == (small / "file").read_bytes()
    made = 0
    while not (error := error_of((place.point / f"f{made}").touch)):
        made += 1
    assert error == errno.ENOSPC
    assert not (small / f"f{made}").exists()
    (place.point / "file").unlink()
    # There is room once the daemon has closed and forgotten it, for which nobody waits.
    wait_until(lambda: not error_of((place.point / f"f{made}").touch))


def test_a_file_that_is_too_large(disk: Disk, segment: "_native.Segment", mounter: Mounter) -> None:
    """An ext4 holds files of 16 TiB, FUSE larger ones: the lower's limit is the one that counts."""
    place = mounter("timeout=0", lower=disk.lower)
    most = (1 << 32) * PAGE_SIZE
    for path in (disk.lower / "file", place.point / "file"):
        assert error_of(lambda at=path: os.truncate(at, most)) == errno.EFBIG  # type: ignore[misc]
        with path.open("r+b", buffering=0) as file:
            assert error_of(lambda to=file: os.pwrite(to.fileno(), b"x", most)) == errno.EFBIG  # type: ignore[misc]
    assert (place.point / "file").read_bytes() == CONTENT


def test_a_lower_that_becomes_read_only(
    small: Path, segment: "_native.Segment", mounter: Mounter, eventually: Callable[..., None]
) -> None:
    place = mounter("timeout=0", lower=small)
    (place.point / "file").write_bytes(b"x" * 5000)
    remount = ["mount", "-o", "remount,ro", str(small)]  # busy until the daemon has closed the file, too
    eventually(lambda: subprocess.run(remount, stderr=subprocess.DEVNULL).returncode == 0)
    assert (place.point / "file").read_bytes() == b"x" * 5000
    for work in (
        lambda: (place.point / "file").open("ab"),
        lambda: (place.point / "new").open("wb"),
        lambda: (place.point / "file").unlink(),
        lambda: (place.point / "file").chmod(0o600),
        lambda: os.setxattr(place.point / "file", "user.x", b""),
        lambda: os.truncate(place.point / "file", 1),
    ):
        assert error_of(work) == errno.EROFS
    assert (place.point / "file").read_bytes() == b"x" * 5000


def test_a_lower_that_is_unmounted_lazily_or_covered(
    small: Path, segment: "_native.Segment", mounter: Mounter
) -> None:
    """The mount goes on with the file system that it was made of."""
    place = mounter("timeout=0", lower=small)
    (place.point / "file").write_bytes(b"x" * 5000)
    syscalls.mount("tmpfs", str(small), "tmpfs", 0, "size=1m")
    try:
        (small / "file").write_bytes(b"y" * 5000)
        assert (place.point / "file").read_bytes() == b"x" * 5000
    finally:
        syscalls.umount(str(small))
    syscalls.umount(str(small), syscalls.MNT_DETACH)
    assert not (small / "file").exists()
    assert (place.point / "file").read_bytes() == b"x" * 5000
    (place.point / "more").write_bytes(b"z" * 5000)
    assert (place.point / "more").read_bytes() == b"z" * 5000
    place.umount()
    syscalls.mount("tmpfs", str(small), "tmpfs", 0, "")  # for the fixture
