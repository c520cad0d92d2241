"""Attributes and listings that are answered below Python say what Python would, of the right files."""

import contextlib
import errno
import os
import random
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import pytest

from tmem.backends import _native
from tmem.fs.inodes import InodeTable
from tmem.fs.lifetimes import Lifetimes
from tmem.fs.reading import NOTHING, REQUEST

from .conftest import Mounter
from .reader_desk import GETATTR, READDIRPLUS, Desk, make

EVERYTHING = [name for name in dir(os.stat_result) if name.startswith("st_")]
_ATTRIBUTES = struct.Struct("=QQQqqqIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_DIRENT = struct.Struct("=QQII")
_NO_NODE = 1 << 63


class Entry(NamedTuple):
    """One entry of a listing that the kernel has got."""

    name: bytes
    node: int
    generation: int
    name_seconds: int
    attribute_seconds: int
    attributes: tuple[int, ...]
    ino: int
    number: int
    kind: int


def entries(page: bytes) -> list[Entry]:
    found = []
    at = 0
    while at < len(page):
        node, generation, name_seconds, attribute_seconds, _, _ = _ENTRY.unpack_from(page, at)
        attributes = _ATTRIBUTES.unpack_from(page, at + _ENTRY.size)
        ino, off, length, kind = _DIRENT.unpack_from(page, at + _ENTRY.size + _ATTRIBUTES.size)
        start = at + _ENTRY.size + _ATTRIBUTES.size + _DIRENT.size
        assert node == 0 or ino == attributes[0]
        name = page[start : start + length]
        found.append(
            Entry(name, node, generation, name_seconds, attribute_seconds, attributes, ino, off, kind)
        )
        at = (start + length + 7) & ~7
    assert at == len(page)
    return found


def wanted(status: os.stat_result, node: int) -> tuple[int, ...]:
    """Return what the kernel must be told of a file."""
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return (
        *(node, status.st_size, status.st_blocks, *(ns // 10**9 for ns in times)),
        *(ns % 10**9 for ns in times),
        *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid),
        *(status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0),
    )


def wanted_of(path: Path) -> tuple[int, ...]:
    """Return the same of a file whose node has its number."""
    return wanted(path.stat(), path.stat().st_ino)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from make(tmp_path)


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


def every_kind(directory: Path) -> None:
    """Make files of every kind, with attributes at the limits of what can be told."""
    (directory / "empty").touch()
    (directory / "file").write_bytes(b"x" * 12345)
    with (directory / "huge").open("wb") as file:
        file.truncate(1 << 43)
    (directory / "directory").mkdir(mode=0o1711)
    (directory / "symlink").symlink_to("x" * 1000)
    os.mkfifo(directory / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(directory / "socket"))
    os.link(directory / "file", directory / "another name")
    (directory / os.fsdecode(b"\xff\n\xfe")).touch()
    (directory / "early").touch()
    os.utime(directory / "early", ns=(-(10**18) - 1, -999_999_999))
    os.utime(directory / "file", ns=(1_700_000_000_000_000_001, 1_800_000_000_999_999_999))
    if os.geteuid() == 0:
        os.mknod(directory / "null", stat.S_IFCHR | 0o640, os.makedev(4095, 1048575))
        os.mknod(directory / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 3))
        (directory / "far").touch()
        os.chown(directory / "far", 0xFFFFFFFE, 0x80000001)
        (directory / "far").chmod(0o6751)


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


def ask(desk: Desk, node: int) -> int:
    """Send a GETATTR of a node."""
    unique = next(desk.uniques)
    desk.kernel.send(struct.pack("=IIQQIIII4x", 56, GETATTR, unique, node, 0, 0, 0, 0) + bytes(12))
    return unique


def told(desk: Desk, node: int) -> tuple[int, ...] | None:
    """Return what a GETATTR is answered with below Python; None if it is for Python."""
    unique = ask(desk, node)
    if desk.serve() == REQUEST:
        assert desk.forwarded() == (GETATTR, unique)
        desk.reply(unique, error=-errno.ESTALE)
        assert desk.answer() == (unique, -errno.ESTALE, b"")
        return None
    number, error, body = desk.answer()
    assert (number, error, len(body)) == (unique, 0, 16 + _ATTRIBUTES.size)
    return _ATTRIBUTES.unpack_from(body, 16)


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
                    attributes = _ATTRIBUTES.unpack_from(body, 16)
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


@pytest.mark.parametrize(
    ("seconds", "attributes", "names"),
    [(None, False, False), (None, True, False), (None, True, True), (0.25, True, True), (1e30, False, False)],
)
def test_lifetimes_are_those_of_python(
    desk: Desk, table: InodeTable, place: Path, seconds: float | None, attributes: bool, names: bool
) -> None:
    (place / "young").touch()
    lifetimes = Lifetimes(seconds, table.device)
    lifetimes.attributes_told, lifetimes.names_told = attributes, names
    desk.reader.set_nodes(table.nodes, True)
    inode, status = table.lookup(table[pyfuse3.ROOT_INODE], b"young")
    for device, age in ((table.device, 60.0), (table.device, -1.0), (table.device + 1, -1.0)):
        rule = lifetimes.rule()._replace(device=device, age=age)  # as if it were older
        table.nodes.believe(*rule)
        unique = ask(desk, inode.nodeid)
        assert desk.serve() == NOTHING
        number, _, body = desk.answer()
        whole, rest = struct.unpack_from("=QI", body)
        assert number == unique
        here = device == table.device
        of_attributes = rule.old if here and age < 0 else lifetimes.of_attributes(status)
        if not here:
            of_attributes = rule.young
        assert (whole, rest) == _told_seconds(of_attributes)
        page = listed(desk, place, [b"young"], lifetime=rule.name if here else rule.name_elsewhere)
        assert page[0].attribute_seconds == _told_seconds(of_attributes)[0]
        assert page[0].name_seconds == _told_seconds(rule.name if here else rule.name_elsewhere)[0]
    assert lifetimes.rule().name == lifetimes.of_name(table.device)
    assert lifetimes.rule().name_elsewhere == lifetimes.of_name(table.device + 1)


def _told_seconds(seconds: float) -> tuple[int, int]:
    whole = min(int(seconds), (1 << 64) - 1)
    return whole, int((seconds - whole) * 1e9) if seconds < 1e9 else 999_999_999 if seconds > 2**64 else 0


def begin(desk: Desk, place: int, start: int, size: int) -> tuple[int, "_native.ListingPage"]:
    """Have a listing asked for."""
    body = struct.pack("=QQIIQII", 5, start, size, 0, 0, 0, 0)
    unique = desk.request(READDIRPLUS, body)
    assert desk.serve() == REQUEST
    message = desk.forwarded_message()
    fh, number, length = struct.unpack_from("=QQI", message, 40)
    assert (fh, number, length) == (5, unique, min(size, 65536))
    page = desk.reader.page(number, 1.0)
    assert page.start == page.next == start
    return unique, page


def listed(
    desk: Desk, place: Path, names: list[bytes], start: int = 0, size: int = 32768, lifetime: float = 1.0
) -> list[Entry]:
    """List some names of a directory once."""
    directory = os.open(place, os.O_RDONLY)
    try:
        unique, page = begin(desk, directory, start, size)
        while page.next < len(names) and not page.full:
            page.look_up(directory, names, b"", True)
        if page.length:
            desk.reader.list(page)
        desk.reply(unique)
        number, error, body = desk.answer()
        assert (number, error, len(body)) == (unique, 0, page.length)
        return entries(body)
    finally:
        os.close(directory)


def test_pages_follow_each_other(desk: Desk, table: InodeTable, place: Path) -> None:
    desk.reader.set_nodes(table.nodes, True)
    names = [b".", b"..", *(b"%04d" % number * (1 + number % 30) for number in range(700))]
    for name in names[2:]:
        Path(os.fsdecode(os.fsencode(place) + b"/" + name)).touch()
    for size in (4096, 32768, 1 << 20):
        shown: list[Entry] = []
        while page := listed(desk, place, names, len(shown), size):
            taken = sum((152 + len(entry.name) + 7) & ~7 for entry in page)
            following = len(shown) + len(page)
            if following < len(names):  # no room for one more
                assert taken + ((152 + len(names[following]) + 7) & ~7) > min(size, 65536)
            shown += page
        assert [entry.name for entry in shown] == names
        assert [entry.number for entry in shown] == list(range(1, len(names) + 1))
        assert all(stat.S_IFMT(entry.attributes[9]) >> 12 == entry.kind for entry in shown)
        assert shown[0].node == place.stat().st_ino
        assert shown[1].node == place.parent.stat().st_ino


def test_an_end_is_told_below_python(desk: Desk) -> None:
    def told_end(fh: int, start: int) -> bool:
        unique = desk.request(READDIRPLUS, struct.pack("=QQIIQII", fh, start, 4096, 0, 0, 0, 0))
        natively = desk.serve() == NOTHING
        if not natively:
            desk.forwarded()
            desk.reply(unique, error=-errno.EIO)
        return desk.answer() == (unique, 0, b"") and natively

    assert not told_end(5, 10)
    desk.reader.ends(5, 10)
    assert told_end(5, 10)
    assert not any(told_end(fh, start) for fh, start in [(5, 9), (5, 11), (5, 0), (6, 10), (5 + 64, 10)])
    desk.reader.ends(5 + 64, 0)  # in the same place
    assert told_end(5, 10)
    desk.reader.ends(5, 0)  # it begins anew
    assert not told_end(5, 10)
    desk.reader.ends(5 + 64, 3)
    assert told_end(5 + 64, 3)
    assert not told_end(5, 0)
    assert desk.reader.counters()["ends"] == 3


def test_a_directory_that_grows_is_listed_anew(mounter: Mounter) -> None:
    """Where a listing has ended, a longer one of the same open directory goes on."""
    place = mounter("loop=native,timeout=0,watch=off")
    directory = place.lower / "d"
    directory.mkdir()
    sizes = [1, 50, 51, 400, 7, 0, 300]
    opened = os.open(place.point / "d", os.O_RDONLY)
    try:
        for size in sizes:
            present = {path.name for path in directory.iterdir()}
            for name in {f"{number:03d}" for number in range(size)} ^ present:
                (directory / name).unlink() if name in present else (directory / name).touch()
            names = os.listdir(opened)  # noqa: PTH208 - begins anew
            assert sorted(names) == [f"{number:03d}" for number in range(size)]
    finally:
        os.close(opened)


def test_what_is_gone_is_left_out_and_what_fails_has_a_name(
    desk: Desk, table: InodeTable, place: Path
) -> None:
    desk.reader.set_nodes(table.nodes, True)
    (place / "a").write_bytes(b"abc")
    (place / "z").mkdir()
    names = [b"gone", b"a", b"n" * 300, *(b"gone too %d" % number for number in range(600)), b"z", b"no"]
    a, failed, z = listed(desk, place, names)
    assert (a.name, a.number, a.attributes) == (b"a", 2, wanted_of(place / "a"))
    assert (failed.name, failed.number, failed.node) == (b"n" * 300, 3, _NO_NODE)
    assert (failed.attributes[9], failed.kind) == (0, 0)
    assert (z.name, z.number, z.attributes) == (b"z", 604, wanted_of(place / "z"))
    assert listed(desk, place, [b"gone"]) == []


def believe(table: InodeTable, attributes: float = 30.0, names: float = 60.0, device: int = 0) -> None:
    """Have names and attributes on a device believed for so long."""
    table.nodes.believe(table.device + device, names, 1.0, attributes, attributes, 60.0, 0.0)


def test_what_is_written_to_unseen_is_not_believed(desk: Desk, table: InodeTable, place: Path) -> None:
    desk.reader.set_nodes(table.nodes, True)
    believe(table, 60.0)
    for name in "abc":
        (place / name).touch()
    table.store_to(table.lookup(table[pyfuse3.ROOT_INODE], b"b")[0], True)
    directory = os.open(place, os.O_RDONLY)
    unique, page = begin(desk, directory, 0, 4096)
    page.look_up(directory, [b"a", b"b", b"c"], b"", True)
    assert (page.short_lived, page.shortest) == (1, 0.0)
    desk.reader.list(page)
    with pytest.raises(ValueError, match="under way"):
        desk.reader.list(page)
    with pytest.raises(ValueError, match="under way"):
        desk.reader.page(unique, 1.0)
    desk.reply(unique)
    assert [entry.attribute_seconds for entry in entries(desk.answer()[2])] == [60, 0, 60]
    with pytest.raises(ValueError, match="under way"):
        desk.reader.list(page)
    os.close(directory)


def test_a_page_that_fails_leaves_no_lookups(desk: Desk, table: InodeTable, place: Path) -> None:
    """The kernel will not forget what it was never told."""
    desk.reader.set_nodes(table.nodes, True)
    believe(table)
    for name in "abc":
        (place / name).touch()
    known, _ = table.lookup(table[pyfuse3.ROOT_INODE], b"a")
    table.remember(known)
    directory = os.open(place, os.O_RDONLY)
    names, places, _ = _native.names(directory)
    for _ in range(2):  # nor is it taken for told
        _, page = begin(desk, directory, 0, 4096)
        page.look_up(directory, [b".", *names, b"n" * 300], bytes(16) + places, True)
        assert (known.lookups, len(table)) == (2, 4)
        page.take_back()
        assert (known.lookups, len(table), table.open_descriptors, page.length) == (1, 2, 1, 0)
        page.take_back()
        assert known.lookups == 1
    os.close(directory)


def test_names_are_all_there(place: Path) -> None:
    wanted_names = {b"%05d" % number * 20 for number in range(3000)} | {b"\xff\n", b"...", b"..a"}
    for name in wanted_names:
        os.close(os.open(os.fsencode(place) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    directory = os.open(place, os.O_RDONLY)
    for _ in range(2):
        names, _, failed = _native.names(directory)
        assert (set(names), len(names), failed) == (wanted_names, len(wanted_names), 0)
    os.close(directory)
    assert _native.names(directory) == ([], b"", errno.EBADF)


def relisted(desk: Desk, place: Path, places: bytes | None = None) -> list[Entry]:
    """List a directory once, as the overlay does."""
    directory = os.open(place, os.O_RDONLY)
    try:
        names, found, _ = _native.names(directory)
        unique, page = begin(desk, directory, 0, 65536)
        while page.next < len(names):
            page.look_up(directory, names, found if places is None else places, True)
        desk.reader.list(page)
        desk.reply(unique)
        return entries(desk.answer()[2])
    finally:
        os.close(directory)


def forget(table: InodeTable, node: int) -> None:
    """Take all lookups of a node back."""
    inode = table.forget(node, 1 << 40)
    if inode is not None:
        table.drop(inode)


def test_what_the_kernel_was_told_lately_is_a_name_alone(
    desk: Desk, table: InodeTable, place: Path, eventually: Callable[..., None]
) -> None:
    every_kind(place)
    (place / "another name").unlink()
    believe(table)
    desk.reader.set_nodes(table.nodes, True)
    whole = relisted(desk, place)
    assert all(entry.node and entry.attributes[9] for entry in whole)
    alone = relisted(desk, place)
    assert [entry.node for entry in alone] == [0] * len(whole)
    # Number and kind are what programs see of the entry itself.
    assert [(e.name, e.number, e.kind, e.ino) for e in alone] == [
        (e.name, e.number, e.kind, e.ino) for e in whole
    ]
    assert relisted(desk, place, places=b"") == whole  # nobody knows which files they are
    forget(table, whole[0].node)
    assert [entry.node == 0 for entry in relisted(desk, place)] == [False] + [True] * (len(whole) - 1)
    table.nodes.doubt()
    again = relisted(desk, place)
    assert again[0].generation > whole[0].generation
    assert [e._replace(generation=0) for e in again] == [e._replace(generation=0) for e in whole]
    (place / "new").touch()
    assert [entry.name for entry in relisted(desk, place) if entry.node] == [b"new"]
    os.link(place / "new", place / "its other name")  # is asked for by itself
    assert [entry.name for entry in relisted(desk, place) if entry.node] == []
    for seconds in (0.04, 0.0):  # not for long enough, or not at all
        believe(table, seconds)
        table.nodes.doubt()
        assert [all(e.node for e in relisted(desk, place)) for _ in range(2)] == [True, True]
    believe(table, 60.0, names=0.2)  # names count as well
    table.nodes.doubt()
    (place / "its other name").unlink()
    relisted(desk, place)
    eventually(lambda: all(entry.node for entry in relisted(desk, place)), timeout_s=5)


def test_what_a_directory_says_of_other_files_is_not_taken_for_known(
    desk: Desk, table: InodeTable, place: Path
) -> None:
    (place / "a").touch()
    desk.reader.set_nodes(table.nodes, True)
    believe(table)
    number = (place / "a").stat().st_ino
    before = table.nodes.restore(
        number, table.device, 1 << 40, stat.S_IFREG, -1, 1, 1, None, True, True, False
    )
    whole = relisted(desk, place)[0]  # its node has another number than the file
    assert (whole.node, relisted(desk, place)[0].node) == (1 << 62, 1 << 62)
    forget(table, before.nodeid)
    forget(table, whole.node)
    inode, _ = table.lookup(table[pyfuse3.ROOT_INODE], b"a")
    assert inode.nodeid == number
    table.store_to(inode, True)  # the attributes of this one are never believed
    assert [relisted(desk, place)[0].node for _ in range(2)] == [number] * 2
    table.store_to(inode, False)
    assert [relisted(desk, place)[0].node for _ in range(2)] == [number, 0]
    table.store_to(inode, True)  # nor what was told of them
    assert relisted(desk, place)[0].node
    table.store_to(inode, False)
    table.nodes.doubt()
    believe(table, device=1)
    assert [relisted(desk, place)[0].node for _ in range(2)] == [number] * 2  # a number of another device


def test_the_second_listing_asks_for_nothing_and_shows_every_change(
    mounter: Mounter, eventually: Callable[..., None]
) -> None:
    """Names that move, files that take each other's numbers and places, while names alone are listed."""
    place = mounter("loop=native")
    below, above = place.lower / "d", place.point / "d"
    below.mkdir()
    random_ = random.Random(5)
    for number in range(60):
        (below / f"{number:02d}").write_bytes(b"x" * number)

    def shown(directory: Path) -> dict[str, tuple[int, int, bool]]:
        return {e.name: (e.inode(), e.stat().st_size, e.is_dir()) for e in os.scandir(directory)}

    for turn in range(150):
        one, other = (f"{number:02d}" for number in random_.sample(range(60), 2))
        kind = turn % 5
        if kind == 0:
            (below / one).unlink(missing_ok=True)
            (below / one).write_bytes(b"y" * turn)  # with the number of the one before, often
        elif kind == 1 and (below / one).exists():
            (below / one).replace(below / other)
        elif kind == 2:
            (above / one).unlink(missing_ok=True)
            (above / other).write_bytes(b"z" * turn)
        elif kind == 3:
            (below / f"new {turn}").write_bytes(b"n" * turn)
        elif (above / one).exists():
            (above / one).replace(above / other)
        wanted = shown(below)
        eventually(lambda wanted=wanted: shown(above) == wanted, timeout_s=5)


def test_what_was_listed_is_forgotten_one_day(mounter: Mounter, eventually: Callable[..., None]) -> None:
    """Lookups are counted as the kernel counts them: else descriptors, and files, would stay."""
    place = mounter("loop=native,timeout=60,watch=off")
    many = place.lower / "many"
    many.mkdir()
    for number in range(500):
        (many / f"{number}").touch()

    def held() -> int:
        count = 0
        for link in Path(f"/proc/{place.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                count += str(link.readlink()).startswith(f"{many}/")
        return count

    for _ in range(3):  # the second time they are known already
        assert len(list((place.point / "many").iterdir())) == 500
        os.utime(many)
    assert held() == 500
    for number in range(500):
        (place.point / "many" / f"{number}").unlink()
    eventually(lambda: held() == 0)
