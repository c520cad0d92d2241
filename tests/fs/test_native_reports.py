"""Changes underneath that the reader was not told of: the event loop's thread waits for something else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..waiting import wait_until
from . import underneath as other
from .native_mount import CONTENT, Maker, Mount, make
from .underneath import Underneath

NEW = bytes(reversed(CONTENT))


@pytest.fixture
def underneath() -> Iterator[Underneath]:
    process = Underneath()
    yield process
    process.close()


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    yield from make(tmp_path)


def hits(mount: Mount) -> int:
    return mount.reading.reader.counters()["hit_reads"]


def cached(mount: Mount) -> tuple[int, int]:
    """Return a file and its handle, reads of which are hits."""
    mount.grant()
    node = mount.look_up("file")
    _, handle, _ = mount.open(node)
    for _ in range(3):
        assert mount.read(node, handle) == CONTENT
    assert hits(mount)
    return node, handle


def test_hits_go_on_while_the_event_loop_waits(maker: Maker) -> None:
    mount = maker(watches=True)
    node, handle = cached(mount)
    mount.send_read(node, handle)  # the stand-in reads it, for nobody serves
    assert mount.answer() == (0, CONTENT)


def test_what_has_changed_is_no_hit_while_the_event_loop_waits(maker: Maker, underneath: Underneath) -> None:
    mount = maker(watches=True)
    node, handle = cached(mount)
    underneath(other.write, mount.lower / "file", 0, NEW)
    before = hits(mount)
    mount.send_read(node, handle)
    wait_until(mount.reading.has_request, what="it is left to Python")
    assert hits(mount) == before


def test_other_files_are_hits_although_something_has_changed(maker: Maker, underneath: Underneath) -> None:
    mount = maker(watches=True)
    node, handle = cached(mount)
    underneath(other.write, mount.lower / "another", 0, NEW)
    mount.send_read(node, handle)
    assert mount.answer() == (0, CONTENT)


def test_without_reports_a_change_shows_at_the_next_open(maker: Maker, underneath: Underneath) -> None:
    mount = maker()
    node, handle = cached(mount)
    underneath(other.write, mount.lower / "file", 0, NEW)
    mount.send_read(node, handle)
    assert mount.answer() == (0, CONTENT)
