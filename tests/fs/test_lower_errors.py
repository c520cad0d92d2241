"""A lower that fails: programs see its errors as they are, and afterwards the right bytes."""

import contextlib
import errno
import faulthandler
import mmap
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

CONTENT = random.Random(7).randbytes(64 * PAGE_SIZE + 1234)
ERRORS = [errno.EIO, errno.ESTALE]


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    """A lower with one file called ``file``."""
    directory = tmp_path / "backing"
    directory.mkdir()
    (directory / "file").write_bytes(CONTENT)
    lower = Faulty(directory, tmp_path / "lower")
    yield lower
    lower.close()


@pytest.fixture(params=["cache=direct", "cache=kernel"])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "_native.Segment", mounter: Mounter
) -> Place:
    """A mount of it, with a pool."""
    return mounter(f"timeout=0,{request.param}", lower=faulty.point)


def fails(number: int, work: Callable[[], object]) -> None:
    """Expect `work` to fail with exactly this error."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is checked
        work()
    assert caught.value.errno == number


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def comes_right(place: Place, content: bytes = CONTENT) -> None:
    """Expect the right bytes, from the lower and then from the pool, page by page too."""
    for _ in range(2):
        assert (place.point / "file").read_bytes() == content
    with (place.point / "file").open("rb", buffering=0) as file:
        for start in range(0, len(content), PAGE_SIZE):
            assert os.pread(file.fileno(), PAGE_SIZE, start) == content[start : start + PAGE_SIZE]


@pytest.mark.parametrize("number", ERRORS)
def test_each_operation_fails_as_the_lower_does(place: Place, faulty: Faulty, number: int) -> None:
    path = place.point / "file"
    held = os.open(path, os.O_RDWR)
    try:
        works: dict[str, Callable[[], object]] = {
            "lookup": path.stat,
            "getattr": lambda: os.fstat(held),
            "open": lambda: os.open(path, os.O_RDONLY),
            "create": lambda: os.open(place.point / "new", os.O_CREAT | os.O_WRONLY),
            "setattr": lambda: os.truncate(path, 10),
            "read": lambda: os.pread(held, 10, 0),
            "write": lambda: os.pwrite(held, b"x", 0),
            "unlink": path.unlink,
            "opendir": lambda: listing(place.point),
            "readdir": lambda: listing(place.point),
            "statfs": lambda: os.statvfs(place.point),
            "getxattr": lambda: os.getxattr(path, "user.x"),
        }
        for operation, work in works.items():
            faulty.fail(operation, errno=number)
            fails(number, work)
            faulty.heal()
    finally:
        os.close(held)
    comes_right(place)
    assert not (place.point / "new").exists()


@pytest.mark.parametrize("operation", ["flush", "release", "fsync"])
def test_closing_and_syncing(place: Place, faulty: Faulty, operation: str) -> None:
    held = os.open(place.point / "file", os.O_RDWR)
    faulty.fail(operation, errno=errno.EIO)
    if operation == "fsync":
        fails(errno.EIO, lambda: os.fsync(held))
        faulty.heal()
        os.fsync(held)
    if operation == "flush":
        fails(errno.EIO, lambda: os.close(held))
    else:
        os.close(held)
    faulty.heal()
    comes_right(place)
    pages = place.statistics().put_pages
    assert pages == 0 if operation != "release" else pages > 0  # what could not be written is not kept


@pytest.mark.parametrize("page", [0, 1, 33, 64])
def test_an_error_in_the_midst_of_a_read(place: Place, faulty: Faulty, page: int) -> None:
    """What comes before it can be read, and is kept; what comes after it is not made up."""
    faulty.fail("read", errno=errno.EIO, begin=page * PAGE_SIZE)
    with (place.point / "file").open("rb", buffering=0) as file:
        fails(errno.EIO, lambda: read_all(file.fileno(), len(CONTENT)))
        for start in range(0, len(CONTENT), PAGE_SIZE):
            if start < page * PAGE_SIZE:
                assert os.pread(file.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]
            else:
                fails(errno.EIO, lambda at=start: os.pread(file.fileno(), PAGE_SIZE, at))  # type: ignore[misc]
        faulty.heal()
        assert read_all(file.fileno(), len(CONTENT)) == CONTENT
    comes_right(place)
    statistics = place.statistics()
    assert statistics.put_pages >= 65
    assert statistics.lower_errors >= 65 - page  # each of the reads by page that failed


@pytest.mark.parametrize(("reader", "start"), [("loop=native", 0), ("loop=native", 24), (BY_RINGS, 24)])
def test_bytes_before_an_error(
    faulty: Faulty, segment: "_native.Segment", mounter: Mounter, reader: str, start: int
) -> None:
    """A program gets them as from the lower, whoever answers: what is read in order is read by others."""
    place = mounter(f"timeout=0,cache=direct,{reader}", lower=faulty.point)
    faulty.fail("read", errno=errno.EIO, begin=33 * PAGE_SIZE + 77)
    with (
        (faulty.point / "file").open("rb", buffering=0) as below,
        (place.point / "file").open("rb", buffering=0) as file,
    ):
        for first in range(start, 40, 8):
            size, at = 16 * PAGE_SIZE - 5, first * PAGE_SIZE + 5
            assert outcome(file.fileno(), size, at) == outcome(below.fileno(), size, at)
    faulty.heal()
    comes_right(place)


def outcome(descriptor: int, size: int, start: int) -> bytes | int:
    try:
        return os.pread(descriptor, size, start)
    except OSError as error:
        return error.errno or 0


def test_bytes_before_an_error_without_a_pool(faulty: Faulty, mounter: Mounter) -> None:
    place = mounter("timeout=0,cache=direct,loop=native", lower=faulty.point)  # others give the errno alone
    faulty.fail("read", errno=errno.EIO, begin=3 * PAGE_SIZE)
    with (place.point / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10 * PAGE_SIZE, 5) == CONTENT[5 : 3 * PAGE_SIZE]
        fails(errno.EIO, lambda: os.pread(file.fileno(), PAGE_SIZE, 3 * PAGE_SIZE))
    assert place.statistics().lower_errors == 2


@pytest.mark.parametrize("cache", ["direct", "kernel"])
def test_mapped_memory_before_and_after_an_error(
    faulty: Faulty, segment: "_native.Segment", mounter: Mounter, cache: str
) -> None:
    """The kernel fills its cache for that, and would take fewer bytes for the end of the file."""
    place = mounter(f"timeout=60,cache={cache}", lower=faulty.point)
    faulty.fail("read", errno=errno.EIO, begin=33 * PAGE_SIZE)
    with (
        (place.point / "file").open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            os._exit(mapped[34 * PAGE_SIZE])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == len(CONTENT)  # which asks nobody
        assert mapped[: 33 * PAGE_SIZE] == CONTENT[: 33 * PAGE_SIZE]
        faulty.heal()
        assert mapped[:] == CONTENT


def test_errors_are_counted_without_a_pool(faulty: Faulty, mounter: Mounter) -> None:
    place = mounter("timeout=0,cache=direct", lower=faulty.point)
    faulty.fail("read", errno=errno.EIO, begin=0)
    with (place.point / "file").open("rb", buffering=0) as file:
        fails(errno.EIO, lambda: file.read(PAGE_SIZE))
    assert place.statistics().lower_errors == 1


def read_all(descriptor: int, size: int) -> bytes:
    """Read as a program does that goes on after short reads."""
    done = b""
    while len(done) < size and (part := os.pread(descriptor, size - len(done), len(done))):
        done += part
    return done


def test_short_reads_are_no_end(place: Place, faulty: Faulty) -> None:
    faulty.fail("read", most=1000)
    comes_right(place)


def test_an_end_that_is_none_is_not_kept(place: Place, faulty: Faulty) -> None:
    """The lower says 64 pages and ends within one."""
    faulty.fail("read", ends=True, begin=10 * PAGE_SIZE + 77)
    with (place.point / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10 * PAGE_SIZE, 0) == CONTENT[: 10 * PAGE_SIZE]
        os.pread(file.fileno(), 4 * PAGE_SIZE, 9 * PAGE_SIZE)
    faulty.heal()
    (place.point / "file").open("rb").close()
    with (place.point / "file").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert read_all(file.fileno(), len(CONTENT)) == CONTENT


@pytest.mark.parametrize("size", [0, 5000, len(CONTENT) + 9 * PAGE_SIZE])
def test_a_size_that_is_wrong(
    faulty: Faulty, segment: "_native.Segment", mounter: Mounter, size: int
) -> None:
    """As /proc does it with 0: what is read is the content, never more than there is."""
    place = mounter("timeout=0,cache=direct", lower=faulty.point)
    faulty.fail("getattr", size=size)
    with (place.point / "file").open("rb", buffering=0) as file:
        expected = CONTENT[:5000] if size == 5000 else CONTENT
        assert read_all(file.fileno(), 100 * PAGE_SIZE) == expected
    faulty.heal()
    comes_right(place)


def test_a_failed_lookup_is_not_taken_for_no_file(faulty: Faulty, mounter: Mounter) -> None:
    place = mounter("timeout=60", lower=faulty.point)
    faulty.fail("lookup", errno=errno.EIO)
    fails(errno.EIO, (place.point / "file").stat)
    fails(errno.EIO, (place.point / "none").stat)
    faulty.heal()
    assert (place.point / "file").stat().st_size == len(CONTENT)
    fails(errno.ENOENT, (place.point / "none").stat)


def test_a_listing_that_fails_in_the_midst(place: Place, faulty: Faulty) -> None:
    """The names before the error come, as they do from the lower; and one bad file hides no others."""
    for number in range(5):
        (faulty.directory / f"a{number}").write_bytes(b"x")
    expected = listing(faulty.directory)
    faulty.fail("readdir", errno=errno.EIO, begin=3)
    assert names_until_error(place.point) == names_until_error(faulty.point) == (expected[:3], errno.EIO)
    faulty.heal()
    assert listing(place.point) == expected
    faulty.fail("lookup", errno=errno.EIO, name="a1")
    assert listing(place.point) == expected
    fails(errno.EIO, (place.point / "a1").stat)
    assert (place.point / "a2").read_bytes() == b"x"
    faulty.heal()
    assert listing(place.point) == expected
    assert (place.point / "a1").read_bytes() == b"x"


def names_until_error(directory: Path) -> tuple[list[str], int]:
    names = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                names.append(entry.name)
    except OSError as error:
        return sorted(names), error.errno or 0
    return sorted(names), 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_write_that_is_done_in_part(place: Place, faulty: Faulty, number: int) -> None:
    """The part that was written is told, then the error; what is read is what the lower has."""
    comes_right(place)
    new = random.Random(8).randbytes(8 * PAGE_SIZE)
    faulty.fail("write", errno=number, begin=3 * PAGE_SIZE + 100)
    with (place.point / "file").open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), new, 0) == 3 * PAGE_SIZE + 100
        fails(number, lambda: os.pwrite(file.fileno(), new, 4 * PAGE_SIZE))
        expected = new[: 3 * PAGE_SIZE + 100] + CONTENT[3 * PAGE_SIZE + 100 :]
        assert (faulty.directory / "file").read_bytes() == expected
    comes_right(place, expected)
    faulty.heal()
    comes_right(place, expected)


def test_a_change_whose_outcome_cannot_be_asked(
    faulty: Faulty, segment: "_native.Segment", mounter: Mounter, eventually: Callable[..., None]
) -> None:
    """The lower writes, but does not say then what it has: nothing is believed until the next open."""
    place = mounter("timeout=0,cache=direct", lower=faulty.point)
    comes_right(place)
    faulty.fail("write", hangs=True)
    with (place.point / "file").open("r+b", buffering=0) as file:
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(os.pwrite, file.fileno(), b"new", 0)
            eventually(lambda: faulty.waiting() == ["write"])
            faulty.fail("getattr", errno=errno.EIO)
            faulty.fail("write")
            assert writing.result(60) == 3
        faulty.heal()
        assert os.pread(file.fileno(), 3, 0) == b"new"
    expected = b"new" + CONTENT[3:]
    comes_right(place, expected)
    before = place.statistics().hit_pages
    comes_right(place, expected)
    assert place.statistics().hit_pages > before  # it is kept again


def test_a_server_that_is_killed(place: Place, faulty: Faulty) -> None:
    """Every operation says so; nothing is served of a file that is opened anew."""
    comes_right(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        faulty.kill()
        fails(errno.ENOTCONN, lambda: os.open(place.point / "file", os.O_RDONLY))
        fails(errno.ENOTCONN, lambda: listing(place.point))
        with contextlib.suppress(OSError):  # what was opened may still come from the pool
            assert os.pread(file.fileno(), PAGE_SIZE, 0) == CONTENT[:PAGE_SIZE]
    place.umount()


def test_one_time_is_set_and_the_other_one_left(
    faulty: Faulty, mounter: Mounter, eventually: Callable[..., None]
) -> None:
    """The lower file is written to in the midst of it: whoever looks at its times later must see that."""
    place = mounter("timeout=0", lower=faulty.point)
    faulty.fail("setattr", hangs=True)
    command = ["touch", "-a", "-d", "2001-02-03", str(place.point / "file")]
    with subprocess.Popen(command) as program:
        eventually(lambda: faulty.waiting() == ["setattr"])
        os.utime(faulty.directory / "file", (1, 10**9))
        faulty.heal()
        assert program.wait(60) == 0
    status = (faulty.directory / "file").stat()
    assert status.st_mtime == 10**9
    assert status.st_atime > 10
