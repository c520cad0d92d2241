"""A lower in which several files have one inode number: a FUSE file system that shows those of others.

Not for numbers that are used again: `test_inodes`.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import AttachError
from tmem.fs import syscalls
from tmem.types import PAGE_SIZE

from .conftest import Mounter

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

NAMES = ("one", "two", "three")


def content(letter: str) -> bytes:
    return letter[0].encode() * 3 * PAGE_SIZE


@pytest.fixture
def lower(tmp_path: Path) -> Iterator[Path]:
    """Directories that are alike to the inode, each with a file."""
    source, point = tmp_path / "source", tmp_path / "lower"
    source.mkdir()
    point.mkdir()
    for name in NAMES:
        (source / name).mkdir()
        syscalls.mount("tmpfs", str(source / name), "tmpfs", 0, "")
        (source / name / "file").write_bytes(content(name))
    subprocess.run(["bindfs", str(source), str(point)], check=True)
    assert len({(point / name / "file").stat().st_ino for name in NAMES}) == 1
    yield point
    for path in (point, *(source / name for name in NAMES)):
        syscalls.umount(str(path), syscalls.MNT_DETACH)


@pytest.mark.parametrize("loop", ["plain", "native"])
def test_each_is_itself(lower: Path, segment: "_native.Segment", mounter: Mounter, loop: str) -> None:
    place = mounter(f"timeout=0,loop={loop}", lower=lower)
    files = {name: place.point / name / "file" for name in NAMES}
    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(path.open("rb", buffering=0)) for name, path in files.items()}
        for _ in range(2):
            assert sorted(path.name for path in place.point.iterdir()) == sorted(NAMES)
            for name, file in held.items():
                assert os.pread(file.fileno(), 4 * PAGE_SIZE, 0) == content(name)
        assert place.statistics().hit_pages == 9
        place.restart()
        for name, path in files.items():
            assert path.read_bytes() == content(name)
        files["two"].write_bytes(b"new")
        for name, file in held.items():
            assert os.pread(file.fileno(), 4 * PAGE_SIZE, 0) == (b"new" if name == "two" else content(name))
    files["one"].unlink()
    assert files["two"].read_bytes() == b"new"
    assert (lower / "three" / "file").read_bytes() == files["three"].read_bytes() == content("three")


def test_links_are_one_file(lower: Path, mounter: Mounter) -> None:
    """Although the lower takes each of its names for a file of its own."""
    place = mounter("timeout=0", lower=lower)
    first, second = place.point / "one" / "file", place.point / "one" / "second"
    os.link(lower / "one" / "file", lower / "one" / "second")
    assert first.stat().st_ino == second.stat().st_ino
    with second.open("rb", buffering=0) as held:
        assert held.read(1) == b"o"
        first.write_bytes(b"new")
        assert os.pread(held.fileno(), 10, 0) == b"new"


def test_other_hosts_are_not_asked(lower: Path, mounter: Mounter) -> None:
    """They may have given another file the same handle."""
    shared = "shared=0123456789abcdef0123456789abcdef"
    with pytest.raises(AttachError, match="mount it without tier="):
        mounter(f"{shared},tier=redis://localhost:1", lower=lower)
