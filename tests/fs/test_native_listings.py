"""Listings that are answered below Python say what Python would, and are believed for as long."""

import contextlib
import errno
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest

from tests.waiting import wait_until
from tmem.backends import _native
from tmem.fs.inodes import InodeTable
from tmem.fs.lifetimes import Lifetimes
from tmem.fs.reading import NOTHING

from .conftest import Mounter
from .names_told import Entry, ask, entries, every_kind, listed, wanted_of
from .reader_desk import CACHE_DIR, OPENDIR, READDIRPLUS, Desk, make

_NO_NODE = 1 << 63
RELEASEDIR = 29


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


@pytest.fixture
def lists(desk: Desk, table: InodeTable) -> Desk:
    """The same, with directories listed below Python."""
    desk.list_by(table.nodes)
    return desk


@pytest.mark.parametrize(
    ("seconds", "attributes", "names"),
    [(None, False, False), (None, True, False), (None, True, True), (0.25, True, True), (1e30, False, False)],
)
def test_lifetimes_are_those_of_python(
    lists: Desk, table: InodeTable, place: Path, seconds: float | None, attributes: bool, names: bool
) -> None:
    (place / "young").touch()
    lifetimes = Lifetimes(seconds, table.device)
    lifetimes.attributes_told, lifetimes.names_told = attributes, names
    inode, status = table.lookup(table[pyfuse3.ROOT_INODE], b"young")
    for device, age in ((table.device, 60.0), (table.device, -1.0), (table.device + 1, -1.0)):
        rule = lifetimes.rule()._replace(device=device, age=age)  # as if it were older
        table.nodes.believe(*rule)
        unique = ask(lists, inode.nodeid)
        assert lists.serve() == NOTHING
        number, _, body = lists.answer()
        whole, rest = struct.unpack_from("=QI", body)
        assert number == unique
        here = device == table.device
        of_attributes = rule.old if here and age < 0 else lifetimes.of_attributes(status)
        if not here:
            of_attributes = rule.young
        assert (whole, rest) == _told_seconds(of_attributes)
        page = listed(lists, place, [b"young"])
        assert page[0].attribute_seconds == _told_seconds(of_attributes)[0]
        assert page[0].name_seconds == _told_seconds(rule.name if here else rule.name_elsewhere)[0]
    assert lifetimes.rule().name == lifetimes.of_name(table.device)
    assert lifetimes.rule().name_elsewhere == lifetimes.of_name(table.device + 1)


def _told_seconds(seconds: float) -> tuple[int, int]:
    whole = min(int(seconds), (1 << 64) - 1)
    return whole, int((seconds - whole) * 1e9) if seconds < 1e9 else 999_999_999 if seconds > 2**64 else 0


def test_a_directory_is_opened_listed_and_closed(lists: Desk, place: Path) -> None:
    """Without Python; and what is closed is closed."""
    (place / "a").touch()
    unique = lists.request(OPENDIR, bytes(8))
    assert lists.serve() == NOTHING
    number, error, body = lists.answer()
    fh, said, _ = struct.unpack("=QIi", body)
    assert (number, error, said) == (unique, 0, 0)  # it has changed just now: nothing is to be kept
    assert [entry.name for entry in entries(lists.page(fh, 0))] == [b".", b"..", b"a"]
    closing = (RELEASEDIR, struct.pack("=QIIQ", fh, 0, 0, 0))
    listing = (READDIRPLUS, struct.pack("=QQIIQII", fh, 0, 4096, 0, 0, 0, 0))
    for (opcode, body), wanted in ((closing, 0), (closing, -errno.EBADF), (listing, -errno.EBADF)):
        unique = lists.request(opcode, body)
        assert lists.serve() == NOTHING
        assert lists.answer() == (unique, wanted, b"")
    assert lists.reader.quiet


def test_pages_follow_each_other(lists: Desk, place: Path) -> None:
    names = [b".", b"..", *(b"%04d" % number * (1 + number % 30) for number in range(700))]
    for name in names[2:]:
        Path(os.fsdecode(os.fsencode(place) + b"/" + name)).touch()
    for size in (4096, 32768, 1 << 20):
        shown: list[Entry] = []
        while page := entries(lists.page_of(place, names, len(shown), size)):
            taken = sum((152 + len(entry.name) + 7) & ~7 for entry in page)
            following = len(shown) + len(page)
            if following < len(names):  # no room for one more
                assert taken + ((152 + len(names[following]) + 7) & ~7) > min(size, 65536)
            shown += page
        assert [entry.name for entry in shown] == names
        assert [entry.number - 1 for entry in shown] == list(range(1, len(names) + 1))
        assert all(stat.S_IFMT(entry.attributes[9]) >> 12 == entry.kind for entry in shown)
        assert shown[0].node == place.stat().st_ino
        assert shown[1].node == place.parent.stat().st_ino


def test_an_end_is_told_by_whoever_is_asked(lists: Desk, place: Path) -> None:
    """Without a look at the listing, unless that has begun anew, or another one's end took its place."""

    def ends() -> int:
        return lists.reader.counters()["ends"]

    assert lists.listings is not None
    (place / "a").touch()
    (place / "b").touch()
    fh = lists.listings.open(pyfuse3.ROOT_INODE)
    assert lists.page(fh, 4) == b""  # it has not begun
    assert ends() == 0
    assert len(entries(lists.page(fh, 0))) == 4
    assert lists.page(fh, 4) == b""
    assert ends() == 1
    assert len(entries(lists.page(fh, 3))) == 1
    (place / "c").touch()
    assert len(entries(lists.page(fh, 0))) == 5
    assert len(entries(lists.page(fh, 4))) == 1
    assert ends() == 1
    lists.listings.number_from(fh + 64)  # in the same place
    other = lists.listings.open(pyfuse3.ROOT_INODE)
    assert other == fh + 64
    assert len(entries(lists.page(other, 0))) == 5
    assert lists.page(other, 5) == lists.page(fh, 5) == b""  # which is looked at, and takes the place
    assert ends() == 2
    for one in (fh, other):
        lists.listings.close(one)
        with pytest.raises(OSError, match="Bad file descriptor"):
            lists.listings.close(one)


def test_threads_go_on_with_a_listing_that_the_kernel_has_lost(
    desk: Desk, table: InodeTable, place: Path
) -> None:
    """Of a lower that may be far away: after the name that was told last, though some before it are gone."""
    desk.list_by(table.nodes, local=False)
    for number in range(40):
        (place / f"{number:02d}").touch()
    wait_until(lambda: int(time.time()) - 2 > int(place.stat().st_ctime), what="it is old enough to be kept")

    def opened() -> int:
        """Open it, when the kernel is told that it may keep what it has had or will get; the handle."""
        unique = desk.request(OPENDIR, bytes(8))
        while True:
            assert desk.reader.serve(-1, 20) == NOTHING
            with contextlib.suppress(BlockingIOError):
                number, error, body = desk.answer_now()
                fh, said, _ = struct.unpack("=QIi", body)
                assert (number, error, said & CACHE_DIR) == (unique, 0, CACHE_DIR)
                return int(fh)

    told = [entry.name for entry in entries(desk.page(opened(), 0))]
    amid = opened()
    for name in (told[5], told[9], told[25]):
        (place / os.fsdecode(name)).unlink()
    seen = [entry.name for entry in entries(desk.page(amid, 20))]
    assert seen == [*told[20:25], *told[26:]]
    assert [entry.number for entry in entries(desk.page(amid, 30))] == list(range(31, 21 + len(seen)))
    assert [entry.name for entry in entries(desk.page(amid, 15))][:5] == told[15:20]


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


def test_what_is_gone_is_left_out_and_what_fails_has_a_name(lists: Desk, place: Path) -> None:
    (place / "a").write_bytes(b"abc")
    (place / "z").mkdir()
    names = [b"gone", b"a", b"n" * 300, *(b"gone too %d" % number for number in range(600)), b"z", b"no"]
    a, failed, z = listed(lists, place, names)
    assert (a.name, a.number, a.attributes) == (b"a", 2, wanted_of(place / "a"))
    assert (failed.name, failed.number, failed.node) == (b"n" * 300, 3, _NO_NODE)
    assert (failed.attributes[9], failed.kind) == (0, 0)
    assert (z.name, z.number, z.attributes) == (b"z", 604, wanted_of(place / "z"))
    assert listed(lists, place, [b"gone"]) == []


def believe(table: InodeTable, attributes: float = 30.0, names: float = 60.0, device: int = 0) -> None:
    """Have names and attributes on a device believed for so long."""
    table.nodes.believe(table.device + device, names, 1.0, attributes, attributes, 60.0, 0.0)


def test_what_is_written_to_unseen_is_not_believed(lists: Desk, table: InodeTable, place: Path) -> None:
    believe(table, 60.0)
    for name in "abc":
        (place / name).touch()
    table.store_to(table.lookup(table[pyfuse3.ROOT_INODE], b"b")[0], True)
    assert [entry.attribute_seconds for entry in listed(lists, place, [b"a", b"b", b"c"])] == [60, 0, 60]


def test_names_are_all_there(table: InodeTable, place: Path) -> None:
    wanted_names = {b"%05d" % number * 20 for number in range(3000)} | {b"\xff\n", b"...", b"..a"}
    for name in wanted_names:
        os.close(os.open(os.fsencode(place) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    listings = _native.Listings(table.nodes)
    fh = listings.open(pyfuse3.ROOT_INODE)
    for _ in range(2):
        names: list[bytes] = []
        while some := listings.names(fh, len(names)):
            names += some
        assert names[:2] == [b".", b".."]
        assert (set(names[2:]), len(names)) == (wanted_names, len(wanted_names) + 2)
    listings.close(fh)
    listings.restore(fh, pyfuse3.ROOT_INODE, os.open(place / "...", os.O_RDONLY), [b"was there"])
    assert listings.names(fh, 1) == []
    for _ in range(2):  # it is no directory
        with pytest.raises(OSError, match="Not a directory"):
            listings.names(fh, 0)
    listings.close_all()
    with pytest.raises(OSError, match="Stale"):
        listings.open(77)


def relisted(lists: Desk) -> list[Entry]:
    """List the root once; all but the dots."""
    assert lists.listings is not None
    fh = lists.listings.open(pyfuse3.ROOT_INODE)
    page = entries(lists.page(fh, 0, 65536))
    assert [entry.name for entry in page[:2]] == [b".", b".."]
    lists.listings.close(fh)
    return page[2:]


def forget(table: InodeTable, node: int) -> None:
    """Take all lookups of a node back."""
    inode = table.forget(node, 1 << 40)
    if inode is not None:
        table.drop(inode)


def test_what_the_kernel_was_told_lately_is_a_name_alone(
    lists: Desk, table: InodeTable, place: Path, eventually: Callable[..., None]
) -> None:
    every_kind(place)
    (place / "another name").unlink()
    believe(table)
    whole = relisted(lists)
    assert all(entry.node and entry.attributes[9] for entry in whole)
    alone = relisted(lists)
    assert [entry.node for entry in alone] == [0] * len(whole)
    # Number and kind are what programs see of the entry itself.
    assert [(e.name, e.number, e.kind, e.ino) for e in alone] == [
        (e.name, e.number, e.kind, e.ino) for e in whole
    ]
    unknown = listed(lists, place, [entry.name for entry in whole])  # nobody knows which files they are
    assert unknown == [entry._replace(number=entry.number - 2) for entry in whole]
    forget(table, whole[0].node)
    assert [entry.node == 0 for entry in relisted(lists)] == [False] + [True] * (len(whole) - 1)
    table.nodes.doubt()
    again = relisted(lists)
    assert again[0].generation > whole[0].generation
    assert [e._replace(generation=0) for e in again] == [e._replace(generation=0) for e in whole]
    (place / "new").touch()
    assert [entry.name for entry in relisted(lists) if entry.node] == [b"new"]
    os.link(place / "new", place / "its other name")  # is asked for by itself
    assert [entry.name for entry in relisted(lists) if entry.node] == []
    for seconds in (0.04, 0.0):  # not for long enough, or not at all
        believe(table, seconds)
        table.nodes.doubt()
        assert [all(e.node for e in relisted(lists)) for _ in range(2)] == [True, True]
    believe(table, 60.0, names=0.2)  # names count as well
    table.nodes.doubt()
    (place / "its other name").unlink()
    relisted(lists)
    eventually(lambda: all(entry.node for entry in relisted(lists)), timeout_s=5)


def test_what_a_directory_says_of_other_files_is_not_taken_for_known(
    lists: Desk, table: InodeTable, place: Path
) -> None:
    (place / "a").touch()
    believe(table)
    number = (place / "a").stat().st_ino
    before = table.nodes.restore(
        number, table.device, 1 << 40, stat.S_IFREG, -1, 1, 1, None, True, True, False
    )
    whole = relisted(lists)[0]  # its node has another number than the file
    assert (whole.node, relisted(lists)[0].node) == (1 << 62, 1 << 62)
    forget(table, before.nodeid)
    forget(table, whole.node)
    inode, _ = table.lookup(table[pyfuse3.ROOT_INODE], b"a")
    assert inode.nodeid == number
    table.store_to(inode, True)  # the attributes of this one are never believed
    assert [relisted(lists)[0].node for _ in range(2)] == [number] * 2
    table.store_to(inode, False)
    assert [relisted(lists)[0].node for _ in range(2)] == [number, 0]
    table.store_to(inode, True)  # nor what was told of them
    assert relisted(lists)[0].node
    table.store_to(inode, False)
    table.nodes.doubt()
    believe(table, device=1)
    assert [relisted(lists)[0].node for _ in range(2)] == [number] * 2  # a number of another device


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
