"""A shared pool in containers, through bind mounts, and over images that are alike: the same file is found
everywhere, another one nowhere."""

import contextlib
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs import syscalls
from tmem.fs.writers import is_quiet
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .images import loop_device, make_ext4, mounted, needs

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

UUID = uuid.UUID("00112233445566778899aabbccddeeff")
Share = Callable[[str, Path], Place]
SIZE = 40 * PAGE_SIZE + 7


@pytest.fixture
def share(segment: "_native.Segment", mounter: Mounter, tmp_path: Path) -> Share:
    """A function that mounts a directory for a client: ``share("web1", lower)``."""

    def mount(client: str, lower: Path) -> Place:
        segment.client(client).authorise(UUID.bytes)
        options = f"timeout=0,cache=direct,client={client},shared={UUID}"
        return mounter(options, lower=lower, point=tmp_path / client)

    return mount


@contextlib.contextmanager
def bound(source: Path, point: Path) -> Iterator[Path]:
    """Show a directory at another place."""
    point.mkdir()
    syscalls.mount(str(source), str(point), "", 4096, "")  # MS_BIND
    try:
        yield point
    finally:
        syscalls.umount(str(point), syscalls.MNT_DETACH)


CONTAINER = """
import os, sys
from tmem.fs import mounts
from tmem.cli.main import run
lower, point, options = sys.argv[1:]
assert run(["mount", lower, point, "-o", options]) == 0
print(mounts.daemon_of(point).pid, flush=True)
for line in sys.stdin:
    data = open(point + "/" + line.strip(), "rb").read()
    print(data.hex(), mounts.statistics(point).lower_bytes, flush=True)
assert run(["umount", point]) == 0
"""


class Container:
    """A process in a mount namespace of its own, with a mount that is seen only there."""

    def __init__(self, lower: Path, point: Path, options: str) -> None:
        point.mkdir()
        command = ["unshare", "--mount", sys.executable, "-c", CONTAINER, str(lower), str(point), options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        assert int(self._answers.readline())
        assert not os.path.ismount(point)

    def read(self, name: str) -> tuple[bytes, int]:
        """Return what is read there, and how many bytes its mount has read from the lower so far."""
        self._requests.write(f"{name}\n")
        self._requests.flush()
        data, lower_bytes = self._answers.readline().split()
        return bytes.fromhex(data), int(lower_bytes)

    def end(self) -> int:
        """Unmount; the exit status."""
        self._requests.close()
        return self._process.wait(30)

    def close(self) -> None:
        """End it in whatever state it is."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._answers.close()


def test_a_container_and_a_bind_mount_hit_what_one_has_read(
    share: Share, segment: "_native.Segment", tmp_path: Path, eventually: Callable[..., None]
) -> None:
    lower = tmp_path / "lower"
    (lower / "deep").mkdir(parents=True)
    content, new = random.Random(5).randbytes(SIZE), random.Random(6).randbytes(SIZE)
    (lower / "deep" / "file").write_bytes(content)
    segment.client("web3").authorise(UUID.bytes)
    options = f"timeout=0,cache=direct,client=web3,shared={UUID}"
    with (
        # First, or its namespace would keep the mounts of the others.
        contextlib.closing(Container(lower, tmp_path / "inside", options)) as box,
        bound(lower / "deep", tmp_path / "elsewhere") as elsewhere,
    ):
        one = share("web1", lower)
        assert (one.point / "deep" / "file").read_bytes() == content
        two = share("web2", elsewhere)
        assert (two.point / "file").read_bytes() == content
        assert two.statistics().lower_bytes == 0
        assert box.read("deep/file") == (content, 0)
        with (two.point / "file").open("r+b") as file:
            file.write(new)
        with (lower / "deep" / "file").open("rb") as below:  # the kernel does not wait for the close there
            eventually(lambda: is_quiet(below.fileno()))
        assert (one.point / "deep" / "file").read_bytes() == new
        assert box.read("deep/file") == (new, 0)  # one has put it
        assert (two.point / "file").read_bytes() == new
        one.kill()
        before = two.statistics().lower_bytes
        assert (two.point / "file").read_bytes() == new
        assert two.statistics().lower_bytes == before
        assert box.read("deep/file") == (new, 0)
        two.umount()
        assert box.read("deep/file") == (new, 0)
        assert box.end() == 0
    segment.reap()
    assert segment.check() == []


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Two images that differ in nothing but the bytes of a file."""
    needs("mkfs.ext4", "losetup")
    one, two = tmp_path / "one.img", tmp_path / "two.img"
    make_ext4(one, {"file": b"1" * SIZE})
    make_ext4(two, {"file": b"2" * SIZE})
    return one, two


def alike(path: Path) -> tuple[object, ...]:
    """Return all that says which version of which file this is."""
    status = path.stat()
    descriptor = os.open(path, os.O_RDONLY)
    handle = syscalls.file_handle(descriptor)
    os.close(descriptor)
    return status.st_ino, handle, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def test_images_that_are_alike_side_by_side(images: tuple[Path, Path], share: Share, tmp_path: Path) -> None:
    lowers = tmp_path / "lower1", tmp_path / "lower2"
    with (
        loop_device(images[0]) as one,
        loop_device(images[1]) as two,
        mounted(one, lowers[0], "ro"),
        mounted(two, lowers[1], "ro"),
    ):
        assert alike(lowers[0] / "file") == alike(lowers[1] / "file")
        places = share("web1", lowers[0]), share("web2", lowers[1])
        for _ in range(2):
            for place, byte in zip(places, (b"1", b"2"), strict=True):
                assert (place.point / "file").read_bytes() == byte * SIZE
        assert [place.statistics().put_pages for place in places] == [41, 41]
        for place in places:
            place.umount()


@pytest.mark.parametrize("ending", ["unmounted", "killed"])
def test_another_image_on_the_same_device(
    images: tuple[Path, Path], share: Share, tmp_path: Path, ending: str
) -> None:
    """The pool lives on by a third mount, which has nothing to do with them."""
    other, lower = tmp_path / "other", tmp_path / "lower"
    other.mkdir()
    share("web0", other)
    device, seen = "", []
    for image, byte in zip(images, (b"1", b"2"), strict=True):
        with loop_device(image, device) as device, mounted(device, lower, "ro"):
            place = share("web1", lower)
            # Once: pages that a mount has hit would leave the pool together with it.
            assert (place.point / "file").read_bytes() == byte * SIZE
            place.has_put(41)
            seen.append((*alike(lower / "file"), (lower / "file").stat().st_dev))
            if ending == "killed":
                place.kill()
                syscalls.umount(str(place.point), syscalls.MNT_DETACH)
            else:
                place.umount()
    assert seen[0] == seen[1]  # or nothing was tested


def test_another_image_below_the_lower_directory(
    images: tuple[Path, Path], segment: "_native.Segment", mounter: Mounter, tmp_path: Path
) -> None:
    """It is replaced while the mount is there, once the kernel has forgotten its files."""
    lower = tmp_path / "lower"
    lower.mkdir()
    place = mounter("timeout=0,cache=direct", lower=lower)
    device = ""
    for image, byte in zip(images, (b"1", b"2"), strict=True):
        with loop_device(image, device) as device, mounted(device, lower / "disk", "ro"):
            for _ in range(2):
                assert (place.point / "disk" / "file").read_bytes() == byte * SIZE
            Path("/proc/sys/vm/drop_caches").write_text("2")  # names that nobody uses
