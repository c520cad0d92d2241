"""Changes underneath that the kernel reports show at once: each kind of change, on files that are held open.

The handlers are called directly; another process makes the changes (`underneath`). Nothing here waits: a
report is there before the change returns.
"""

import errno
import os
import resource
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pyfuse3
import pytest
import trio
from trio.testing import MockClock

from tmem.backends.paths import SegmentPaths
from tmem.fs import watch
from tmem.fs.fanotify import Event, Events
from tmem.fs.kernel import Kernel
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

from . import underneath as other
from .test_interleavings import CONTEXT, NEW, OLD, Gate, opened, read
from .underneath import Underneath

if TYPE_CHECKING:
    from tmem.backends import _native


pytestmark = pytest.mark.usefixtures("root")


class Recorder(Kernel):
    """A kernel that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[int] = []
        self.names = 0

    def forget_attributes(self, nodeid: int) -> None:
        self.attributes.append(nodeid)

    def forget_names(self) -> None:
        self.names += 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A directory with a file of two pages, and another one of one."""
    (tmp_path / "file").write_bytes(OLD * 2)
    (tmp_path / "source").write_bytes(NEW)
    (tmp_path / "directory").mkdir()
    return tmp_path


class Clock:
    """Each look at it is a second later, unless it is `stopped`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stopped = False

    def __call__(self) -> float:
        self.now += not self.stopped
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def overlay(lower: Path, segment: "_native.Segment", gate: Gate, clock: Clock) -> Iterator[Overlay]:
    """An overlay on that directory with a pool, that watches."""
    overlay = build(
        os.open(lower, os.O_RDONLY),
        Precache(SegmentPaths.of("default"), "web"),
        pause=gate,
        fine_stamps=True,
        clock=clock,
    )
    overlay.kernel = Recorder()
    overlay.watch_with(Events.of(overlay.table.root))
    if overlay.watch is None:
        overlay.close()
        pytest.skip("the kernel reports no changes of this file system")
    yield overlay
    overlay.close()
    assert segment.check() == []


def told(overlay: Overlay) -> Recorder:
    assert isinstance(overlay.kernel, Recorder)
    return overlay.kernel


async def cached(overlay: Overlay) -> int:
    """Return a handle of the file, all of which is in the pool."""
    fh = await opened(overlay, os.O_RDONLY)
    for _ in range(2):
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
    assert overlay.statistics().hit_reads == 1
    return fh


HOLE = bytes(PAGE_SIZE)
CONTENT: dict[str, tuple[Callable[[Path, Underneath], object], bytes]] = {
    "write": (lambda path, run: run(other.write, path, 0, NEW), NEW + OLD),
    "write with the old mtime": (lambda path, run: run(other.write_unnoticed, path, NEW * 2), NEW * 2),
    "append": (lambda path, run: run(other.write, path, 2 * PAGE_SIZE, NEW), OLD * 2 + NEW),
    "truncate": (lambda path, run: run(os.truncate, path, 100), OLD[:100]),
    "truncate to pages": (lambda path, run: run(os.truncate, path, PAGE_SIZE), OLD),
    "extend": (lambda path, run: run(os.truncate, path, 3 * PAGE_SIZE), OLD * 2 + HOLE),
    "open with O_TRUNC": (lambda path, run: run(Path.write_bytes, path, NEW), NEW),
    "punch": (lambda path, run: run(other.punch, path, 0, PAGE_SIZE), HOLE + OLD),
    "copy_file_range": (lambda path, run: run(other.copy_in, path, path.with_name("source")), NEW + OLD),
    "splice": (lambda path, run: run(other.splice_in, path, NEW), NEW + OLD),
    "mapped memory, closed": (lambda path, run: run(other.store, path, NEW), NEW + OLD),
}


@pytest.mark.parametrize("how", CONTENT)
def test_content_that_changes_shows_at_the_next_read(
    overlay: Overlay, underneath: Underneath, lower: Path, how: str
) -> None:
    change, expected = CONTENT[how]

    async def main() -> None:
        fh = await cached(overlay)
        change(lower / "file", underneath)
        for _ in range(2):  # from the lower file, then from the pool
            assert await read(overlay, fh, 0, 4 * PAGE_SIZE) == expected
            assert await read(overlay, fh, 0, PAGE_SIZE) == expected[:PAGE_SIZE]
        assert overlay.statistics().noticed_changes >= 1
        assert await read(overlay, await opened(overlay, os.O_RDONLY), 0, 4 * PAGE_SIZE) == expected

    trio.run(main)


def test_a_file_that_is_replaced_stays_for_those_who_have_it_open(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    async def main() -> None:
        fh = await cached(overlay)
        underneath(other.replace, lower / "file", NEW)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
        again = await opened(overlay, os.O_RDONLY)
        assert await read(overlay, again, 0, 2 * PAGE_SIZE) == NEW
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2

    trio.run(main)


def test_an_unlinked_file_that_is_written_by_who_has_it_open(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    async def main() -> None:
        fh = await cached(overlay)
        holder = os.open(lower / "file", os.O_RDWR)
        try:
            await overlay.unlink(pyfuse3.ROOT_INODE, b"file", CONTEXT)
            assert await read(overlay, fh) == OLD
            underneath(other.write, Path(f"/proc/{os.getpid()}/fd/{holder}"), 0, NEW)
            assert await read(overlay, fh) == NEW
        finally:
            os.close(holder)

    trio.run(main)


@pytest.mark.parametrize("point", ["read:lower-read"])
def test_a_read_overtaken_by_a_write_underneath_does_not_put(
    overlay: Overlay, gate: Gate, underneath: Underneath, lower: Path, point: str
) -> None:
    async def main() -> None:
        fh = await opened(overlay, os.O_RDONLY)
        gate.arm(point)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, overlay, fh)
            await gate.wait()
            underneath(other.write, lower / "file", 0, NEW)
            gate.opened.set()  # the read puts old bytes: nobody has looked for reports yet
        assert await read(overlay, fh) == NEW
        assert await read(overlay, fh) == NEW

    trio.run(main)


@pytest.mark.parametrize("seen_during_it", [True, False])
@pytest.mark.parametrize("point", ["write:flushed", "write:written"])
def test_a_write_underneath_during_an_own_write(
    overlay: Overlay, gate: Gate, underneath: Underneath, lower: Path, point: str, seen_during_it: bool
) -> None:
    """Also if its report is read when the own one is over: both are in the version that this has left."""

    async def main() -> None:
        fh = await opened(overlay)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
        gate.arm(point)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.write, fh, 0, NEW)
            await gate.wait()
            underneath(other.write, lower / "file", PAGE_SIZE, b"f" * PAGE_SIZE)
            if seen_during_it:
                assert await read(overlay, fh, PAGE_SIZE) == b"f" * PAGE_SIZE
            gate.opened.set()
        assert await read(overlay, fh, PAGE_SIZE) == b"f" * PAGE_SIZE
        for _ in range(2):
            assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + b"f" * PAGE_SIZE
        again = await opened(overlay)
        assert await read(overlay, again, 0, 2 * PAGE_SIZE) == NEW + b"f" * PAGE_SIZE

    trio.run(main)


def test_own_changes_are_left_out(overlay: Overlay) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
        await overlay.write(fh, 0, NEW)
        before = overlay.statistics().hit_reads
        assert await read(overlay, fh, PAGE_SIZE) == OLD
        assert overlay.statistics().hit_reads == before + 1
        assert overlay.statistics().noticed_changes == 0
        assert told(overlay).attributes == []

    trio.run(main)


def test_a_report_from_before_an_own_change_is_not_taken_for_one_beside_it(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    async def main() -> None:
        node = (await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)).st_ino
        underneath(other.write, lower / "file", 0, NEW)
        fh = (await overlay.open(node, os.O_RDONLY, CONTEXT)).fh
        await overlay.setxattr(node, b"user.any", b"value", CONTEXT)
        assert await read(overlay, fh) == NEW
        counted = overlay.statistics()
        assert (counted.noticed_changes >= 1, counted.foreign_changes) == (True, 0)

    trio.run(main)


NAMES: dict[str, Callable[[Path, Underneath], object]] = {
    "create": lambda root, run: run(Path.touch, root / "new"),
    "mkdir": lambda root, run: run(os.mkdir, root / "new"),
    "symlink": lambda root, run: run(os.symlink, "file", root / "new"),
    "link": lambda root, run: run(os.link, root / "file", root / "new"),
    "rename": lambda root, run: run(os.rename, root / "file", root / "new"),
    "rename over": lambda root, run: run(os.rename, root / "source", root / "file"),
    "move in": lambda root, run: run(os.rename, root / "directory", root / "new"),
    "unlink": lambda root, run: run(os.unlink, root / "file"),
    "rmdir": lambda root, run: run(os.rmdir, root / "directory"),
}


@pytest.mark.parametrize("how", NAMES)
def test_the_kernel_is_told_of_names_that_change(
    overlay: Overlay, underneath: Underneath, lower: Path, how: str
) -> None:
    async def main() -> None:
        await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        assert overlay.watch is not None
        overlay.watch.catch_up()
        assert told(overlay).names == 0
        NAMES[how](lower, underneath)
        overlay.watch.catch_up()
        assert told(overlay).names == 1
        assert pyfuse3.ROOT_INODE in told(overlay).attributes

    trio.run(main)


ATTRIBUTES: dict[str, Callable[[Path, Underneath], object]] = {
    "chmod": lambda path, run: run(os.chmod, path, 0o600),
    "chown": lambda path, run: run(os.chown, path, 1, 1),
    "utime": lambda path, run: run(os.utime, path, (1, 1)),
    "setxattr": lambda path, run: run(os.setxattr, path, b"user.name", b"value"),
    "link": lambda path, run: run(os.link, path, path.with_name("new")),
    "rename": lambda path, run: run(os.rename, path, path.with_name("new")),
    "unlink": lambda path, run: run(os.unlink, path),
    "rename over": lambda path, run: run(os.rename, path.with_name("source"), path),
    "write": lambda path, run: run(other.write, path, 0, NEW),
    "truncate": lambda path, run: run(os.truncate, path, 1),
}


@pytest.mark.parametrize("how", ATTRIBUTES)
def test_the_kernel_is_told_of_attributes_that_change(
    overlay: Overlay, underneath: Underneath, lower: Path, how: str
) -> None:
    async def main() -> None:
        os.link(lower / "file", lower / "directory" / "second")
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        ATTRIBUTES[how](lower / "file", underneath)
        assert overlay.watch is not None
        overlay.watch.catch_up()
        assert entry.st_ino in told(overlay).attributes

    trio.run(main)


def test_a_directory_s_attributes(overlay: Overlay, underneath: Underneath, lower: Path) -> None:
    async def main() -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"directory", CONTEXT)
        underneath(os.chmod, lower / "directory", 0o700)
        assert overlay.watch is not None
        overlay.watch.catch_up()
        assert told(overlay).attributes == [entry.st_ino]
        assert told(overlay).names == 0

    trio.run(main)


def test_files_that_the_kernel_does_not_know_are_left_out(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    async def main() -> None:
        underneath(other.write, lower / "source", 0, OLD)
        underneath(Path.touch, lower / "directory" / "new")
        assert overlay.watch is not None
        overlay.watch.catch_up()
        assert overlay.statistics().noticed_changes == 0
        assert told(overlay).attributes == []
        assert told(overlay).names == 0

    trio.run(main)


def test_lost_reports_make_everything_suspect(overlay: Overlay, underneath: Underneath, lower: Path) -> None:
    async def main() -> None:
        fh = await cached(overlay)
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
        underneath(many_files, lower / "directory", limit + 10)
        underneath(other.write, lower / "file", 0, NEW)  # this report is lost
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert overlay.statistics().lost_reports == 1
        assert told(overlay).names == 1
        assert {entry.st_ino, pyfuse3.ROOT_INODE} <= set(told(overlay).attributes)

    trio.run(main)


def test_a_report_that_cannot_be_looked_up_makes_everything_suspect(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    """No descriptor is left to find out which file it is about."""

    async def main() -> None:
        fh = await cached(overlay)
        underneath(other.write, lower / "file", 0, NEW)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert overlay.watch is not None
            overlay.watch.catch_up()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert overlay.statistics().lost_reports == 1

    trio.run(main)


class Nameless(Events):
    """Reports as the kernel makes them when it has no memory for the handle of the file."""

    def read(self) -> Iterator[Event]:
        for event in super().read():
            yield event._replace(handle=b"")


def test_a_report_that_names_no_file_makes_everything_suspect(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    async def main() -> None:
        assert overlay.watch is not None
        overlay.watch_with(Nameless(os.dup(overlay.watch.descriptor)))
        fh = await cached(overlay)
        underneath(other.write, lower / "file", 0, NEW)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert overlay.statistics().lost_reports >= 1  # of whatever changes on this file system

    trio.run(main)


def many_files(directory: Path, count: int) -> None:
    for number in range(count):
        os.close(os.open(directory / str(number), os.O_CREAT | os.O_WRONLY))


def test_the_kernel_is_told_again_a_second_later(
    overlay: Overlay, underneath: Underneath, lower: Path
) -> None:
    """A reply on its way may have introduced the file with attributes from before the change."""

    async def main() -> None:
        assert overlay.watch is not None
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        underneath(os.chmod, lower / "file", 0o600)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.watch.run)
            while len(told(overlay).attributes) < 2:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert told(overlay).attributes == [entry.st_ino] * 2

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_file_that_the_kernel_is_only_just_told_of_is_left_alone_for_a_moment(
    overlay: Overlay, underneath: Underneath, lower: Path, clock: Clock
) -> None:
    """A notice that overtakes the reply leaves the kernel without its attributes."""

    async def main() -> None:
        assert overlay.watch is not None
        clock.stopped = True
        young = (await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)).st_ino
        gone = (await overlay.lookup(pyfuse3.ROOT_INODE, b"source", CONTEXT)).st_ino
        for name in ("file", "source"):
            underneath(os.chmod, lower / name, 0o600)
        overlay.watch.catch_up()
        await overlay.forget([(gone, 1)])
        assert told(overlay).attributes == []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.watch.run)
            await trio.sleep(watch.TAKEN_IN_SECONDS * 1.5)
            assert told(overlay).attributes == [young]
            await trio.sleep(watch.REPEAT_SECONDS)
            assert told(overlay).attributes == [young, young]
            underneath(os.chmod, lower / "file", 0o640)
            overlay.watch.catch_up()
            overlay.saved()  # other code goes on, and knows nothing of what is held back
            assert told(overlay).attributes == [young, young, young]
            await trio.sleep(watch.REPEAT_SECONDS * 1.5)
            before = told(overlay).attributes.copy()
            overlay.saved()  # but it could not take over: what comes after that is told as before
            underneath(os.chmod, lower / "file", 0o600)
            overlay.watch.catch_up()
            await trio.sleep(watch.TAKEN_IN_SECONDS * 1.5)
            assert told(overlay).attributes == [*before, young]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_kernel_is_told_more_than_once_that_it_may_have_old_pages(
    overlay: Overlay, underneath: Underneath, lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ignores replies to what it asked before it was told, and so one of them may do nothing."""
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=trio.current_time))

    async def other_times_told() -> int:
        """Have the kernel look the name up twice. How often it was told another time than the file's."""
        times = [(await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)).st_mtime_ns for _ in range(2)]
        return sum(time != (lower / "file").stat().st_mtime_ns for time in times)

    async def main() -> None:
        assert overlay.watch is not None
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        fh = await opened(overlay)
        async with trio.open_nursery() as nursery:
            underneath(other.write, lower / "file", 0, NEW)
            assert (await overlay.getattr(entry.st_ino, CONTEXT)).st_mtime_ns
            overlay.watch.catch_up()
            nursery.start_soon(overlay.watch.run)
            for _ in range(1 + watch.REPEATS_OF_OLD):
                assert await other_times_told() == 1
                await trio.sleep(watch.REPEAT_SECONDS * 1.1)
            assert await other_times_told() == 0
            nursery.cancel_scope.cancel()
        await overlay.release(fh)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def failed(call: Awaitable[object]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await call
    return int(caught.value.errno)


def test_absent_names_are_kept_only_where_the_kernel_can_be_told(overlay: Overlay) -> None:
    async def main() -> None:
        lookup = overlay.lookup(pyfuse3.ROOT_INODE, b"absent", CONTEXT)
        assert await failed(lookup) == errno.ENOENT
        overlay.lifetimes.names_told = True
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"absent", CONTEXT)
        assert (entry.st_ino, entry.entry_timeout) == (0, 60)

    trio.run(main)
