"""Files that are created while others make, replace or remove names underneath."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.fs.overlay import build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty

if TYPE_CHECKING:
    from tmem.backends import _native

MINE, OTHER = b"m" * PAGE_SIZE, b"o" * PAGE_SIZE


@pytest.fixture
def faulty(world_readable: Path) -> Iterator[Faulty]:
    """A lower with one file called ``other``."""
    directory = world_readable / "backing"
    directory.mkdir()
    (directory / "other").write_bytes(OTHER)
    lower = Faulty(directory, world_readable / "lower")
    yield lower
    lower.close()


def test_for_reading_and_truncated(place: Place) -> None:
    descriptor = os.open(place.point / "new", os.O_RDONLY | os.O_CREAT | os.O_TRUNC)
    assert os.read(descriptor, 1) == b""
    os.close(descriptor)


@pytest.mark.usefixtures("root")
def test_replaced_at_once(faulty: Faulty, segment: "_native.Segment", mounter: Mounter) -> None:
    """What is read of the file that was created is not what is read of the one that has its name now."""
    place = mounter("timeout=0", lower=faulty.point)
    with (place.point / "other").open("rb", buffering=0) as other:
        assert other.read(PAGE_SIZE) == OTHER
        faulty.fail("create", replaced_by="other")
        with (place.point / "new").open("w+b", buffering=0) as mine:
            mine.write(MINE)
            for _ in range(2):
                assert os.pread(mine.fileno(), PAGE_SIZE, 0) == MINE
                assert os.pread(other.fileno(), PAGE_SIZE, 0) == OTHER
    assert (place.point / "new").read_bytes() == OTHER
    assert (place.point / "replaced").read_bytes() == MINE


_CREATE = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
print(os.read(descriptor, 100).decode())
"""


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("user", [0, 65534])
def test_made_underneath_meanwhile(
    faulty: Faulty, mounter: Mounter, world_readable: Path, eventually: Callable[..., None], user: int
) -> None:
    """It is opened as any file is that was there before: by those who may."""
    place = mounter("timeout=0,allow_other", lower=faulty.point, point=world_readable / "mount")
    place.lower.chmod(0o777)
    faulty.directory.chmod(0o777)
    faulty.fail("create", hangs=True)
    command = [sys.executable, "-I", "-S", "-c", _CREATE, str(place.point / "new")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, user=user
    ) as program:
        eventually(lambda: faulty.waiting() == ["create"])
        (faulty.directory / "new").touch(mode=0o600)
        (faulty.directory / "new").write_text("secret")
        faulty.heal()
        out, errors = program.communicate(timeout=60)
    assert out.strip() == ("secret" if user == 0 else "")
    assert user == 0 or "PermissionError" in errors


@pytest.mark.parametrize("exclusive", [0, os.O_EXCL])
def test_a_pipe_made_underneath_is_left_to_the_kernel(
    tmp_path: Path, runtime_dir: Path, exclusive: int
) -> None:
    """To open it may take for ever, on the event loop; and nothing is kept of what failed."""
    os.mkfifo(tmp_path / "pipe")
    overlay = build(os.open(tmp_path, os.O_RDONLY), Precache(SegmentPaths.of("default"), "web"))
    flags = os.O_RDWR | os.O_CREAT | exclusive
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(overlay.create, pyfuse3.ROOT_INODE, b"pipe", 0o644, flags, pyfuse3.RequestContext())
    assert caught.value.errno == (errno.EEXIST if exclusive else errno.ESTALE)
    assert len(overlay.table) == 1
    overlay.close()
