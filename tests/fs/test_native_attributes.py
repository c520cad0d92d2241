"""Attributes that are answered below Python are what Python would say, of the right files."""

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from tmem.fs.inodes import InodeTable
from tmem.fs.reading import REQUEST

from .conftest import Mounter
from .names_told import ATTRIBUTES, ask, every_kind, wanted
from .reader_desk import GETATTR, Desk, make

EVERYTHING = [name for name in dir(os.stat_result) if name.startswith("st_")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory."""
    place = tmp_path / "place"
    place.mkdir()
    return place


@pytest.fixture
def table(place: Path) -> Iterator[InodeTable]:
    table = InodeTable(os.open(place, os.O_RDONLY), quota=16)
    yield table
    table.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


def test_both_loops_show_the_same(tmp_path: Path, mounter: Mounter) -> None:
    """Listed with attributes, looked up, and asked again for what was looked up."""
    (tmp_path / "lower").mkdir()
    every_kind(tmp_path / "lower")
    points = [mounter(f"{options},client={place}", point=tmp_path / place).point for place, options in LOOPS]
    shown = []
    for point in points:
        with os.scandir(point) as listed:
            rows = {entry.name: _all_of(entry.stat(follow_symlinks=False)) for entry in listed}
        for _ in range(2):
            again = {name: _all_of((point / name).lstat()) for name in rows}
            assert again == rows
        shown.append(rows)
    below = {name: _all_of((tmp_path / "lower" / name).lstat()) for name in shown[0]}
    assert len(below) >= 10
    assert shown == [below, below]


LOOPS = [("native", "loop=native,timeout=0"), ("plain", "loop=plain,timeout=0")]


def _all_of(status: os.stat_result) -> dict[str, object]:
    return {name: getattr(status, name) for name in EVERYTHING if name != "st_dev"}


def told(desk: Desk, node: int) -> tuple[int, ...] | None:
    """Return what a GETATTR is answered with below Python; None if it is for Python."""
    unique = ask(desk, node)
    if desk.serve() == REQUEST:
        assert desk.forwarded() == (GETATTR, unique)
        desk.reply(unique, error=-errno.ESTALE)
        assert desk.answer() == (unique, -errno.ESTALE, b"")
        return None
    number, error, body = desk.answer()
    assert (number, error, len(body)) == (unique, 0, 16 + ATTRIBUTES.size)
    return ATTRIBUTES.unpack_from(body, 16)


def test_attributes_are_those_of_the_file(desk: Desk, table: InodeTable, place: Path) -> None:
    every_kind(place)
    desk.reader.set_nodes(table.nodes, True)
    for path in place.iterdir():
        inode, _ = table.lookup(table[pyfuse3.ROOT_INODE], os.fsencode(path.name))
        table.remember(inode)
        status = path.lstat()
        assert told(desk, inode.nodeid) == wanted(status, inode.nodeid)
    assert told(desk, pyfuse3.ROOT_INODE) is None  # its node id is not what stat shows
    assert told(desk, 0) is None
    assert desk.reader.counters()["attributes"] > 9


def test_only_a_local_lower_is_asked_at_once(desk: Desk, table: InodeTable, place: Path) -> None:
    """Another one by threads, which say the same."""
    every_kind(place)
    desk.reader.set_nodes(table.nodes, False)
    for path in place.iterdir():
        inode = table.lookup(table[pyfuse3.ROOT_INODE], os.fsencode(path.name))[0]
        assert told(desk, inode.nodeid) == wanted(path.lstat(), inode.nodeid)
    number = place.stat().st_ino
    assert told(desk, pyfuse3.ROOT_INODE) == wanted(place.stat(), number)
    assert told(desk, 0) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_only_what_is_open_and_believed_is_asked(desk: Desk, table: InodeTable, place: Path) -> None:
    desk.reader.set_nodes(table.nodes, True)
    inodes = []
    for number in range(100):
        (place / f"{number}").write_bytes(b"x" * number)
        inodes.append(table.lookup(table[pyfuse3.ROOT_INODE], b"%d" % number)[0])
        table.remember(inodes[-1])
    answers = [told(desk, inode.nodeid) for inode in inodes]
    assert [number for number in range(100) if answers[number]] == list(range(84, 100))
    assert [answer[1] for answer in answers[84:] if answer] == list(range(84, 100))
    table.descriptor(inodes[3])  # is opened again
    reopened = told(desk, inodes[3].nodeid)
    assert reopened is not None
    assert reopened[1] == 3
    assert told(desk, inodes[84].nodeid) is None  # and this one closed for it
    table.store_to(inodes[99], True)
    assert told(desk, inodes[99].nodeid) is None
    table.store_to(inodes[99], False)
    assert told(desk, inodes[99].nodeid) is not None
    forgotten = table.forget(inodes[98].nodeid, 1)
    assert forgotten is inodes[98]
    table.drop(forgotten)
    assert told(desk, inodes[98].nodeid) is None


def test_a_restarted_table_is_known(desk: Desk, table: InodeTable, place: Path) -> None:
    (place / "a").write_bytes(b"12345")
    (place / "b").write_bytes(b"1234")
    for name in (b"a", b"b"):
        table.remember(table.lookup(table[pyfuse3.ROOT_INODE], name)[0])
    a, b = (table.lookup(table[pyfuse3.ROOT_INODE], name)[0] for name in (b"a", b"b"))
    table.store_to(b, True)
    saved, _ = table.saved([])
    after = InodeTable(saved["root"], quota=16)
    after.restore(saved)
    desk.reader.set_nodes(after.nodes, True)
    answer = told(desk, a.nodeid)
    assert answer is not None
    assert answer[1] == 5
    assert told(desk, b.nodeid) is None


def test_a_number_of_a_descriptor_is_not_mistaken(tmp_path: Path, table: InodeTable, place: Path) -> None:
    """While numbers of descriptors are used again for other files, others ask."""
    sizes = list(range(1, 41))
    for size in sizes:
        (place / f"{size}").write_bytes(b"x" * size)
    inodes = {size: table.lookup(table[pyfuse3.ROOT_INODE], b"%d" % size)[0] for size in sizes}
    for inode in inodes.values():
        table.remember(inode)
    sizes_of = {inode.nodeid: size for size, inode in inodes.items()}
    stop = False

    def churn() -> None:
        random_ = random.Random(3)
        while not stop:
            table.descriptor(inodes[random_.choice(sizes)])

    for desk in make(tmp_path, away_ms=1):  # somebody else answers: nobody else serves
        desk.reader.set_nodes(table.nodes, True)
        churner = threading.Thread(target=churn)
        churner.start()
        try:
            random_ = random.Random(4)
            natively = 0
            until = time.monotonic() + 1
            while time.monotonic() < until or not natively:
                node = inodes[random_.choice(sizes)].nodeid
                unique = ask(desk, node)
                # What is for Python comes out there, at some time.
                while (answer := _next(desk)) is None:
                    pass
                number, error, body = answer
                assert number == unique
                if not error:
                    attributes = ATTRIBUTES.unpack_from(body, 16)
                    assert (attributes[0], attributes[1]) == (node, sizes_of[node])
                    natively += 1
        finally:
            stop = True
            churner.join()


def _next(desk: Desk) -> tuple[int, int, bytes] | None:
    """Return the next answer, one from Python being an error."""
    try:
        _, unique = desk.forwarded()
        desk.reply(unique, error=-errno.ESTALE)
    except BlockingIOError:
        pass
    try:
        return desk.answer_now()
    except BlockingIOError:
        return None
