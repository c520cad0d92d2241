"""Holes through the mount: found as the lower has them, made and filled, and no data is taken for one."""

import errno
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs import syscalls
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .images import file_system
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
PAGES = 64
BLOCK = 64 << 10
"""Of a hole, on any file system."""


@pytest.fixture(params=["cache=direct", "cache=kernel", "skip_files=*", BY_RINGS])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    return mounter(f"client=web,{request.param}")


def holes(path: Path, flags: int = os.O_RDONLY) -> list[int]:
    """Return where data and holes begin in turn, data first."""
    found: list[int] = []
    at = 0
    descriptor = os.open(path, flags)
    try:
        while True:
            at = os.lseek(descriptor, at, os.SEEK_HOLE if len(found) % 2 else os.SEEK_DATA)
            found.append(at)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return found
    finally:
        os.close(descriptor)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        for number in (1, 2, 5):
            os.pwrite(file.fileno(), random.Random(number).randbytes(BLOCK), number * BLOCK)
        file.truncate(8 * BLOCK)


def test_holes_are_found(place: Place) -> None:
    sparse(place.lower / "file")
    found = holes(place.point / "file")
    assert found == holes(place.lower / "file") == [BLOCK, 3 * BLOCK, 5 * BLOCK, 6 * BLOCK]
    with (place.point / "file").open("rb") as file:
        for offset in (8 * BLOCK, 1 << 50):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                    os.lseek(file.fileno(), offset, whence)
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == 8 * BLOCK


def test_a_sparse_file_is_archived_as_one(place: Place, tmp_path: Path) -> None:
    sparse(place.lower / "file")
    archive = tmp_path / "archive.tar"
    subprocess.run(["tar", "-S", "-C", place.point, "-cf", archive, "file"], check=True)
    assert 3 * BLOCK < archive.stat().st_size < 4 * BLOCK
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "out", "-xf", archive], check=True)
    assert (tmp_path / "out/file").read_bytes() == (place.lower / "file").read_bytes()


def test_data_in_mapped_memory_is_no_hole(place: Place) -> None:
    """Whatever the lower says of it before it is written back."""
    sparse(place.lower / "file")
    with (place.point / "file").open("r+b") as file, mmap.mmap(file.fileno(), 8 * BLOCK) as mapped:
        mapped[7 * BLOCK : 7 * BLOCK + 4] = b"here"
        file.close()
        with (place.point / "file").open("rb", buffering=0) as reader:
            at = os.lseek(reader.fileno(), 6 * BLOCK, os.SEEK_DATA)
            assert at <= 7 * BLOCK < os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            assert os.pread(reader.fileno(), 4, 7 * BLOCK) == b"here"
    assert holes(place.point / "file") == holes(place.lower / "file")
    assert holes(place.lower / "file")[-2] == 7 * BLOCK


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (
            KEEP_SIZE | PUNCH_HOLE,
            lambda content, start, end: content[:start] + bytes(end - start) + content[end:],
        ),
        (
            KEEP_SIZE | ZERO_RANGE,
            lambda content, start, end: content[:start] + bytes(end - start) + content[end:],
        ),
        (KEEP_SIZE, lambda content, start, end: content),
        (0, lambda content, start, end: content.ljust(end, b"\0")),
    ],
)
@pytest.mark.parametrize(("start", "size"), [(100, 5 * PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE), (3, 7)])
def test_what_was_in_the_pool_goes(
    place: Place, mode: int, change: Callable[[bytes, int, int], bytes], start: int, size: int
) -> None:
    content = random.Random(mode).randbytes(PAGES * PAGE_SIZE - 100)
    path = place.point / "file"
    path.write_bytes(content)
    with path.open("r+b", buffering=0) as file, path.open("rb", buffering=0) as reader:
        mapped = mmap.mmap(reader.fileno(), len(content), prot=mmap.PROT_READ)
        for at in (start, len(content) - 50):
            assert (reader.seek(0), reader.read()) == (0, content)
            assert mapped[:] == content
            syscalls.fallocate(file.fileno(), mode, at, size)
            if at == start or not mode:
                content = change(content, at, at + size)
            else:
                content = change(content, at, min(at + size, len(content)))
            assert (reader.seek(0), reader.read()) == (0, content)
            assert os.fstat(file.fileno()).st_size == len(content)
            assert (place.lower / "file").read_bytes() == content
            assert mapped[:] == content[: len(mapped)]
        mapped.close()
    assert path.read_bytes() == content


def test_room_is_taken_and_given_back(place: Place) -> None:
    path = place.point / "file"
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * BLOCK)
        status = path.stat()
        assert (status.st_size, status.st_blocks * 512 >= 16 * BLOCK) == (16 * BLOCK, True)
        syscalls.fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, 0, 15 * BLOCK)
        assert path.stat().st_blocks * 512 < 4 * BLOCK


@pytest.mark.parametrize("mode", [COLLAPSE, 32, 64])
def test_what_the_kernel_does_not_hand_on(place: Place, mode: int) -> None:
    with (place.point / "file").open("w+b") as file:
        file.truncate(BLOCK)
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            syscalls.fallocate(file.fileno(), mode, 0, PAGE_SIZE)


def test_errors_are_the_lowers(segment: "_native.Segment", mounter: Mounter) -> None:
    with file_system("tmpfs") as base:
        place = mounter(lower=base / "lower")
        path = place.point / "file"
        with path.open("w+b") as file:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                syscalls.fallocate(file.fileno(), 0, 0, 1 << 30)  # which has a quarter
            syscalls.fallocate(file.fileno(), 0, 0, BLOCK)
        with path.open("rb") as file, pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            syscalls.fallocate(file.fileno(), 0, 0, BLOCK)
        assert path.read_bytes() == bytes(BLOCK)
        place.umount()


def test_other_loops_have_neither(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("loop=plain")
    sparse(place.lower / "file")
    assert holes(place.point / "file") == [0, 8 * BLOCK]
    with (place.point / "file").open("r+b") as file:
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            syscalls.fallocate(file.fileno(), 0, 0, PAGE_SIZE)
        os.posix_fallocate(file.fileno(), 0, 9 * BLOCK)  # the C library writes
    assert (place.lower / "file").stat().st_size == 9 * BLOCK
