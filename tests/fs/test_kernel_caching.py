"""What the kernel keeps of names and attributes of a mount that watches: long, and still never outdated for
long when somebody changes the lower directory."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs.caching import SMALL_BYTES
from tmem.types import PAGE_SIZE

from . import underneath
from .conftest import Mounter, Place, in_plenty
from .faulty import Faulty, ends
from .hanging import CONTENT, program

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

Eventually = Callable[..., None]
LONG_AGO = (1e9, 1e9)


def watching_or_skip(place: Place) -> None:
    if not place.statistics().watching:
        pytest.skip("the kernel reports no changes of this file system")


@pytest.fixture
def place(mounter: Mounter, segment: "_native.Segment") -> Place:
    """A mount with a pool that watches, of a directory with something in it."""
    place = mounter("client=web")
    watching_or_skip(place)
    (place.lower / "directory").mkdir()
    (place.lower / "file").write_bytes(b"o" * 2 * PAGE_SIZE)
    return place


def test_names_change(place: Place, eventually: Eventually) -> None:
    new = place.point / "directory" / "new"
    lower = place.lower / "directory" / "new"
    for _ in range(3):
        assert not new.exists()
        lower.write_bytes(b"1")
        eventually(new.exists)
        lower.rename(place.lower / "elsewhere")
        eventually(lambda: not new.exists())
        assert (place.point / "elsewhere").exists()
        (place.lower / "elsewhere").unlink()
        eventually(lambda: not (place.point / "elsewhere").exists())


def test_another_file_under_the_same_name(place: Place, eventually: Eventually) -> None:
    file = place.point / "file"
    first = file.stat()
    underneath.replace(place.lower / "file", b"new")
    eventually(lambda: file.stat().st_ino != first.st_ino)
    assert file.read_bytes() == b"new"
    assert file.stat().st_size == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 1, 1),
        lambda path: os.utime(path, LONG_AGO),
        lambda path: os.link(path, path.with_name("second")),
        lambda path: os.truncate(path, 100),
        lambda path: underneath.write(path, 2 * PAGE_SIZE, b"more"),
    ],
    ids=["chmod", "chown", "utime", "link", "truncate", "append"],
)
def test_attributes_change(place: Place, eventually: Eventually, change: Callable[[Path], object]) -> None:
    lower, file = place.lower / "file", place.point / "file"

    def same() -> bool:
        return shown(file.stat()) == shown(lower.stat())

    assert same()
    change(lower)
    eventually(same)


def shown(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def test_a_directory_s_listing_changes(place: Place, eventually: Eventually) -> None:
    for number in range(3):
        assert len(os.listdir(place.point)) == 2 + number  # noqa: PTH208
        (place.lower / str(number)).touch()
        eventually(lambda: len(os.listdir(place.point)) == 3 + number)  # noqa: B023, PTH208


@pytest.mark.parametrize("cache", ["direct", "kernel"])
def test_content_changes_while_a_file_is_open_and_mapped(
    mounter: Mounter, segment: "_native.Segment", eventually: Eventually, cache: str
) -> None:
    """A mapping shows what a read or a stat by anybody has shown since."""
    place = mounter(f"client=web,cache={cache}")
    watching_or_skip(place)
    (place.lower / "file").write_bytes(b"o" * 2 * PAGE_SIZE)
    with (
        (place.point / "file").open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == os.pread(file.fileno(), 3 * PAGE_SIZE, 0) == b"o" * 2 * PAGE_SIZE
        for byte in (b"1", b"2"):
            underneath.write(place.lower / "file", PAGE_SIZE, byte)
            eventually(lambda: os.pread(file.fileno(), 1, PAGE_SIZE) == byte)  # noqa: B023
            eventually(lambda: os.fstat(file.fileno()) and mapped[PAGE_SIZE : PAGE_SIZE + 1] == byte)  # noqa: B023


COPY = (
    "import mmap, os, sys; source, target = sys.argv[1].split(':')\n"
    "mapped = mmap.mmap(os.open(source, os.O_RDONLY), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n"
    "os.pwrite(os.open(target, os.O_WRONLY), memoryview(mapped), 4096)"
)


@pytest.mark.parametrize("cache", ["direct", "kernel"])
@pytest.mark.parametrize("loop", ["native", "plain"])
def test_a_write_whose_stamps_are_seen_before_its_bytes(
    mounter: Mounter,
    segment: "_native.Segment",
    eventually: Eventually,
    faulty: Faulty,
    tmp_path: Path,
    loop: str,
    cache: str,
) -> None:
    """The kernel reads old bytes with the new time of modification, by which it would keep them."""
    lower = tmp_path / "written"
    lower.mkdir()
    (lower / "file").write_bytes(b"o" * 2 * PAGE_SIZE)
    place = mounter(f"client=web,cache={cache},loop={loop},timeout=0", lower=lower)
    watching_or_skip(place)
    with (
        (place.point / "file").open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        number = file.fileno()
        before = os.fstat(number).st_mtime_ns
        assert mapped[:] == os.pread(number, 3 * PAGE_SIZE, 0) == b"o" * 2 * PAGE_SIZE
        faulty.fail("read", hangs=True, name="slow")
        with program(COPY, f"{faulty.point / 'slow'}:{lower / 'file'}") as writer:
            eventually(lambda: "read" in faulty.waiting())
            eventually(lambda: os.fstat(number).st_mtime_ns != before)
            assert mapped[:] == os.pread(number, 3 * PAGE_SIZE, 0) == b"o" * 2 * PAGE_SIZE
            faulty.heal()
            assert ends(writer, 60)
        assert (lower / "file").read_bytes()[PAGE_SIZE:] == CONTENT[:PAGE_SIZE]
        eventually(lambda: os.pread(number, PAGE_SIZE, PAGE_SIZE) == CONTENT[:PAGE_SIZE])
        eventually(lambda: os.fstat(number) and mapped[PAGE_SIZE:] == CONTENT[:PAGE_SIZE])
        eventually(lambda: shown(os.fstat(number)) == shown((lower / "file").stat()))


@pytest.mark.parametrize("loop", ["native", "plain"])
def test_times_are_told_as_they_are_after_changes_underneath(
    mounter: Mounter, segment: "_native.Segment", loop: str
) -> None:
    """Also if the file is opened before the report of the change is read, as half of them are here."""
    place = mounter(f"client=web,cache=kernel,loop={loop}")
    watching_or_skip(place)
    for number in range(300):
        lower = place.lower / f"file{number}"
        lower.write_bytes(b"%d" % number)
        os.utime(lower, ns=(number, 2 * number))
        with (place.point / lower.name).open("rb") as file:
            for _ in range(3):
                assert os.fstat(file.fileno()).st_mtime_ns == 2 * number
                assert file.read() == b"%d" % number
                file.seek(0)


CHANGES: dict[str, Callable[[int], object]] = {
    "chmod": lambda descriptor: os.fchmod(descriptor, 0o600),
    "utime": lambda descriptor: os.utime(descriptor, LONG_AGO),
    "truncate": lambda descriptor: os.ftruncate(descriptor, 2 * PAGE_SIZE),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loop", ["native", "plain"])
def test_an_own_change_of_attributes_does_not_hide_what_has_changed_underneath(
    mounter: Mounter, segment: "_native.Segment", eventually: Eventually, loop: str, change: str
) -> None:
    """The kernel drops its pages by the time of modification, which the reply to such a change tells, too."""
    place = mounter(f"client=web,cache=kernel,loop={loop}")
    watching_or_skip(place)
    for name in ("file", "other"):
        (place.lower / name).write_bytes(b"o" * 2 * PAGE_SIZE)
    with (
        (place.point / "file").open("r+b", buffering=0) as file,
        (place.point / "other").open("rb") as other,
    ):
        number = file.fileno()
        assert os.pread(number, 3 * PAGE_SIZE, 0) == b"o" * 2 * PAGE_SIZE
        underneath.write(place.lower / "file", 0, b"n" * PAGE_SIZE)
        os.setxattr(other.fileno(), "user.any", b"")  # the report is read before it
        CHANGES[change](number)
        assert shown(os.fstat(number)) == shown((place.lower / "file").stat())
        assert os.pread(number, 3 * PAGE_SIZE, 0) == b"n" * PAGE_SIZE + b"o" * PAGE_SIZE


def test_the_kernel_answers_by_itself(place: Place, eventually: Eventually) -> None:
    counted = Path(f"/proc/{place.pid}/io")
    absent = place.point / "absent"

    def asked() -> bool:
        before = reads(counted)
        assert not absent.exists()
        return reads(counted) > before

    assert asked()
    eventually(lambda: not asked())  # other changes on the file system wake the daemon, too


def reads(counted: Path) -> int:
    return int(dict(line.split(": ") for line in counted.read_text().splitlines())["syscr"])


def test_a_restart_loses_no_report(place: Place, eventually: Eventually) -> None:
    with (place.point / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1, 0) == b"o"
        assert not (place.point / "new").exists()
        assert place.restart().count == 1
        assert place.statistics().watching
        underneath.write(place.lower / "file", 0, b"n")
        (place.lower / "new").touch()
        eventually(lambda: os.pread(file.fileno(), 1, 0) == b"n")
        eventually((place.point / "new").exists)


def test_two_mounts_of_one_directory(
    mounter: Mounter, tmp_path: Path, segment: "_native.Segment", eventually: Eventually
) -> None:
    one = mounter("client=web1", point=tmp_path / "one")
    two = mounter("client=web2", point=tmp_path / "two")
    watching_or_skip(two)
    assert not (two.point / "file").exists()
    (one.point / "file").write_bytes(b"1" * PAGE_SIZE)
    eventually((two.point / "file").exists)
    with (
        (one.point / "file").open("r+b", buffering=0) as here,
        (two.point / "file").open("rb", buffering=0) as there,
    ):
        for byte in (b"2", b"3"):
            assert os.pread(there.fileno(), PAGE_SIZE, 0)
            os.pwrite(here.fileno(), byte * PAGE_SIZE, 0)
            eventually(lambda: os.pread(there.fileno(), PAGE_SIZE, 0) == byte * PAGE_SIZE)  # noqa: B023


def test_without_watching_the_usual_second(
    mounter: Mounter, segment: "_native.Segment", eventually: Eventually
) -> None:
    place = mounter("client=web,watch=off")
    assert not place.statistics().watching
    assert not (place.point / "new").exists()
    (place.lower / "new").write_bytes(b"1")
    assert (place.point / "new").stat().st_size == 1  # absence was not kept
    (place.lower / "new").write_bytes(b"22")
    eventually(lambda: (place.point / "new").stat().st_size == 2)


def test_who_has_a_file_cached_sees_it_grow_when_it_is_opened(
    mounter: Mounter, segment: "_native.Segment", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it has grown too large for the kernel to keep a copy of it, so that others read past that."""
    in_plenty(monkeypatch)
    place = mounter("client=web,cache=auto,watch=off,timeout=60")
    lower, point = place.lower / "file", place.point / "file"
    lower.write_bytes(b"o" * PAGE_SIZE)
    with point.open("rb", buffering=0) as cached:
        assert os.pread(cached.fileno(), 2 * PAGE_SIZE, 0) == b"o" * PAGE_SIZE
        assert os.fstat(cached.fileno()).st_size == PAGE_SIZE
        underneath.write(lower, 0, b"n" * (SMALL_BYTES + PAGE_SIZE))
        with point.open("r+b"):
            for page in 0, 1, SMALL_BYTES // PAGE_SIZE:
                assert os.pread(cached.fileno(), PAGE_SIZE, page * PAGE_SIZE) == b"n" * PAGE_SIZE


@pytest.mark.parametrize("cache", ["auto", "kernel"])
def test_what_two_programs_append_stays_whole(
    mounter: Mounter, segment: "_native.Segment", monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """One through the mount, one underneath, a small file, with lines that lie across the ends of pages."""
    in_plenty(monkeypatch)
    place = mounter(f"cache={cache}")
    (place.lower / "log").write_bytes(b"first\n")
    code = "import os, sys; log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
    code += "while True: os.write(log, b'other\\n')"
    with subprocess.Popen([sys.executable, "-c", code, place.lower / "log"]) as other:
        own = os.open(place.point / "log", os.O_WRONLY | os.O_APPEND)
        lines = [b"%03d" % number * 300 + b"\n" for number in range(100)]
        for line in lines:
            os.write(own, line)
        os.close(own)
        other.kill()
    content = (place.lower / "log").read_bytes()
    assert [
        line for line in content.splitlines(keepends=True) if line not in (b"first\n", b"other\n")
    ] == lines
    assert (place.point / "log").read_bytes() == content
