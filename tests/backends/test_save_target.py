"""The file of a save: whole or not at all, for its owner only, and not in place of another one."""

import os
import subprocess
from pathlib import Path

import pytest

from tmem.backends import _native, save
from tmem.errors import SaveFileError

from .pages import oid, page
from .saving import put_all, source

__all__ = ["source"]


def test_a_file_appears_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with save.target(path) as descriptor:
        os.write(descriptor, b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), save.target(path, force=True) as descriptor:
        os.write(descriptor, b"content" * (1 // 0))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with (
        pytest.raises(SaveFileError, match="exists already: give another name, or --force"),
        save.target(path),
    ):
        pytest.fail("not reached")
    with save.target(path, force=True) as descriptor:
        os.write(descriptor, b"after")
    assert path.read_bytes() == b"after"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(SaveFileError, match="exists already"), save.target(path):
        path.write_bytes(b"quicker")
    assert path.read_bytes() == b"quicker"


def test_what_a_killed_save_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"much more than is written now")
    with save.target(tmp_path / "file") as descriptor:
        os.write(descriptor, b"short")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_two_saves_to_one_file(tmp_path: Path) -> None:
    with (
        save.target(tmp_path / "file"),
        pytest.raises(SaveFileError, match="is being written by another save"),
        save.target(tmp_path / "file"),
    ):
        pytest.fail("not reached")
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no ordinary file"), ("none/file", "there is no directory"), ("fifo", "no ordinary file")],
    ids=["a directory", "nowhere", "a FIFO"],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SaveFileError, match=reason), save.target(tmp_path / name, force=True):
        pytest.fail("not reached")


def test_a_full_disk_is_said_and_leaves_nothing(source: _native.Segment, root: None, tmp_path: Path) -> None:
    pages = {(oid(1), index): page("random", index) for index in range(1000)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmem-test", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        with (
            pytest.raises(SaveFileError, match="cannot be written: No space left"),
            save.target(disk / "file") as descriptor,
        ):
            save.save(source, "source", descriptor)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert source.client("one").phase == "none"
