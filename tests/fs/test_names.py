"""Names: every operation on directory entries does to the lower directory what it does on any file system."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from tmem.fs import syscalls

from .conftest import Place

NOREPLACE, EXCHANGE = 1, 2


def rename(old: Path, new: Path, flags: int) -> None:
    old_dir, new_dir = os.open(old.parent, os.O_PATH), os.open(new.parent, os.O_PATH)
    try:
        syscalls.renameat2(old_dir, os.fsencode(old.name), new_dir, os.fsencode(new.name), flags)
    finally:
        os.close(old_dir)
        os.close(new_dir)


def test_names_made_in_the_mount_are_in_the_lower_directory(place: Place) -> None:
    (place.point / "directory").mkdir(mode=0o750)
    (place.point / "directory/file").write_text("text")
    (place.point / "link").symlink_to("directory/file")
    os.link(place.point / "directory/file", place.point / "second")
    os.mkfifo(place.point / "pipe", 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.point / "s"))

    assert stat.S_IMODE((place.lower / "directory").stat().st_mode) == 0o750
    assert (place.lower / "second").read_text() == "text"
    assert (place.lower / "second").stat().st_nlink == 2
    assert os.fspath((place.point / "link").readlink()) == "directory/file"
    assert (place.lower / "link").readlink() == (place.point / "link").readlink()
    assert stat.S_ISFIFO((place.lower / "pipe").stat().st_mode)
    assert stat.S_ISSOCK((place.lower / "s").stat().st_mode)
    assert (place.point / "link").read_text() == "text"


def test_device_nodes_can_be_made(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a device node")
    os.mknod(place.point / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (place.lower / "null").stat().st_rdev == os.makedev(1, 3) == (place.point / "null").stat().st_rdev


def test_names_removed_in_the_mount_are_gone(place: Place) -> None:
    (place.lower / "directory").mkdir()
    (place.lower / "directory/file").write_text("x")
    with pytest.raises(OSError, match="not empty"):
        (place.point / "directory").rmdir()
    (place.point / "directory/file").unlink()
    (place.point / "directory").rmdir()
    assert list(place.lower.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (place.point / "directory/file").unlink()


@pytest.mark.parametrize(("flags", "error"), [(0, None), (NOREPLACE, errno.EEXIST), (EXCHANGE, None)])
def test_rename_onto_an_existing_file(place: Place, flags: int, error: int | None) -> None:
    (place.lower / "a").write_text("from a")
    (place.lower / "b").write_text("from b")
    if error:
        with pytest.raises(FileExistsError):
            rename(place.point / "a", place.point / "b", flags)
        assert (place.point / "b").read_text() == "from b"
        return
    rename(place.point / "a", place.point / "b", flags)
    assert (place.point / "b").read_text() == "from a" == (place.lower / "b").read_text()
    assert (place.lower / "a").exists() == (flags == EXCHANGE)
    if flags == EXCHANGE:
        assert (place.point / "a").read_text() == "from b"


def test_rename_across_directories_keeps_open_files(place: Place) -> None:
    (place.lower / "x").mkdir()
    (place.lower / "y").mkdir()
    (place.lower / "x/file").write_text("content")
    with (place.point / "x/file").open() as file:
        (place.point / "x/file").rename(place.point / "y/other")
        assert file.read() == "content"
        assert os.fstat(file.fileno()).st_ino == (place.point / "y/other").stat().st_ino


def test_renames_underneath_do_not_confuse_open_directories(place: Place) -> None:
    (place.lower / "x").mkdir()
    (place.lower / "x/file").write_text("content")
    directory = os.open(place.point / "x", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (place.lower / "x").rename(place.lower / "moved")
        (place.lower / "x").mkdir()  # an impostor
        descriptor = os.open("file", os.O_RDONLY, dir_fd=directory)
        assert os.read(descriptor, 100) == b"content"
        os.close(descriptor)
    finally:
        os.close(directory)


def test_listing_shows_every_entry_once(place: Place) -> None:
    names = {f"{number:04}-{'n' * 100}" for number in range(1500)}
    for name in names:
        (place.lower / name).touch()
    listed = [path.name for path in place.point.iterdir()]
    assert len(listed) == len(names)
    assert set(listed) == names


def test_listing_while_entries_go_skips_no_other(place: Place) -> None:
    for number in range(1000):
        (place.lower / f"{number:04}-{'n' * 100}").touch()
    seen = []
    with os.scandir(place.point) as entries:
        for entry in entries:
            seen.append(entry.name)
            (place.lower / entry.name).unlink()
    assert len(seen) == len(set(seen)) == 1000


def test_names_need_not_be_text(place: Place) -> None:
    name = os.fsdecode(b"\xff\xfe \n\\")
    (place.point / name).write_bytes(b"x")
    assert [path.name for path in place.lower.iterdir()] == [name]
    assert [path.name for path in place.point.iterdir()] == [name]


def test_new_names_underneath_show(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        (place.point / "late").stat()
    (place.lower / "late").write_text("there")
    assert (place.point / "late").read_text() == "there"


def test_missing_and_too_long_names_are_reported(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        (place.point / "none").stat()
    with pytest.raises(OSError, match="too long"):
        (place.point / ("n" * 256)).touch()
