"""Reports of the kernel of what changes on a file system, before anybody makes something of them."""

import os
from pathlib import Path

import pytest

from tmem.fs import fanotify
from tmem.fs.fanotify import Events
from tmem.types import PAGE_SIZE

from .underneath import Underneath

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A directory with a file of two pages."""
    (tmp_path / "file").write_bytes(bytes(2 * PAGE_SIZE))
    return tmp_path


def test_no_reports_of_file_systems_that_change_elsewhere() -> None:
    directory = os.open("/proc", os.O_RDONLY)
    try:
        assert Events.of(directory) is None
    finally:
        os.close(directory)


def test_reports_of_one_file_become_one(underneath: Underneath, lower: Path) -> None:
    directory = os.open(lower, os.O_RDONLY)
    events = Events.of(directory)
    assert events is not None
    try:
        underneath(many_writes, lower / "file", 1000)
        mine = [event for event in events.read() if event.pid == underneath.pid]
        assert [event.mask for event in mine] == [fanotify.MODIFY | fanotify.CLOSE_WRITE]
    finally:
        events.close()
        os.close(directory)


def many_writes(path: Path, count: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for _ in range(count):
            file.write(b"x")
