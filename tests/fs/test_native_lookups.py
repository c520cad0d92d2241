"""LOOKUP and FORGET below Python: the right file, each lookup counted once, and no file taken for another."""

import contextlib
import errno
import os
import random
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import pytest

from tmem.backends import _native
from tmem.fs.inodes import Inode, InodeTable
from tmem.fs.reading import ASKED, NOTHING, REQUEST

from .reader_desk import BATCH_FORGET, FORGET, Desk, make

LOOKUP, INTERRUPT = 1, 36
_ENTRY = struct.Struct("=QQQQII")
_NODE_AND_SIZE = struct.Struct("=QQ")
QUOTA = 16


@dataclass
class Names:
    """A desk with a table of the inodes in `place`, and what the kernel believes to have of it."""

    desk: Desk
    table: InodeTable
    place: Path
    counts: dict[int, int] = field(default_factory=dict)
    """Lookups by node."""

    def send(self, opcode: int, node: int, body: bytes, pid: int = 0) -> int:
        unique = next(self.desk.uniques)
        header = struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, node, 0, 0, pid, 0)
        self.desk.kernel.send(header + body)
        return unique

    def look_up(self, name: bytes, parent: int = pyfuse3.ROOT_INODE) -> tuple[int, bytes]:
        """Return error and entry of a LOOKUP, which Python only hears of if the name is not at hand."""
        unique = self.send(LOOKUP, parent, name + b"\0")
        if self.desk.serve() == ASKED:
            assert self.desk.reader.asked()
            assert self.desk.reader.look_up(unique, parent, name + b"\0", True)
        number, error, entry = self.desk.answer()
        assert number == unique
        return error, entry

    def found(self, name: bytes) -> tuple[int, int]:
        """Look up a name that is there; return node id and generation."""
        error, entry = self.look_up(name)
        assert not error, os.strerror(-error)
        node, generation = struct.unpack_from("=QQ", entry)
        assert struct.unpack_from("=Q", entry, _ENTRY.size) == (node,)
        self.counts[node] = self.counts.get(node, 0) + 1
        return node, generation

    def forget(self, node: int, count: int) -> bool:
        """Take lookups back; whether that was done below Python."""
        self.send(FORGET, node, struct.pack("=Q", count))
        self.counts[node] -= count
        if not self.counts[node]:
            del self.counts[node]
        if self.desk.serve() == NOTHING:
            return True
        request = self.desk.reader.asked()
        assert request is not None
        assert request[0] == FORGET
        self.take_back(node, count)
        return False

    def take_back(self, node: int, count: int) -> None:
        """Do as the overlay does."""
        inode = self.table.forget(node, count)
        if inode is not None:
            self.table.drop(inode)

    def list_some(self, names: list[bytes]) -> None:
        """List these names, and have the kernel count what it gets."""
        body = self.desk.page_of(self.place, names)
        at = 0
        while at < len(body):
            (node,) = struct.unpack_from("=Q", body, at)
            self.counts[node] = self.counts.get(node, 0) + 1
            (length,) = struct.unpack_from("=I", body, at + 144)
            at = (at + 152 + length + 7) & ~7

    def check(self) -> None:
        """Compare the table with what the kernel has, and with the files."""
        assert len(self.table) == 1 + len(self.counts)
        inodes = self.table.all()
        assert {inode.nodeid: inode.lookups for inode in inodes} == {pyfuse3.ROOT_INODE: 1, **self.counts}
        opened = [inode for inode in inodes if inode.descriptor >= 0]
        assert len(opened) == self.table.open_descriptors + 1
        for inode in opened:
            status = os.fstat(inode.descriptor)
            assert (status.st_dev, status.st_ino) == inode.key


@pytest.fixture
def names(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Names]:
    """With a parameter: whether numbers tell files apart."""
    place = tmp_path / "place"
    place.mkdir()
    numbers_tell = getattr(request, "param", True)
    table = InodeTable(os.open(place, os.O_RDONLY), quota=QUOTA, numbers_tell=numbers_tell)
    for desk in make(tmp_path):
        desk.list_by(table.nodes)
        yield Names(desk, table, place)
    table.close()


def test_a_name_that_is_there(names: Names) -> None:
    (names.place / "name").write_bytes(bytes(1234))
    names.table.nodes.believe(names.table.device, 7.5, 1.0, 2.25, 2.25, 60.0, 0.0)
    error, entry = names.look_up(b"name")
    number = (names.place / "name").stat().st_ino
    assert (error, _ENTRY.unpack_from(entry)) == (0, (number, 1, 7, 2, 500_000_000, 250_000_000))
    assert _NODE_AND_SIZE.unpack_from(entry, _ENTRY.size) == (number, 1234)
    inode = names.table[number]
    assert (inode.key, inode.kind, inode.generation) == ((names.table.device, number), stat.S_IFREG, 1)
    names.table.store_to(inode, True)  # its attributes are not believed any more
    assert _ENTRY.unpack_from(names.look_up(b"name")[1])[3::2] == (0, 0)
    assert names.desk.reader.counters()["lookups"] == 2
    assert names.desk.reader.quiet


def test_what_is_not_there_and_what_fails(names: Names) -> None:
    (names.place / "file").touch()
    node, _ = names.found(b"file")
    long = b"n" * 300
    wanted = [(b"gone", 1, errno.ENOENT), (long, 1, errno.ENAMETOOLONG), (b"x", node, errno.ENOTDIR)]
    wanted.append((b"x", 12345, errno.ESTALE))
    for absent in (0.0, 1.5):
        names.table.nodes.believe(names.table.device, 60.0, 1.0, 1.0, 1.0, 60.0, absent)
        for name, parent, error in wanted[absent > 0 :]:
            assert names.look_up(name, parent) == (-error, b"")
    error, entry = names.look_up(b"gone")
    assert (error, _ENTRY.unpack_from(entry)) == (0, (0, 0, 1, 0, 500_000_000, 0))
    names.table.nodes.believe(names.table.device + 1, 60.0, 1.0, 1.0, 1.0, 60.0, 1.5)
    assert names.look_up(b"gone") == (-errno.ENOENT, b"")  # the directory is on another device
    names.check()


def test_only_who_is_asked_for_is_seen_by_python(names: Names) -> None:
    """Whose object holds more than the table knows, is for Python to forget."""
    for name in ("a", "b"):
        (names.place / name).touch()
    a, b = names.found(b"a")[0], names.found(b"b")[0]
    names.found(b"a")
    inode = names.table[a]
    assert names.table[a] is inode
    assert (inode.lookups, inode.descriptor >= 0) == (2, True)
    assert names.forget(a, 1)
    assert names.forget(b, 1)
    assert not names.forget(a, 1)
    assert (inode.lookups, inode.descriptor, inode.by_id, inode.by_key) == (0, -1, False, False)
    with pytest.raises(OSError, match="Stale"):
        names.table.descriptor(inode)
    names.check()


def test_one_that_is_put_by_is_looked_up_too(
    names: Names, program: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    """Another thread has read it; its program may be killed meanwhile: the lookup is taken back."""
    (names.place / "name").touch()
    (tmp_path / "other").mkdir()
    for desk in make(tmp_path / "other"):
        desk.reader.open_shortcut()
        unique = desk.request(LOOKUP, b"name\0", program.pid)
        assert desk.serve() == ASKED
        assert desk.reader.asked()
        desk.reader.set_nodes(names.table.nodes, True)
        program.send_signal(signal.SIGQUIT)
        desk.request(INTERRUPT, struct.pack("=Q", unique))
        desk.serve()
        assert desk.answer() == (unique, -errno.EINTR, b"")
        desk.reader.look_up(unique, pyfuse3.ROOT_INODE, b"name\0", True)
        assert desk.silent()
        message = desk.forwarded_message()
        node = (names.place / "name").stat().st_ino
        assert struct.unpack_from("=IQQ", message, 4)[::2] == (FORGET, node)
        assert len(names.table) == 2
        names.take_back(node, 1)
    names.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_a_directory_that_was_closed_is_looked_into(names: Names) -> None:
    (names.place / "d").mkdir()
    (names.place / "d" / "inside").touch()
    node, _ = names.found(b"d")
    for number in range(2 * QUOTA):
        (names.place / f"{number}").touch()
        names.found(b"%d" % number)
    assert names.table[node].descriptor < 0
    assert names.table.open_descriptors == QUOTA
    error, _ = names.look_up(b"inside", node)
    assert not error
    for number in range(2 * QUOTA):
        names.found(b"%d" % number)
    assert names.table[node].descriptor < 0
    (names.place / "d" / "inside").unlink()
    (names.place / "d").rmdir()
    assert names.look_up(b"inside", node) == (-errno.ESTALE, b"")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
def test_a_listing_leaves_closed_what_was_closed(names: Names) -> None:
    every = [b"%d" % number for number in range(40)]
    for name in every:
        (names.place / os.fsdecode(name)).touch()
    names.list_some(every)
    first = names.table.find(_key(names.place / "0"))
    assert first is not None
    assert first.descriptor < 0
    names.list_some([b"0"])
    assert (first.descriptor, first.lookups) == (-1, 2)
    names.found(b"0")
    assert first.descriptor >= 0
    names.check()


def _key(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


@dataclass
class _Told:
    """Which file the kernel takes a node for."""

    file: int
    generation: int


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens files by handle")
@pytest.mark.parametrize("names", [True, False], indirect=True)
def test_files_come_and_go_and_none_is_taken_for_another(names: Names) -> None:
    """The kernel forgets late, numbers are used again, descriptors are few; Python looks at some inodes.

    Each file is told from others by a number of ours, in its mtime.
    """
    random_ = random.Random(1)
    files: dict[str, int] = {}  # name -> our number
    nodes: dict[int, _Told] = {}
    given: set[tuple[int, int]] = set()  # node ids with generations, each for one file
    unlinked = 0  # such files keep their descriptors
    kept: list[Inode] = []
    for step in range(4000):
        name = f"{random_.randrange(60)}"
        path = names.place / name
        kind = random_.randrange(12)
        if kind <= 1:
            if name not in files:
                path.touch()
                os.utime(path, (step + 1, step + 1))
                files[name] = step + 1
        elif kind == 2:
            path.unlink(missing_ok=True)
            unlinked += files.pop(name, 0) > 0
        elif kind == 3:
            other = f"{random_.randrange(60)}"
            if name in files and other != name:
                path.replace(names.place / other)
                unlinked += files.pop(other, 0) > 0
                files[other] = files.pop(name)
        elif kind <= 8:
            if name not in files:
                assert names.look_up(name.encode()) == (-errno.ENOENT, b"")
                continue
            node, generation = names.found(name.encode())
            told = nodes.get(node)
            if told is not None:
                assert (told.file, told.generation) == (files[name], generation)
            else:
                assert (node, generation) not in given
                nodes[node] = _Told(files[name], generation)
                given.add((node, generation))
        elif kind == 9:
            some = [n.encode() for n in random_.sample(sorted(files), min(len(files), 5))]
            names.list_some(some)
            for inode in names.table.all() if random_.random() < 0.2 else []:
                if inode.nodeid not in nodes and inode.nodeid != pyfuse3.ROOT_INODE:
                    status = os.fstat(names.table.descriptor(inode))
                    nodes[inode.nodeid] = _Told(int(status.st_mtime), inode.generation)
        elif kind == 10 and names.counts:
            node = random_.choice(sorted(names.counts))
            count = random_.randint(1, names.counts[node])
            names.forget(node, count)
            if node not in names.counts:
                nodes.pop(node, None)
        elif kind == 11 and nodes:
            node = random_.choice(sorted(nodes))
            inode = names.table[node]
            kept.append(inode)
            with contextlib.suppress(OSError):
                assert int(os.fstat(names.table.descriptor(inode)).st_mtime) == nodes[node].file
        if step % 50 == 0:
            names.check()
            assert names.table.open_descriptors <= QUOTA + unlinked
        del kept[:-5]
    names.check()
    for node in list(names.counts):
        names.forget(node, names.counts[node])
    names.check()
    assert (len(names.table), names.table.open_descriptors) == (1, 0)


def test_a_batch_is_forgotten_in_python(names: Names) -> None:
    (names.place / "a").touch()
    node, _ = names.found(b"a")
    names.send(BATCH_FORGET, 0, struct.pack("=IIQQ", 1, 0, node, 1))
    assert names.desk.serve() == REQUEST
    assert names.table.forget(node, 1) is None
    assert len(names.table) == 1


def test_a_table_that_goes_away_leaves_its_descriptors_to_who_has_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    nodes = _native.Nodes(os.open(tmp_path, os.O_RDONLY), Inode)
    descriptor = os.open(tmp_path / "a", os.O_PATH)
    status = os.fstat(descriptor)
    inode = nodes.meet(status.st_dev, status.st_ino, stat.S_IFREG, descriptor, 0.0)
    assert nodes.find(status.st_dev, status.st_ino) is inode
    del nodes
    assert inode.descriptor == -1
    assert len(os.listdir("/proc/self/fd")) == before + 2  # noqa: PTH208
    os.close(descriptor)


def test_what_is_no_node_is_refused(tmp_path: Path) -> None:
    nodes = _native.Nodes(os.open(tmp_path, os.O_RDONLY), Inode)
    for wrong in (Inode(), object()):
        with pytest.raises(TypeError, match="a node of the table"):
            nodes.descriptor(wrong)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.Nodes(-1, Inode)
