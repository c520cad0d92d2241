"""Names that the kernel does not have at hand: nobody waits for another's, and all that is told is right."""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import _native
from tmem.fs.inodes import Inode, InodeTable
from tmem.fs.reading import ASKED, NOTHING
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, LIST, READ, two_files
from .hanging import program as running
from .reader_desk import OPENDIR, Desk, make
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends._native import Segment

pytestmark = pytest.mark.usefixtures("root")

LOOKUP, INTERRUPT = 1, 36
SIDE_BY_SIDE = 8
MANY = 30
THREADS, MANY_OPENS = 32, 50
SIZE = "import os, sys; print(os.stat(sys.argv[1]).st_size)"
STAT = "import os, sys; os.stat(sys.argv[1])"
QUICK_NS = 100_000


@pytest.fixture
def faulty(faulty: Faulty) -> Faulty:
    """Nothing of it is at hand: the kernel asks it for every name, several at a time once it knows them."""
    for path in faulty.point.iterdir():
        path.stat()
    return faulty


@pytest.fixture(params=["loop=native", BY_RINGS])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    yield mounter(f"timeout=0,{request.param}", lower=faulty.point)
    faulty.heal()


def lists_names(pid: int) -> bool:
    """Say whether a process waits for the names of a directory."""
    return Path(f"/proc/{pid}/syscall").read_text().startswith("217 ")  # getdents64


def opened_below(pid: int, name: str) -> list[str]:
    """Return the descriptors by which a daemon can read files of this name."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            fields = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split()
            if not int(fields[3], 8) & os.O_PATH and f"/{name}" in str(link.readlink()):
                found.append(link.name)
    return found


def test_a_name_that_hangs_holds_up_nobody_else(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    faulty.fail("lookup", hangs=True, name="slow")
    with running(STAT, place.point / "slow") as one, running(LIST, place.point) as lists:
        eventually(lambda: "lookup" in faulty.waiting())
        with running(STAT, place.point / "other") as other:
            assert other.wait(60) == 0
        assert subprocess.run(
            [sys.executable, "-c", READ, place.point / "other"], check=True, timeout=60, capture_output=True
        )
        one.send_signal(signal.SIGKILL)
        assert one.wait(60) == -signal.SIGKILL
        assert lists.poll() is None
        assert set(faulty.waiting()) == {"lookup"}
        faulty.heal()
        assert lists.wait(60) == 0
    assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_an_open_that_hangs_holds_up_nobody_else(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """And if it is given up, and its file forgotten, it comes too late."""
    faulty.fail("open", hangs=True, name="slow")
    with running(READ, place.point / "slow") as one, running(READ, place.point / "slow") as two:
        eventually(lambda: faulty.waiting() == ["open", "open"])
        with running(READ, place.point / "other") as other:
            assert other.wait(60) == 0
        faulty.heal()
        assert (one.wait(60), two.wait(60)) == (0, 0)
    faulty.fail("open", hangs=True, name="slow")
    with running(READ, place.point / "slow") as one:
        eventually(lambda: faulty.waiting() == ["open"])
        one.send_signal(signal.SIGKILL)
        assert one.wait(60) == -signal.SIGKILL
        (place.point / "slow").unlink()
        faulty.heal()
    assert (place.point / "other").read_bytes() == CONTENT
    eventually(lambda: not opened_below(place.pid, "slow"))
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


@pytest.mark.parametrize("place", ["loop=native"], indirect=True)  # by rings so many stop a CPU
def test_many_opens_that_hang_hold_up_nothing_but_opens(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """More than there are threads for either: names, attributes, listings and hits have others."""
    code = f"""
import os, sys, threading
for _ in range({MANY_OPENS}): threading.Thread(target=os.open, args=[sys.argv[1], os.O_RDONLY]).start()
"""
    with (place.point / "other").open("rb", buffering=0) as other:
        assert other.read(PAGE_SIZE) == CONTENT[:PAGE_SIZE]
        faulty.fail("open", hangs=True, name="slow")
        with running(code, place.point / "slow") as many:
            eventually(lambda: len(faulty.waiting()) >= THREADS)
            for asks, what in ((STAT, "other"), (STAT, "slow"), (LIST, "")):
                with running(asks, place.point / what) as one:
                    assert one.wait(60) == 0
            assert os.pread(other.fileno(), PAGE_SIZE, 0) == CONTENT[:PAGE_SIZE]
            assert faulty.waiting() == ["open"] * THREADS
            faulty.heal()
            assert many.wait(60) == 0
    assert (place.point / "slow").read_bytes() == CONTENT
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


@pytest.mark.parametrize("place", ["loop=native"], indirect=True)
@pytest.mark.parametrize("killed", [False, True])
def test_a_restart_waits_for_an_open_that_a_thread_makes(
    place: Place, faulty: Faulty, eventually: Callable[..., None], killed: bool
) -> None:
    """Also if nobody waits for it any more: else its descriptor would be nobody's."""
    faulty.fail("open", hangs=True, name="slow")
    with running(READ, place.point / "slow") as one:
        eventually(lambda: faulty.waiting() == ["open"])
        if killed:
            one.kill()
            assert one.wait(60) == -signal.SIGKILL
        restarted: list[int] = []
        restart = threading.Thread(target=lambda: restarted.append(place.restart().count))
        restart.start()
        restart.join(0.3)
        assert restart.is_alive()
        faulty.heal()
        restart.join()
        assert restarted == [1]
        assert one.wait(60) == (-signal.SIGKILL if killed else 0)
    assert (place.point / "slow").read_bytes() == CONTENT
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


@pytest.mark.parametrize("loop", ["loop=native", BY_RINGS])
def test_attributes_that_a_listing_waits_for_hold_up_nobody_else(
    tmp_path: Path, segment: "Segment", mounter: Mounter, eventually: Callable[..., None], loop: str
) -> None:
    """The names are at hand, of which the kernel tells; of attributes it does not."""
    with two_files(tmp_path, name_seconds=1000) as lower:
        place = mounter(f"timeout=0,cache=direct,{loop}", lower=lower.point)
        for _ in range(2):
            assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208
        lower.fail("getattr", hangs=True, name="slow")
        with running(LIST, place.point) as one, running(LIST, place.point) as two:
            eventually(lambda: lower.waiting() == ["getattr"] * 2)
            for code in (STAT, READ):
                with running(code, place.point / "other") as other:
                    assert other.wait(60) == 0
            assert place.statistics().hit_reads >= 0
            one.send_signal(signal.SIGKILL)
            assert one.wait(60) == -signal.SIGKILL
            assert two.poll() is None
            lower.heal()
            assert two.wait(60) == 0
        assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208
        place.umount()
        assert os.waitpid(place.pid, 0)[1] == 0


@pytest.mark.parametrize("operation", ["opendir", "readdir"])
def test_a_directory_that_hangs_holds_up_nobody_else(
    place: Place, faulty: Faulty, eventually: Callable[..., None], operation: str
) -> None:
    """Although no name was ever waited for, and who is killed ends."""
    with (place.point / "other").open("rb") as other:
        faulty.fail(operation, hangs=True)
        with running(LIST, place.point) as one, running(LIST, place.point) as two:
            eventually(lambda: operation in faulty.waiting())
            ask = "import os, sys; os.fstat(int(sys.argv[1]))"
            command = [sys.executable, "-c", ask, str(other.fileno())]
            subprocess.run(command, check=True, timeout=60, pass_fds=[other.fileno()])
            one.send_signal(signal.SIGKILL)
            assert one.wait(60) == -signal.SIGKILL
            assert operation in faulty.waiting()
            assert two.poll() is None
            faulty.heal()
            assert two.wait(60) == 0
    assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_a_listing_that_was_given_up_leaves_no_trace_in_its_directory(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Who lists the same open directory next does not hold up others either."""
    faulty.fail("readdir", hangs=True)
    code = """
import os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
for _ in range(2):
    if not (child := os.fork()):
        try:
            os.stat(sys.argv[1] + "/other")  # names are not at hand lately
        finally:
            print(os.getpid(), flush=True)
        os.listdir(directory)
        os._exit(0)
    os.waitpid(child, 0)
"""
    (faulty.directory / "third").write_bytes(b"3")
    with (place.point / "third").open("rb") as third:
        command = [sys.executable, "-c", code, str(place.point)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as lists:
            assert lists.stdout is not None
            try:
                first = int(lists.stdout.readline())
                eventually(lambda: faulty.waiting() == ["readdir"])
                os.kill(first, signal.SIGKILL)
                second = int(lists.stdout.readline())
                eventually(lambda: lists_names(second))
                ask = "import os, sys; os.fstat(int(sys.argv[1]))"
                command = [sys.executable, "-c", ask, str(third.fileno())]
                subprocess.run(command, check=True, timeout=60, pass_fds=[third.fileno()])
            finally:
                faulty.heal()
            assert lists.wait(60) == 0


def test_a_listing_looks_at_several_names_at_a_time(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """So it is done sooner than one name after the other would be, and tells of each what it is."""
    directory = faulty.directory
    for number in range(MANY):
        (directory / f"file{number}").write_bytes(bytes(100 + number))
    code = "import os, sys; print(sorted((e.name, e.stat().st_size) for e in os.scandir(sys.argv[1])))"
    faulty.fail("lookup", hangs=True)
    command = [sys.executable, "-c", code, str(place.point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        eventually(lambda: len(faulty.waiting()) == SIDE_BY_SIDE)
        faulty.heal()
        assert listing.stdout is not None
        said = listing.stdout.read()
        assert listing.wait(60) == 0
    assert said.strip() == str(sorted((path.name, path.stat().st_size) for path in directory.iterdir()))


def test_what_changes_while_it_is_fetched_is_seen(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """What a thread saw is not told: the name is looked up again by who answers."""
    faulty.fail("lookup", hangs=True, name="slow")
    command = [sys.executable, "-c", SIZE, str(place.point / "slow")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asks:
        eventually(lambda: faulty.waiting() == ["lookup"])
        (faulty.directory / "new").write_bytes(bytes(77))
        (faulty.directory / "new").rename(faulty.directory / "slow")
        faulty.heal()
        assert asks.stdout is not None
        assert asks.stdout.read() == "77\n"


@pytest.fixture
def desk(tmp_path: Path, faulty: Faulty) -> Iterator[Desk]:
    table = InodeTable(os.open(faulty.point, os.O_RDONLY), quota=16)
    for one in make(tmp_path):
        one.reader.open_shortcut()
        one.reader.set_nodes(table.nodes, False)
        yield one
    table.close()


def test_a_request_is_asked_once_more(desk: Desk, faulty: Faulty, eventually: Callable[..., None]) -> None:
    directory = os.open(faulty.point, os.O_RDONLY)
    unique = desk.request(LOOKUP, b"slow\0", 77)
    assert desk.serve() == ASKED
    assert desk.reader.asked() == (LOOKUP, unique, 1, 0, 0, 77, b"slow\0", 0)
    assert not desk.reader.look_up(unique, 1, b"slow\0", False)
    faulty.fail("lookup", hangs=True, name="slow")
    assert desk.reader.fetch(directory, [b"slow"])
    assert not desk.reader.fetch(directory, [b"slow"])  # it was given away
    os.close(directory)  # the threads have their own
    eventually(lambda: faulty.waiting() == ["lookup"])
    assert desk.reader.asked() is None
    assert not desk.reader.quiet
    faulty.heal()
    eventually(lambda: desk.serve() == ASKED)
    assert desk.reader.asked() == (LOOKUP, unique, 1, 0, 0, 77, b"slow\0", 1)
    desk.reader.reply(unique, errno.ENOENT)
    assert desk.answer() == (unique, -errno.ENOENT, b"")
    assert desk.reader.quiet


def test_who_was_given_up_meanwhile_is_not_asked_again(
    desk: Desk, faulty: Faulty, program: "subprocess.Popen[bytes]", eventually: Callable[..., None]
) -> None:
    directory = os.open(faulty.point, os.O_RDONLY)
    unique = desk.request(LOOKUP, b"slow\0", program.pid)
    assert desk.serve() == ASKED
    assert desk.reader.asked()
    faulty.fail("lookup", hangs=True)
    assert desk.reader.fetch(directory, [b"slow", b"other"])
    eventually(lambda: faulty.waiting() == ["lookup", "lookup"])
    program.send_signal(signal.SIGQUIT)
    desk.request(INTERRUPT, struct.pack("=Q", unique))
    desk.serve()
    assert desk.answer() == (unique, -errno.EINTR, b"")
    faulty.heal()
    eventually(lambda: desk.serve() in (0, ASKED) and desk.reader.asked() is None and desk.reader.quiet)
    os.close(directory)


def test_a_reader_ends_once_its_threads_have_what_they_wait_for(
    tmp_path: Path, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """With more to do than there are threads; and nothing that they have opened stays."""
    directory = os.open(faulty.point, os.O_RDONLY)
    nodes = _native.Nodes(os.dup(directory), Inode)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for desk in make(tmp_path):
        desk.list_by(nodes, local=False)
        faulty.fail("opendir", hangs=True)
        for _ in range(40):
            desk.request(OPENDIR, bytes(8))
            assert desk.serve() == NOTHING
            desk.request(LOOKUP, b"slow\0")
            if desk.serve() == ASKED:
                assert desk.reader.asked()
                assert desk.reader.fetch(directory, [b"slow"] * 100)
        eventually(lambda: "opendir" in faulty.waiting())
        faulty.heal()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    nodes.close()


def test_a_directory_that_is_gone_once_it_is_open_is_closed(faulty: Faulty) -> None:
    """A server may be restarted in between: each try would cost a descriptor."""
    nodes = _native.Nodes(os.open(faulty.point, os.O_RDONLY), Inode)
    listings = _native.Listings(nodes)
    faulty.fail("getattr", errno=errno.ESTALE)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(OSError, match="Stale"):
        listings.open(1)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    nodes.close()


def test_one_slow_answer_ends_it_that_a_lower_is_quick(faulty: Faulty) -> None:
    """Until many quick ones have come."""
    library = ctypes.CDLL(_native.__file__)
    note, is_quick, look_up = library.patience_note, library.patience_is_quick, library.look_up_name
    is_quick.restype = ctypes.c_bool
    patience = (ctypes.c_int64 * 2)()
    library.patience_init(patience)
    assert not is_quick(patience)
    for _ in range(100):
        note(patience, ctypes.c_int64(QUICK_NS // 3))
    assert is_quick(patience)
    directory = os.open(faulty.point, os.O_RDONLY)
    status = ctypes.create_string_buffer(256)
    found = look_up(patience, directory, b"slow", ctypes.c_bool(False), status)
    assert found >= 0  # was waited for
    assert stat.S_ISREG(os.fstat(found).st_mode)
    os.close(found)
    note(patience, ctypes.c_int64(QUICK_NS * 50))
    assert not is_quick(patience)
    assert look_up(patience, directory, b"slow", ctypes.c_bool(False), status) == -1
    assert look_up(patience, directory, b"no such name", ctypes.c_bool(True), status) == -1
    os.close(directory)
    for _ in range(10):
        note(patience, ctypes.c_int64(QUICK_NS // 3))
    assert not is_quick(patience)


def test_an_answer_that_is_a_little_slow_does_not_end_it() -> None:
    """Threads for the next ones would cost more; several do."""
    library = ctypes.CDLL(_native.__file__)
    library.patience_is_quick.restype = ctypes.c_bool
    patience = (ctypes.c_int64 * 2)()
    library.patience_init(patience)
    for _ in range(100):
        library.patience_note(patience, ctypes.c_int64(QUICK_NS // 3))
    library.patience_note(patience, ctypes.c_int64(QUICK_NS * 3))
    assert library.patience_is_quick(patience)
    for _ in range(3):
        library.patience_note(patience, ctypes.c_int64(QUICK_NS * 3))
    assert not library.patience_is_quick(patience)
