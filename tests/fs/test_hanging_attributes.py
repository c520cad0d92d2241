"""Attributes that a lower does not tell: who asks for them waits, and nobody else."""

import contextlib
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest

from tmem.fs.inodes import InodeTable

from .conftest import Place
from .faulty import Faulty
from .hanging import CONTENT, READ
from .hanging import program as running
from .reader_desk import GETATTR, Desk, make

pytestmark = pytest.mark.usefixtures("root")

MKDIR = 9
STAT = "import os, sys; os.stat(sys.argv[1])"
FSTAT = "import os, sys; os.fstat(int(sys.argv[1]))"
FREE = "import os, sys; os.statvfs(sys.argv[1])"
THREADS = 16


def test_a_file_of_a_lower_that_hangs_is_closed_without_asking(faulty_place: Place, faulty: Faulty) -> None:
    """Nor when its program was killed, or the kernel forgets the file."""
    other = faulty_place.point / "other"
    with (faulty_place.point / "slow").open("rb") as slow:
        assert slow.read(100) == CONTENT[:100]
        faulty.fail("getattr", hangs=True, name="slow")
    with running(STAT, other) as one:
        assert one.wait(60) == 0
    faulty_place.umount()
    assert os.waitpid(faulty_place.pid, 0)[1] == 0
    faulty.heal()


def fstat(descriptor: int) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    """A program that asks for attributes of an open file."""
    return running(FSTAT, str(descriptor), [descriptor])


def test_a_stat_that_hangs_holds_up_nobody_else(
    faulty_place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """By an open file, which is one request, and by name, which looks it up first."""
    with (faulty_place.point / "slow").open("rb") as slow:
        faulty.fail("getattr", hangs=True, name="slow")
        with (
            fstat(slow.fileno()) as one,
            fstat(slow.fileno()) as killed,
            running(STAT, faulty_place.point / "slow") as by_name,
        ):
            eventually(lambda: faulty.waiting() == ["getattr"] * 3)
            for code in (STAT, READ):
                with running(code, faulty_place.point / "other") as other:
                    assert other.wait(60) == 0
            with running(FREE, faulty_place.point) as free:
                assert free.wait(60) == 0
            killed.kill()
            assert killed.wait(60) == -signal.SIGKILL
            assert (one.poll(), by_name.poll()) == (None, None)
            faulty.heal()
            assert (one.wait(60), by_name.wait(60)) == (0, 0)
    assert (faulty_place.point / "slow").stat().st_size == len(CONTENT)
    faulty_place.umount()
    assert os.waitpid(faulty_place.pid, 0)[1] == 0


def test_more_than_there_are_threads_hold_up_nobody_else(
    faulty_place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Nor does how much room there is."""
    code = "import os, sys, threading; [threading.Thread(target=os.fstat, args=[int(sys.argv[1])]).start() "
    code += f"for _ in range({THREADS + 1})]"
    with (faulty_place.point / "slow").open("rb") as slow, (faulty_place.point / "other").open("rb") as other:
        faulty.fail("getattr", hangs=True, name="slow")
        faulty.fail("statfs", hangs=True)
        with running(FREE, faulty_place.point), running(code, str(slow.fileno()), [slow.fileno()]) as many:
            eventually(lambda: len(faulty.waiting()) == THREADS + 2)
            with fstat(other.fileno()) as asks:
                assert asks.wait(60) == 0
            faulty.heal()
            assert many.wait(60) == 0


@pytest.fixture
def table(faulty: Faulty) -> Iterator[InodeTable]:
    table = InodeTable(os.open(faulty.point, os.O_RDONLY), quota=16)
    table.nodes.believe(table.device, 1.0, 1.0, 7.5, 7.5, 60.0, 0.0)
    yield table
    table.close()


@pytest.fixture
def desk(tmp_path: Path, faulty: Faulty, table: InodeTable) -> Iterator[Desk]:
    for desk in make(tmp_path):
        desk.reader.set_nodes(table.nodes, False)
        try:
            yield desk
        finally:
            faulty.heal()  # else its end waits for who hangs


def send(desk: Desk, node: int) -> int:
    """Send a GETATTR of a node, for whoever reads it."""
    unique = next(desk.uniques)
    desk.kernel.send(struct.pack("=IIQQIIII4x", 56, GETATTR, unique, node, 0, 0, 0, 0) + bytes(12))
    return unique


def ask(desk: Desk, node: int) -> int:
    """Send a GETATTR of a node, and serve it."""
    unique = send(desk, node)
    desk.serve()
    return unique


def believed(answer: bytes) -> float:
    """Return for how long the kernel believes the attributes in a reply."""
    seconds, nanoseconds = struct.unpack_from("=QI", answer)
    return float(seconds + nanoseconds / 1e9)


def test_attributes_that_a_change_has_overtaken_are_not_kept(
    desk: Desk, table: InodeTable, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """They may be from before it, and the kernel has forgotten by then that it was to ask again."""
    node = table.lookup(table[pyfuse3.ROOT_INODE], b"slow")[0].nodeid
    for overtaken in (True, False):
        faulty.fail("getattr", hangs=True, name="slow")
        if not overtaken:
            change = desk.request(MKDIR, bytes(8) + b"name\0")
            desk.serve()
            assert desk.forwarded() == (MKDIR, change)
        asked = ask(desk, node)
        eventually(lambda: faulty.waiting() == ["getattr"])
        if overtaken:
            change = desk.request(MKDIR, bytes(8) + b"name\0")
            desk.serve()
            assert desk.forwarded() == (MKDIR, change)
            desk.reply(change)
            assert desk.answer() == (change, 0, b"")
        faulty.heal()
        number, error, body = desk.answer()
        assert (number, error) == (asked, 0)
        assert believed(body) == (0 if overtaken else 7.5)
        assert struct.unpack_from("=QQ", body, 16) == (node, len(CONTENT))
        if not overtaken:
            desk.reply(change)
            assert desk.answer() == (change, 0, b"")


def test_attributes_from_another_thread_that_a_change_has_overtaken_are_not_kept(
    tmp_path: Path, table: InodeTable, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Of a local lower threads ask at once, as they have read that: here who stands in for the loop's."""
    node = table.lookup(table[pyfuse3.ROOT_INODE], b"slow")[0].nodeid
    for desk in make(tmp_path, away_ms=1):
        desk.reader.set_nodes(table.nodes, True)
        try:
            for overtaken in (True, False):
                faulty.fail("getattr", hangs=True, name="slow")
                asked = send(desk, node)
                eventually(lambda: faulty.waiting() == ["getattr"])
                if overtaken:
                    change = desk.request(MKDIR, bytes(8) + b"name\0")
                    desk.serve()
                    assert desk.forwarded() == (MKDIR, change)
                    desk.reply(change)
                    assert desk.answer() == (change, 0, b"")
                faulty.heal()
                number, error, body = desk.answer()
                assert (number, error, believed(body)) == (asked, 0, 0 if overtaken else 7.5)
        finally:
            faulty.heal()  # else its end waits for who hangs


def test_attributes_from_python_that_a_change_has_overtaken_are_not_kept(desk: Desk) -> None:
    """Those of a node that is not known here."""
    for overtaken in (True, False):
        asked = ask(desk, 77)
        assert desk.forwarded() == (GETATTR, asked)
        if overtaken:
            change = desk.request(MKDIR, bytes(8) + b"name\0")
            desk.serve()
            assert desk.forwarded() == (MKDIR, change)
            desk.reply(change)
            desk.answer()
        desk.reply(asked, struct.pack("=QIIQ80x", 7, 500_000_000, 0, 77))
        number, error, body = desk.answer()
        assert (number, error, believed(body)) == (asked, 0, 0 if overtaken else 7.5)
        assert struct.unpack_from("=Q", body, 16) == (77,)


def test_what_the_root_and_a_file_that_is_stored_to_are_told(desk: Desk, table: InodeTable) -> None:
    """The number that stat shows; and nothing that is believed."""
    unique = ask(desk, pyfuse3.ROOT_INODE)
    number, error, body = desk.answer()
    assert (number, error, believed(body)) == (unique, 0, 7.5)
    assert struct.unpack_from("=Q", body, 16) == (os.fstat(table.root).st_ino,)
    inode = table.lookup(table[pyfuse3.ROOT_INODE], b"other")[0]
    table.store_to(inode, True)
    ask(desk, inode.nodeid)
    assert believed(desk.answer()[2]) == 0


def test_an_error_is_told(desk: Desk, table: InodeTable, faulty: Faulty) -> None:
    node = table.lookup(table[pyfuse3.ROOT_INODE], b"slow")[0].nodeid
    faulty.fail("getattr", errno=5)
    unique = ask(desk, node)
    assert desk.answer() == (unique, -5, b"")
