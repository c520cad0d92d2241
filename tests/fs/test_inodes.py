"""The inode table: identity of files, counting lookups, few descriptors for many files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.fs.inodes import InodeTable
from tmem.fs.overlay import build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

CONTEXT = pyfuse3.RequestContext()


@pytest.fixture(params=[True, False])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InodeTable]:
    """A table whose numbers tell files apart, or are not trusted to."""
    table = InodeTable(os.open(tmp_path, os.O_RDONLY), quota=16, numbers_tell=request.param)
    yield table
    table.close()


def test_names_of_one_file_are_one_inode(table: InodeTable, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    root = table[pyfuse3.ROOT_INODE]
    inode, status = table.lookup(root, b"a")
    assert inode.nodeid == status.st_ino
    assert table.lookup(root, b"b")[0] is inode


def test_an_inode_lives_until_its_last_lookup_is_forgotten(table: InodeTable, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    inode, _ = table.lookup(table[pyfuse3.ROOT_INODE], b"a")
    table.remember(inode)
    table.remember(inode)
    assert table.forget(inode.nodeid, 1) is None
    assert table.forget(inode.nodeid, 1) is inode
    table.drop(inode)
    with pytest.raises(pyfuse3.FUSEError):
        table[inode.nodeid]
    assert (len(table), table.open_descriptors) == (1, 0)


@pytest.mark.parametrize(
    ("told", "certain"),
    [("without reports", True), ("unread", False), ("applied", False), ("before others", True)],
)
def test_another_time_is_told_if_the_kernel_knew_this_one_before_the_bytes(
    table: InodeTable, tmp_path: Path, told: str, certain: bool
) -> None:
    """To programs only if it certainly did: not if the report may have waited when it was told."""
    (tmp_path / "a").touch()
    inode, _ = table.lookup(table[pyfuse3.ROOT_INODE], b"a")
    nodes = table.nodes
    reports, reporter = os.pipe()
    try:
        nodes.reported_by(reports)
        for never_told in (5, 0):
            assert not nodes.has_old(inode, never_told, True)
        if told == "applied":
            nodes.catches_up(True)  # and has read it
        elif told != "without reports":
            os.write(reporter, b"r")
        assert nodes.tells(inode, 5, False) == (False, False)
        if told == "before others":
            nodes.catches_up(True)
            os.read(reports, 1)
            nodes.catches_up(False)
        if told != "applied":
            nodes.catches_up(True)
        assert nodes.has_old(inode, 5, True)
        nodes.catches_up(False)
        assert nodes.tells(inode, 5, False) == (certain, True)
        nodes.still_has_old(inode, 5)
        assert nodes.tells(inode, 5, False) == (not certain, True)
        assert nodes.tells(inode, 5, True) == (certain, certain)
        assert nodes.tells(inode, 5, True) == (False, False)
    finally:
        nodes.reported_by(-1)
        os.close(reports)
        os.close(reporter)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_descriptors_stay_within_the_quota(table: InodeTable, tmp_path: Path) -> None:
    root = table[pyfuse3.ROOT_INODE]
    inodes = []
    for number in range(100):
        (tmp_path / f"{number}").write_text(f"{number}")
        inode, _ = table.lookup(root, b"%d" % number)
        table.remember(inode)
        inodes.append(inode)
    assert table.open_descriptors == 16
    (tmp_path / "5").rename(tmp_path / "moved")
    for number, inode in enumerate(inodes):
        assert Path(table.path(inode)).read_text() == f"{number}"
    assert table.open_descriptors == 16


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_files_that_went_while_closed_are_stale_and_not_mistaken(table: InodeTable, tmp_path: Path) -> None:
    root = table[pyfuse3.ROOT_INODE]
    (tmp_path / "first").touch()
    first, _ = table.lookup(root, b"first")
    table.remember(first)
    for number in range(40):
        (tmp_path / f"{number}").touch()
        table.remember(table.lookup(root, b"%d" % number)[0])
    assert first.descriptor < 0
    (tmp_path / "first").unlink()
    for number in range(100, 120):  # file systems use inode numbers again soon
        (tmp_path / f"{number}").write_text("new")
        inode, status = table.lookup(root, b"%d" % number)
        table.remember(inode)
        assert inode is not first
        assert os.fstat(table.descriptor(inode)).st_ino == status.st_ino
    with pytest.raises(OSError, match="Stale"):
        table.descriptor(first)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_many_descriptors_are_closed_at_once_and_none_that_is_needed(tmp_path: Path) -> None:
    table = InodeTable(os.open(tmp_path, os.O_RDONLY), quota=256)
    root = table[pyfuse3.ROOT_INODE]
    inodes = []
    most = 0
    for number in range(900):
        path = tmp_path / f"{number}"
        path.write_text(f"{number}")
        inode, _ = table.lookup(root, b"%d" % number)
        table.remember(inode)
        inode.opens = number % 7 == 0
        if number % 11 == 0:
            path.unlink()  # nothing would open it again
        inodes.append(inode)
        most = max(most, table.open_descriptors)
    assert most <= 256
    assert sum(inode.descriptor >= 0 for inode in inodes) == table.open_descriptors
    for number, inode in enumerate(inodes):
        if inode.opens or number % 11 == 0:
            assert inode.descriptor >= 0
        assert Path(table.path(inode)).read_text() == f"{number}"
    table.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_what_needs_two_descriptors_has_both(tmp_path: Path) -> None:
    """To open the second one again closes the oldest, which may be the first."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "file").write_bytes(os.urandom(PAGE_SIZE))
    for number in range(80):
        (tmp_path / f"{number}").touch()
    root = os.open(tmp_path, os.O_RDONLY)
    overlay = build(root, Precache(SegmentPaths.of("none"), "web"), fine_stamps=True)
    overlay.table.nodes.bound(16, 1, True)

    async def main() -> None:
        names = iter(range(80))

        async def seen(name: str) -> int:
            return (await overlay.lookup(pyfuse3.ROOT_INODE, name.encode(), CONTEXT)).st_ino

        async def age(first: int, second: int) -> None:
            """Have the second one closed, and the first one be the oldest."""
            for nodeid in (second, first):
                overlay.table.descriptor(overlay.table[nodeid])
            while overlay.table[second].descriptor >= 0:
                await seen(f"{next(names)}")
            assert overlay.table.all()[0].nodeid == first

        new, old = await seen("new"), await seen("old")
        await age(old, new)
        await overlay.rename(old, b"file", new, b"moved", 0, CONTEXT)
        file = (await overlay.lookup(new, b"moved", CONTEXT)).st_ino
        while overlay.table.all()[0].nodeid != file:
            await seen(f"{next(names)}")
        await overlay.link(file, old, b"file", CONTEXT)

    try:
        trio.run(main)
    finally:
        overlay.close()
    assert (tmp_path / "old" / "file").samefile(tmp_path / "new" / "moved")
