"""Longer stories, each told in a plain directory and through the mount: what is seen is the same."""

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tmem.fs import mounts, syscalls
from tmem.types import PAGE_SIZE

from .compare import ATIME_NS, MTIME_NS, Twins, errno_name
from .conftest import NAMES, mounted

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir64.restype = ctypes.c_void_p
for _call in (_libc.readdir64, _libc.telldir, _libc.seekdir, _libc.rewinddir, _libc.closedir):
    _call.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]

Story = Callable[[Path], object]
LARGE = 2_000
"""Names in a directory that a listing needs many requests for."""


def told(story: Story, directory: Path) -> object:
    try:
        return story(directory)
    except OSError as error:
        return errno_name(error)


def same(place: Twins, story: Story, build: Callable[[Path], object] = lambda case: None) -> object:
    """Tell the story in both places; what it gives, if that is the same."""
    case = place.stage(build)
    expected, found = (told(story, root / case) for root in (place.plain, place.point))
    assert found == expected
    return found


def in_child(work: Callable[[], object]) -> object:
    """Return what `work` returns in a process of its own, or the name of its errno."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send(work())
        except OSError as error:
            theirs.send(errno_name(error))

    process = context.Process(target=run)
    process.start()
    try:
        assert ours.poll(60)
        return ours.recv()
    finally:
        process.join()


def test_two_appenders_lose_nothing(twins: Twins) -> None:
    case = twins.stage(lambda path: None)
    path = twins.point / case / "log"
    path.touch()

    def append(letter: str) -> None:
        with path.open("ab", buffering=0) as file:
            for number in range(200):
                assert file.write(f"{letter}{number:06}\n".encode()) == 8

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    lines = path.read_text().splitlines()
    for letter in "ab":
        mine = [line for line in lines if line.startswith(letter)]
        assert mine == [f"{letter}{number:06}" for number in range(200)]
    assert len(lines) == 400
    assert path.read_bytes() == (twins.lower / case / "log").read_bytes()


def test_truncating_opens_against_a_writer(twins: Twins) -> None:
    """Whoever is first: afterwards the mount shows what the lower file has."""
    case = twins.stage(lambda path: None)
    path, below = twins.point / case / "x", twins.lower / case / "x"
    path.touch()

    def write() -> None:
        with path.open("r+b", buffering=0) as file:
            for number in range(300):
                os.pwrite(file.fileno(), bytes([number % 251 + 1]) * 5000, number % 3 * 4000)

    context = multiprocessing.get_context("fork")
    writer = context.Process(target=write)
    writer.start()
    while writer.is_alive():
        path.open("wb").close()
        assert len(path.read_bytes()) <= 13_000
    writer.join()
    assert path.read_bytes() == below.read_bytes()
    assert path.stat().st_size == below.stat().st_size


@pytest.mark.parametrize("length", [254, 255, 256, 1024, 1025])
def test_lengths_of_names(length: int, twins: Twins) -> None:
    def story(case: Path) -> object:
        name = "ü" * (length // 2) + "n" * (length % 2)
        (case / name).write_text("x")
        (case / name).rename(case / ("m" * length))
        return [entry.name for entry in case.iterdir()]

    same(twins, story)


@NAMES
def test_names_of_any_bytes(twins: Twins) -> None:
    names = [bytes([value]) * 3 for value in range(1, 256) if value not in b"./"]

    def story(case: Path) -> object:
        for name in names:
            (case / os.fsdecode(name)).write_bytes(name)
        return [(entry, (case / entry).read_bytes()) for entry in sorted(os.listdir(case))]  # noqa: PTH208

    assert len(same(twins, story)) == 253  # type: ignore[arg-type]


@NAMES
def test_very_long_paths(twins: Twins) -> None:
    def story(case: Path) -> object:
        before = os.open(".", os.O_RDONLY)
        try:
            os.chdir(case)
            for _ in range(40):
                os.mkdir("d" * 200)  # noqa: PTH102
                os.chdir("d" * 200)
            Path("deep").write_text("there")
            found = [Path("deep").read_text(), told(lambda _: Path("/".join(["d" * 200] * 30)).stat(), case)]
            with os.scandir("..") as entries:
                return found, [entry.name for entry in entries]
        finally:
            os.fchdir(before)
            os.close(before)

    same(twins, story)


def test_writing_to_a_program_that_runs(twins: Twins) -> None:
    def story(case: Path) -> object:
        shutil.copy("/bin/sleep", case / "program")
        pid = os.posix_spawn(case / "program", ["program", "60"], {})
        try:
            found = [told(lambda path: path.open("r+b"), case / "program")]
            found.append(told(lambda path: os.truncate(path, 0), case / "program"))
            (case / "program").unlink()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return found

    assert same(twins, story) == ["ETXTBSY", "ETXTBSY"]


def test_running_a_program_that_is_written(twins: Twins) -> None:
    def story(case: Path) -> object:
        shutil.copy("/bin/true", case / "program")
        with (case / "program").open("r+b"):
            return os.posix_spawn(case / "program", ["program"], {})

    assert same(twins, story) == "ETXTBSY"


def test_renaming_directories(twins: Twins) -> None:
    def build(case: Path) -> None:
        for name in ("empty", "full", "full/below", "other"):
            (case / name).mkdir()
        (case / "full/file").write_text("x")

    def story(case: Path) -> object:
        pairs = ["empty other", "full other", "other full", "full full/below/x", "full/below full", "other ."]
        found = []
        for old, new in (pair.split() for pair in pairs):
            found.append(told(lambda root: os.rename(root / old, root / new), case))  # noqa: B023, PTH104
        return found, sorted(str(path.relative_to(case)) for path in case.rglob("*"))

    same(twins, story, build)


def test_nothing_goes_from_one_file_system_to_another(twins: Twins) -> None:
    case = twins.stage(lambda path: (path / "x").write_text("x"))
    for call in (os.rename, os.link):
        with pytest.raises(OSError, match="cross-device") as failure:
            call(twins.point / case / "x", twins.lower / case / "y")
        assert failure.value.errno == errno.EXDEV


def test_numbers_of_the_file_system(twins: Twins) -> None:
    """All but the number of the file system itself; what is free, once nothing is written back."""
    fields = [name for name in dir(os.statvfs_result) if name.startswith("f_") and name != "f_fsid"]

    def told_at(root: Path) -> dict[str, int]:
        return {name: getattr(os.statvfs(root), name) for name in fields}

    os.sync()
    wait_until(lambda: told_at(twins.point) == told_at(twins.lower), what="both say the same")
    assert len(fields) == 10


def test_private_mappings_keep_their_stores(twins: Twins) -> None:
    def story(case: Path) -> object:
        with (
            (case / "x").open("r+b") as file,
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped,
            mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED) as shared,
        ):
            mapped[:5] = b"mine!"
            shared[4000:4010] = b"everyone's"
            shared.flush()
            return mapped[:10], shared[:10], os.pread(file.fileno(), 20, 3995)

    same(twins, story, lambda case: (case / "x").write_bytes(b"x" * 9000))


def end_of(work: Callable[[], object]) -> int:
    """Return the number of the signal that ends a process which does that, 0: none does."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_mapping_of_a_file_that_shrinks_and_grows(twins: Twins) -> None:
    """Beyond its last page there is nothing (SIGBUS), and what it has lost comes back as zeros."""

    def story(case: Path) -> object:
        path = case / "x"
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            seen: list[object] = [mapped[at] for at in (0, 4999, 5000, 3 * PAGE_SIZE - 1)]
            for size in (5000, 0, 2 * PAGE_SIZE):
                os.truncate(path, size)
                for at in range(0, 3 * PAGE_SIZE, PAGE_SIZE):
                    end = end_of(lambda: mapped[at])  # noqa: B023
                    seen.append(end or mapped[at : at + PAGE_SIZE])
            return seen

    seen = same(twins, story, lambda case: (case / "x").write_bytes(b"x" * 3 * PAGE_SIZE))
    assert isinstance(seen, list)
    assert seen.count(-signal.SIGBUS) == 1 + 3 + 1


def test_the_limit_of_file_sizes(twins: Twins) -> None:
    def story(case: Path) -> object:
        def write() -> object:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            with (case / "x").open("wb", buffering=0) as file:
                written = file.write(b"x" * 8000)
                return (
                    written,
                    told(lambda _: file.write(b"y"), case),
                    told(lambda _: file.truncate(6000), case),
                )

        return in_child(write), (case / "x").stat().st_size

    assert same(twins, story) == ((5000, "EFBIG", "EFBIG"), 5000)


def test_direct_access(twins: Twins) -> None:
    def story(case: Path) -> object:
        descriptor = os.open(case / "x", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        buffer = mmap.mmap(-1, 3 * PAGE_SIZE)
        try:
            buffer[:] = random.Random(1).randbytes(3 * PAGE_SIZE)
            done = [os.pwrite(descriptor, buffer, 0), os.preadv(descriptor, [buffer], PAGE_SIZE)]
            return done, buffer[: 2 * PAGE_SIZE], os.fstat(descriptor).st_size
        finally:
            buffer.close()
            os.close(descriptor)

    same(twins, story)


def test_locks_between_programs(twins: Twins) -> None:
    def story(case: Path) -> object:
        with (case / "x").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)

            def other() -> object:
                with (case / "x").open("r+b") as again:
                    return [
                        told(lambda _: fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB), case),
                        told(lambda _: fcntl.lockf(again, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 14), case),
                        told(lambda _: fcntl.lockf(again, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 15), case),
                    ]

            return in_child(other)

    assert same(twins, story, lambda case: (case / "x").touch()) == ["EAGAIN", "EAGAIN", None]


def entries(directory: Path) -> list[bytes]:
    """Return all names in the order of readdir(3), with the dots, moving about on the way."""
    stream = _libc.opendir(os.fsencode(directory))
    assert stream
    try:
        names, places = [], [_libc.telldir(stream)]
        while entry := _libc.readdir64(stream):
            names.append(ctypes.string_at(entry + 19))
            places.append(_libc.telldir(stream))
        for number in random.Random(1).sample(range(len(names)), min(len(names), 50)):
            _libc.seekdir(stream, places[number])
            assert ctypes.string_at(_libc.readdir64(stream) + 19) == names[number]
        _libc.rewinddir(stream)
        assert ctypes.string_at(_libc.readdir64(stream) + 19) == names[0]
        return names
    finally:
        _libc.closedir(stream)


@NAMES
def test_listings_have_every_name_and_the_dots(twins: Twins) -> None:
    def build(case: Path) -> None:
        (case / "sub").mkdir()
        for number in range(500):
            (case / f"{number:03}").touch()

    names = same(twins, lambda case: sorted(entries(case)), build)
    assert isinstance(names, list)
    assert names[:3] == [b".", b"..", b"000"]
    assert same(twins, lambda case: sorted(entries(case))) == [b".", b".."]


def test_the_dots_have_the_numbers_of_the_directories(twins: Twins) -> None:
    case = twins.stage(lambda path: (path / "sub").mkdir())
    for directory in (twins.point, twins.point / case, twins.point / case / "sub"):
        for name in (".", ".."):
            if directory == twins.point and name == "..":
                continue  # where the mount is, the kernel knows better
            assert numbers(directory)[name.encode()] == (directory / name).stat().st_ino


def numbers(directory: Path) -> dict[bytes, int]:
    stream = _libc.opendir(os.fsencode(directory))
    found = {}
    while entry := _libc.readdir64(stream):
        found[ctypes.string_at(entry + 19)] = int.from_bytes(ctypes.string_at(entry, 8), "little")
    _libc.closedir(stream)
    return found


@NAMES
def test_a_large_directory_that_changes_while_it_is_listed(twins: Twins) -> None:
    def build(case: Path) -> None:
        for number in range(LARGE):
            os.close(os.open(case / f"{number:05}", os.O_CREAT | os.O_WRONLY))

    case = f"large{twins.cases}"
    directory = twins.lower / case
    directory.mkdir()
    build(directory)
    point = twins.point / case
    stay = {f"{number:05}" for number in range(0, LARGE, 4)}
    seen: list[str] = []
    with os.scandir(point) as listing:
        for number, entry in enumerate(listing):
            seen.append(entry.name)
            if number % 10 == 0:
                gone = f"{(number * 7 + 1) % LARGE // 4 * 4 + 1:05}"
                (point / gone).unlink(missing_ok=True)
                (point / f"new{number}").touch()
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)
    assert sorted(os.listdir(point)) == sorted(os.listdir(directory))  # noqa: PTH208 - quickest


@NAMES
def test_removing_a_directory_that_is_listed(twins: Twins) -> None:
    def story(case: Path) -> object:
        (case / "d").mkdir()
        descriptor = os.open(case / "d", os.O_RDONLY | os.O_DIRECTORY)
        try:
            (case / "d").rmdir()
            names = told(lambda _: os.listdir(descriptor), case)  # noqa: PTH208
            made = told(lambda _: os.mkdir("x", dir_fd=descriptor), case)
            return names, made, os.fstat(descriptor).st_nlink
        finally:
            os.close(descriptor)

    same(twins, story)


def test_a_number_that_is_used_again_is_another_file(twins: Twins) -> None:
    """An inode number that the lower file system gives to a new file shows nothing of the old one."""
    case = twins.stage(lambda path: None)
    for root in (twins.point, twins.lower):  # removed through the mount, and underneath
        for number in range(20):
            path = twins.point / case / f"f{number}"
            path.write_bytes(bytes([number + 1]) * 5000)
            path.chmod(0o600 + number)
            assert path.read_bytes() == path.read_bytes() == bytes([number + 1]) * 5000
            (root / case / f"f{number}").unlink()
        assert list((twins.point / case).iterdir()) == []


def test_an_old_handle_opens_no_other_file(twins: Twins) -> None:
    def story(case: Path) -> object:
        (case / "x").write_text("old")
        descriptor = os.open(case / "x", os.O_PATH)
        handle = syscalls.file_handle(descriptor)
        os.close(descriptor)
        (case / "x").unlink()
        for number in range(5):
            (case / f"n{number}").write_text("new")
        directory = os.open(case, os.O_RDONLY)
        try:
            assert handle is not None
            os.close(syscalls.open_handle(directory, handle, os.O_RDONLY))
            return "opened"
        finally:
            os.close(directory)

    same(twins, story)


def test_a_read_that_hits_shows_in_the_access_time(twins: Twins) -> None:
    """As relatime has it, although the lower file is not read."""

    def story(case: Path) -> object:
        path = case / "x"
        path.read_bytes()
        path.read_bytes()
        os.utime(path, ns=(ATIME_NS, MTIME_NS))
        descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
        os.pread(descriptor, 10, 0)
        before = path.stat().st_atime_ns
        os.close(descriptor)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)  # not from the kernel's own cache
        with mmap.mmap(-1, PAGE_SIZE) as buffer:
            os.preadv(descriptor, [buffer], 0)
        os.close(descriptor)
        status = path.stat()
        return before, status.st_atime_ns > ATIME_NS, status.st_mtime_ns

    same(twins, story, lambda case: (case / "x").write_bytes(b"x" * 20_000))


def test_root_keeps_the_set_id_bits_of_what_it_overwrites(twins: Twins) -> None:
    def story(case: Path) -> object:
        (case / "x").write_bytes(b"old")
        (case / "x").chmod(0o6755)
        shutil.copyfile("/bin/true", case / "x")
        return (case / "x").stat().st_mode

    assert same(twins, story) == 0o106755


def test_a_user_who_writes_in_roots_stead_does_not(twins: Twins) -> None:
    """He has the file from the kernel as his own opener, whatever root has open at the same time."""

    def story(case: Path) -> object:
        (case / "x").write_bytes(b"old")
        (case / "x").chmod(0o6757)
        with (case / "x").open("r+b", buffering=0) as held:

            def write() -> object:
                os.setgroups([])
                os.setresgid(1236, 1236, 1236)
                os.setresuid(1236, 1236, 1236)
                with (case / "x").open("r+b", buffering=0) as file:
                    return file.write(b"new")

            return in_child(write), os.fstat(held.fileno()).st_mode

    assert same(twins, story) == (3, 0o100757)


@pytest.mark.parametrize("mode", ["cache=direct", "cache=kernel"])
def test_a_read_only_mount(mode: str, base: Path) -> None:
    with mounted(base, f"ro,{mode}") as place:
        (place.lower / "x").write_text("text")
        (place.lower / "d").mkdir()
        x = place.point / "x"
        assert x.read_text() == "text"
        attempts: list[Callable[[], object]] = [
            lambda: x.open("r+b"),
            lambda: x.open("wb"),
            lambda: (place.point / "n").touch(),
            lambda: x.unlink(),
            lambda: x.chmod(0o600),
            lambda: os.utime(x),
            lambda: os.truncate(x, 0),
            lambda: (place.point / "d").rmdir(),
            lambda: os.setxattr(x, "user.x", b""),
            lambda: os.link(x, place.point / "l"),
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match="Read-only") as failure:
                attempt()
            assert failure.value.errno == errno.EROFS
        assert not os.access(x, os.W_OK)
        mounts.umount(str(place.point))


@pytest.mark.parametrize(
    "story",
    [
        test_two_appenders_lose_nothing,
        test_truncating_opens_against_a_writer,
        test_very_long_paths,
        test_writing_to_a_program_that_runs,
        test_running_a_program_that_is_written,
        test_private_mappings_keep_their_stores,
        test_the_limit_of_file_sizes,
        test_direct_access,
        test_a_number_that_is_used_again_is_another_file,
    ],
)
def test_files_that_are_passed_through(story: Callable[[Twins], None], passing: Twins) -> None:
    story(passing)
