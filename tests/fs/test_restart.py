"""A mount's daemon is replaced by new code while files are open, and nobody notices more than a pause."""

import contextlib
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs import mounts
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

MODES = ["loop=native", "loop=fast", "loop=plain,cache=kernel"]


def numbered(size: int, seed: int = 0) -> bytes:
    """Return bytes of which no two pages are alike."""
    return b"".join((seed + number).to_bytes(8, "big") for number in range(-(-size // 8)))[:size]


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", MODES)
def test_the_process_stays_and_open_files_go_on(mounter: Mounter, options: str) -> None:
    place = mounter(options)
    (place.lower / "file").write_bytes(numbered(40_000))
    with opened(place.point / "file") as reading, opened(place.point / "file", os.O_RDWR) as writing:
        assert os.read(reading, 10_000) == numbered(40_000)[:10_000]
        for round_ in range(1, 3):
            status = place.restart()
            assert (status.pid, status.count, status.failure) == (place.pid, round_, "")
            assert 0 < status.pause_ns < 20_000_000_000
            os.pwrite(writing, b"%d" % round_, 20_000 + round_)
            assert os.pread(reading, 3, 20_001)[:round_] == b"123"[:round_]
        assert os.read(reading, 100) == numbered(40_000)[10_000:10_100]
    assert (place.lower / "file").read_bytes()[20_001:20_003] == b"12"
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_pages_and_counters_stay(mounter: Mounter, segment: "_native.Segment") -> None:
    place = mounter()
    content = numbered(64 * PAGE_SIZE)
    (place.lower / "file").write_bytes(content)
    (place.lower / "closed").write_bytes(content)
    assert (place.point / "file").read_bytes() == (place.point / "closed").read_bytes() == content
    before = place.statistics()
    with opened(place.point / "file") as file:
        place.restart()
        lower_bytes = place.read_by_daemon()
        assert os.pread(file, len(content), 0) == content
        assert (place.point / "closed").read_bytes() == content
        assert place.read_by_daemon() - lower_bytes < len(content)  # requests and small files of /proc
    after = place.statistics()
    assert (after.put_pages, after.miss_pages) == (before.put_pages, before.miss_pages)
    assert after.hit_pages >= before.hit_pages + 128
    (client,) = segment.clients()
    assert client.held
    assert [pool.statistics()["pages"] for pool in client.pools()] == [128]
    assert segment.check() == []
    place.umount()
    assert segment.clients() == []


def test_a_file_that_changed_underneath_meanwhile_shows(
    mounter: Mounter, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    place = mounter("timeout=0")
    (place.lower / "file").write_bytes(b"old" * 5000)
    assert (place.point / "file").read_bytes() == b"old" * 5000
    os.kill(place.pid, signal.SIGSTOP)  # the restart is under way while it changes
    os.kill(place.pid, signal.SIGUSR1)
    (place.lower / "file").write_bytes(b"new" * 5000)
    os.kill(place.pid, signal.SIGCONT)
    assert (place.point / "file").read_bytes() == b"new" * 5000
    eventually(lambda: mounts.restart_status(str(place.point)).count == 1)
    assert (place.point / "file").read_bytes() == b"new" * 5000


def test_a_segment_that_ended_meanwhile_costs_only_the_pages(mounter: Mounter, runtime_dir: Path) -> None:
    from tmem.backends import _native

    path = str(runtime_dir / "default")
    _native.create(path, 16 << 20).close()
    place = mounter()
    (place.lower / "file").write_bytes(numbered(100_000))
    with opened(place.point / "file") as file:
        assert os.pread(file, 100_000, 0) == numbered(100_000)
        _native.destroy(path)
        place.restart()
        assert os.pread(file, 100_000, 0) == numbered(100_000)
        _native.create(path, 16 << 20).close()
        place.restart()
        assert os.pread(file, 100_000, 0) == numbered(100_000)
        assert place.statistics().pool_active


def test_a_shared_pool_stays_shared(mounter: Mounter, segment: "_native.Segment", tmp_path: Path) -> None:
    name = uuid.uuid4()
    for client in ("one", "two"):
        segment.client(client).authorise(name.bytes)
    one = mounter(f"client=one,shared={name}")
    two = mounter(f"client=two,shared={name}", point=tmp_path / "two")
    (one.lower / "file").write_bytes(numbered(100_000))
    assert (one.point / "file").read_bytes() == numbered(100_000)
    for place in (one, two):
        place.restart()
        assert (two.point / "file").read_bytes() == numbered(100_000)
    assert two.statistics().lower_bytes == 0
    assert segment.check() == []


def test_the_client_stays_taken(mounter: Mounter, segment: "_native.Segment", tmp_path: Path) -> None:
    from tmem.errors import AttachError

    place = mounter("client=mine")
    place.restart()
    with pytest.raises(AttachError, match="'mine' is used by another mount"):
        mounter("client=mine", point=tmp_path / "other")


def test_names_that_came_and_went_do_not_matter(place: Place) -> None:
    """Renamed, replaced and unlinked files are open ones like others; so is the directory we are in."""
    for name in ("renamed", "replaced", "unlinked"):
        (place.point / name).write_bytes(numbered(50_000, ord(name[2])))
    (place.point / "directory").mkdir()
    names = ("renamed", "replaced", "unlinked")
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(opened(place.point / name, os.O_RDWR)) for name in names}
        inside = stack.enter_context(opened(place.point / "directory", os.O_DIRECTORY))
        (place.point / "renamed").rename(place.point / "other")
        (place.point / "new").write_bytes(b"new")
        (place.point / "new").rename(place.point / "replaced")
        (place.point / "unlinked").unlink()
        numbers = {name: os.fstat(descriptor).st_ino for name, descriptor in files.items()}
        for _ in range(2):
            place.restart()
            for name, descriptor in files.items():
                assert os.pread(descriptor, 50_000, 0) == numbered(50_000, ord(name[2]))
                assert os.fstat(descriptor).st_ino == numbers[name]
            assert os.fstat(files["unlinked"]).st_nlink == os.fstat(files["replaced"]).st_nlink == 0
            (place.point / "directory").rename(place.point / "directory2")
            os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
            assert (place.lower / "directory2" / "made").exists()
            (place.point / "directory2").rename(place.point / "directory")
        os.pwrite(files["unlinked"], b"x", 60_000)
        assert os.fstat(files["unlinked"]).st_size == 60_001
    assert (place.point / "replaced").read_bytes() == b"new"


@pytest.mark.parametrize("options", ["", "cache=kernel"])
def test_shared_mappings_go_on(mounter: Mounter, options: str) -> None:
    place = mounter(options)
    (place.lower / "file").write_bytes(numbered(16 * PAGE_SIZE))
    with opened(place.point / "file", os.O_RDWR) as file:
        try:
            mapping = mmap.mmap(file, 16 * PAGE_SIZE)
        except OSError:
            pytest.skip("needs a kernel that maps direct_io files (6.6)")
    with mapping:
        assert mapping[:4] == numbered(4)
        mapping[5 * PAGE_SIZE : 5 * PAGE_SIZE + 5] = b"dirty"
        place.restart()
        assert mapping[9 * PAGE_SIZE : 9 * PAGE_SIZE + 8] == numbered(16 * PAGE_SIZE)[9 * PAGE_SIZE :][:8]
        mapping[6 * PAGE_SIZE : 6 * PAGE_SIZE + 5] = b"later"
        mapping.flush()
    written = (place.lower / "file").read_bytes()
    assert written[5 * PAGE_SIZE :][:5] == b"dirty"
    assert written[6 * PAGE_SIZE :][:5] == b"later"


def test_a_listing_in_progress_neither_skips_nor_repeats(place: Place) -> None:
    expected = {f"{number:05d}-{'x' * 100}" for number in range(2000)}
    (place.lower / "many").mkdir()
    for name in expected:
        (place.lower / "many" / name).touch()
    with os.scandir(place.point / "many") as entries:
        seen = [next(entries).name for _ in range(10)]
        place.restart()
        seen += [next(entries).name for _ in range(500)]
        place.restart()
        seen += [entry.name for entry in entries]
    assert len(seen) == len(expected)
    assert set(seen) == expected


def test_locks_of_programs_stay(place: Place) -> None:
    (place.lower / "file").touch()
    with opened(place.point / "file", os.O_RDWR) as one, opened(place.point / "file", os.O_RDWR) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        place.restart()
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_inodes_beyond_the_quota_of_descriptors_are_found_again(mounter: Mounter, root: None) -> None:
    """The daemon's limit lets it keep few descriptors, so most inodes are known by their handles."""
    place = mounter()
    place.umount()
    subprocess.run(
        ["prlimit", "--nofile=200:200", sys.executable, "-m", "tmem", "mount", place.lower, place.point],
        check=True,
        timeout=60,
    )
    daemon = mounts.daemon_of(str(place.point))
    assert daemon is not None
    for number in range(400):
        (place.lower / f"file{number}").write_bytes(b"%d" % number)
    numbers = {number: (place.point / f"file{number}").stat().st_ino for number in range(400)}
    assert 100 < len(os.listdir(f"/proc/{daemon.pid}/fd")) < 200  # noqa: PTH208
    assert place.restart().pid == daemon.pid
    for number in range(400):
        path = place.point / f"file{number}"
        assert (path.read_bytes(), path.stat().st_ino) == (b"%d" % number, numbers[number])


def test_nothing_piles_up(place: Place) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{place.pid}/fd"))  # noqa: PTH208

    (place.lower / "file").touch()
    inherited = place.inherited()  # from the test's process
    with opened(place.point / "file"):
        place.restart()
        before = descriptors()
        for _ in range(2):
            place.restart()
        assert descriptors() == before
        assert place.inherited() == inherited


def test_read_only_mounts_too(mounter: Mounter) -> None:
    place = mounter("ro")
    (place.lower / "file").write_text("x")
    place.restart()
    assert (place.point / "file").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (place.point / "file").write_text("y")


def test_a_hail_of_requests_to_restart_does_no_harm(place: Place) -> None:
    (place.lower / "file").write_bytes(numbered(10_000))
    with opened(place.point / "file") as file:
        for _ in range(100):
            os.kill(place.pid, signal.SIGUSR1)
            assert os.pread(file, 10_000, 0) == numbered(10_000)
    assert mounts.restart_status(str(place.point)).pid == place.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_after_a_restart(place: Place, number: int, segment: "_native.Segment") -> None:
    place.restart()
    os.kill(place.pid, number)
    assert os.waitpid(place.pid, 0)[1] == 0
    assert not os.path.ismount(place.point)
    assert segment.clients() == []


@pytest.mark.parametrize("ending", ["signal", "umount"])
@pytest.mark.parametrize("moment", ["asked for", "tried out", "executed", "done"])
def test_an_end_in_the_middle_of_a_restart_is_not_lost(
    mounter: Mounter, segment: "_native.Segment", eventually: Callable[..., None], moment: str, ending: str
) -> None:
    place = mounter()

    def reached() -> bool:
        if moment == "executed":
            return b"tmem.fs.takeover" in Path(f"/proc/{place.pid}/cmdline").read_bytes()
        status = mounts.restart_status(str(place.point))
        return moment == "asked for" or (status.under_way if moment == "tried out" else status.count == 1)

    os.kill(place.pid, signal.SIGUSR1)
    eventually(reached)
    if ending == "signal":
        os.kill(place.pid, signal.SIGTERM)
    else:
        place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
    assert mounts.top_mount(str(place.point)) is None
    assert segment.clients() == []


def test_a_daemon_that_stands_still_goes_on(place: Place) -> None:
    """SIGSTOP: programs wait, and lose nothing."""
    (place.lower / "file").write_bytes(numbered(10_000))
    os.kill(place.pid, signal.SIGSTOP)
    command = [sys.executable, "-c", "import sys; sys.stdout.write(open(sys.argv[1]).read(8))"]
    (place.lower / "text").write_text("text")
    reader = subprocess.Popen([*command, place.point / "text"], stdout=subprocess.PIPE)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            reader.communicate(timeout=0.5)
        os.kill(place.pid, signal.SIGCONT)
        assert reader.communicate(timeout=60)[0] == b"text"
    finally:
        os.kill(place.pid, signal.SIGCONT)
        reader.kill()
        reader.wait()


def test_the_command(place: Place) -> None:
    def tmem(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "tmem", "mount", *arguments], capture_output=True, text=True, timeout=60
        )

    done = tmem("--restart", place.point)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{place.point}: restarted, requests waited ")
    mixed = tmem("--restart", place.lower, place.point)  # one that is none does not keep the others from it
    assert mixed.returncode == 1
    assert mixed.stderr == f"tmem: {place.lower} is no mount of tmem: 'findmnt -t fuse.tmem' lists them\n"
    assert place.restart().count == 3
    for wrong in (("--restart",), ("--restart", "--all", place.point), ("--all", place.lower, place.point)):
        assert tmem(*wrong).returncode == 2
    place.kill()
    dead = tmem("--restart", place.point)
    assert (dead.returncode, dead.stderr.count("\n")) == (1, 1)
    assert "has ended (ENOTCONN): see its log, then mount there again" in dead.stderr
