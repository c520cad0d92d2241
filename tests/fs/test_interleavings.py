"""Races between reads and changes, played step by step: overtaken reads must not bring stale bytes back.

The handlers are called directly, in a trio loop of the test, on a real pool and real files; `pause` stops a
worker thread at a named point until the test lets it go on.
"""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import pytest
import trio
import trio.testing

from tmem.backends.paths import SegmentPaths
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

OLD, NEW = b"o" * PAGE_SIZE, b"n" * PAGE_SIZE
CONTEXT = pyfuse3.RequestContext()


class Gate:
    """Stops the first thread that comes to `point`, once armed."""

    def __init__(self) -> None:
        self._point = ""
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.failure: OSError | None = None
        """What the thread fails with, once it may go on."""

    def arm(self, point: str) -> None:
        self._point = point

    def __call__(self, point: str) -> None:
        if point == self._point:
            self._point = ""
            self.reached.set()
            assert self.opened.wait(60), "nobody opened the gate"
            if self.failure is not None:
                raise self.failure

    async def wait(self) -> None:
        assert await trio.to_thread.run_sync(self.reached.wait, 10), "nobody came to the gate"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def overlay(tmp_path: Path, segment: "_native.Segment", gate: Gate) -> Iterator[Overlay]:
    """An overlay without a mount, on the directory of a file of two pages, with a pool."""
    (tmp_path / "file").write_bytes(OLD * 2)
    root = os.open(tmp_path, os.O_RDONLY)
    overlay = build(root, Precache(SegmentPaths.of("default"), "web"), pause=gate, fine_stamps=True)
    yield overlay
    overlay.close()
    assert segment.check() == []


async def opened(overlay: Overlay, flags: int = os.O_RDWR) -> int:
    """Open the file as the kernel would; a file handle."""
    entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
    return (await overlay.open(entry.st_ino, flags, CONTEXT)).fh


async def read(overlay: Overlay, fh: int, off: int = 0, size: int = PAGE_SIZE) -> bytes:
    return bytes(await overlay.read(fh, off, size))


def played(overlay: Overlay, gate: Gate, point: str, change: Callable[[int], object]) -> bytes:
    """Stop a read that misses at `point`, make the change, let it go on, and read again."""

    async def main() -> bytes:
        fh = await opened(overlay)
        gate.arm(point)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, overlay, fh)
            await gate.wait()
            await change(fh)  # type: ignore[misc]  # an async function
            gate.opened.set()
        return await read(overlay, fh)

    return trio.run(main)


def test_a_read_overtaken_by_a_write_does_not_put(overlay: Overlay, gate: Gate) -> None:
    async def change(fh: int) -> None:
        assert await overlay.write(fh, 0, NEW) == PAGE_SIZE

    assert played(overlay, gate, "read:lower-read", change) == NEW
    assert overlay.statistics().overtaken_pages == 1


def test_a_read_overtaken_by_truncation_does_not_put(overlay: Overlay, gate: Gate) -> None:
    async def change(fh: int) -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        await overlay._open_truncated(overlay.table[entry.st_ino], os.O_RDWR | os.O_TRUNC)
        await overlay.write(fh, 0, NEW)

    assert played(overlay, gate, "read:lower-read", change) == NEW
    assert overlay.statistics().overtaken_pages == 1


def test_a_read_overtaken_by_a_foreign_change_and_an_open_does_not_put(
    overlay: Overlay, gate: Gate, tmp_path: Path
) -> None:
    async def change(fh: int) -> None:
        (tmp_path / "file").write_bytes(NEW * 2)
        await opened(overlay, os.O_RDONLY)

    assert played(overlay, gate, "read:lower-read", change) == NEW
    assert overlay.statistics().overtaken_pages == 1
    assert overlay.statistics().foreign_changes == 1


@pytest.mark.parametrize("point", ["write:flushed", "write:written"])
def test_reads_during_a_write_see_the_old_or_the_new_and_do_not_put(
    overlay: Overlay, gate: Gate, point: str
) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        assert await read(overlay, fh) == OLD
        gate.arm(point)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.write, fh, 0, NEW)
            await gate.wait()
            expected = OLD if point == "write:flushed" else NEW
            assert await read(overlay, fh) == expected
            assert (
                await read(overlay, fh, PAGE_SIZE) == OLD
            )  # the other page: a miss that must not be put either
            gate.opened.set()
        assert overlay.statistics().overtaken_pages == 2
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert overlay.statistics().hit_reads == 1

    trio.run(main)


def test_a_file_first_opened_during_its_truncation(overlay: Overlay, gate: Gate) -> None:
    async def main() -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        gate.arm("truncate:done")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay._truncate, overlay.table[entry.st_ino], 100, None)
            await gate.wait()
            fh = await opened(overlay)
            assert await read(overlay, fh) == OLD[:100]
            gate.opened.set()
        assert await read(overlay, fh) == OLD[:100]
        assert await read(overlay, fh) == OLD[:100]
        assert overlay.statistics().hit_reads == 1

    trio.run(main)


def test_an_open_during_a_write_makes_all_pages_suspect(overlay: Overlay, gate: Gate, tmp_path: Path) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
        gate.arm("write:written")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.write, fh, 0, NEW)
            await gate.wait()
            with (tmp_path / "file").open(
                "r+b"
            ) as file:  # underneath, to the other page, hidden in our own write
                file.seek(PAGE_SIZE)
                file.write(b"f" * PAGE_SIZE)
            again = await opened(overlay)
            gate.opened.set()
        assert await read(overlay, again, PAGE_SIZE) == b"f" * PAGE_SIZE
        assert await read(overlay, again) == NEW

    trio.run(main)


def test_two_writes_at_once_keep_the_other_pages(overlay: Overlay, gate: Gate) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        await overlay.write(fh, 2 * PAGE_SIZE, OLD)
        assert await read(overlay, fh, 0, 3 * PAGE_SIZE) == OLD * 3
        gate.arm("write:written")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.write, fh, 0, NEW)
            await gate.wait()
            await overlay.write(fh, PAGE_SIZE, NEW)
            gate.opened.set()
        again = await opened(overlay)
        before = overlay.statistics()
        assert before.foreign_changes == 0
        assert await read(overlay, again, 2 * PAGE_SIZE) == OLD
        assert overlay.statistics().hit_reads - before.hit_reads == 1
        assert await read(overlay, again, 0, 3 * PAGE_SIZE) == NEW + NEW + OLD

    trio.run(main)


@pytest.mark.parametrize("mode", ["off", "frozen"])
def test_a_read_overtaken_by_a_write_in_another_mode_does_not_put(
    overlay: Overlay, gate: Gate, segment: "_native.Segment", mode: str
) -> None:
    async def change(fh: int) -> None:
        segment.client("web", create=False).mode = mode
        assert await overlay.write(fh, 0, NEW) == PAGE_SIZE
        segment.client("web", create=False).mode = "on"

    assert played(overlay, gate, "read:lower-read", change) == NEW
    assert overlay.statistics().overtaken_pages == 1


@pytest.mark.parametrize("point", ["write:flushed", "write:written"])
@pytest.mark.parametrize("mode", ["off", "frozen"])
def test_modes_that_change_during_a_write(
    overlay: Overlay, gate: Gate, segment: "_native.Segment", point: str, mode: str
) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == OLD * 2
        client = segment.client("web", create=False)
        client.mode = mode
        gate.arm(point)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.write, fh, 0, NEW)
            await gate.wait()
            client.mode = "on"
            assert await read(overlay, fh) == (OLD if point == "write:flushed" else NEW)
            client.mode = mode
            gate.opened.set()
        assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        client.mode = "on"
        for _ in range(2):
            assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == NEW + OLD
        assert overlay.statistics().hit_reads == 1

    trio.run(main)


@pytest.mark.parametrize(("age_seconds", "hits"), [(0, 0), (3, 1)])
def test_coarse_time_stamps_are_trusted_once_they_are_old(
    tmp_path: Path, segment: "_native.Segment", age_seconds: int, hits: int
) -> None:
    """Where two changes can carry one time stamp, a file that was just changed is read again at each open."""
    (tmp_path / "file").write_bytes(OLD)
    now_ns = (tmp_path / "file").stat().st_ctime_ns + age_seconds * 1_000_000_000
    root = os.open(tmp_path, os.O_RDONLY)
    precache = Precache(SegmentPaths.of("default"), "web")
    overlay = build(root, precache, fine_stamps=False, now_ns=lambda: now_ns)

    async def main() -> None:
        for _ in range(2):
            assert await read(overlay, await opened(overlay)) == OLD
        assert overlay.statistics().hit_reads == hits

    try:
        trio.run(main)
    finally:
        overlay.close()


def test_a_read_of_who_was_killed_does_not_put_what_another_file_has(
    overlay: Overlay, tmp_path: Path
) -> None:
    """Its read is given up (`reader_interrupt`), so its release comes while that waits for a thread."""
    other = os.urandom(2 * PAGE_SIZE)
    (tmp_path / "other").write_bytes(other)
    busy = threading.Event()

    async def main() -> None:
        threads = overlay.read_threads
        threads.total_tokens = 1
        fh = await opened(overlay)
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"other", CONTEXT)
        async with trio.open_nursery() as nursery:
            hangs = partial(trio.to_thread.run_sync, busy.wait, 10, limiter=threads)
            nursery.start_soon(hangs)  # a lower that does not answer
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, overlay, fh)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(overlay.release, fh)
            await trio.testing.wait_all_tasks_blocked()
            await overlay.open(entry.st_ino, os.O_RDONLY, CONTEXT)  # gets the lowest number that is free
            busy.set()
        assert await read(overlay, await opened(overlay)) == OLD

    trio.run(main)
    assert not overlay.statistics().lower_errors


def test_a_read_of_a_file_that_was_forgotten_meanwhile_does_not_put(overlay: Overlay, gate: Gate) -> None:
    """The program was killed: its read was given up, the file closed and forgotten, then opened anew."""

    async def main() -> None:
        fh = await opened(overlay)
        gate.arm("read:lower-read")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, overlay, fh)
            await gate.wait()
            nodeid = overlay._files[fh].inode.nodeid
            nursery.start_soon(overlay.release, fh)
            await trio.testing.wait_all_tasks_blocked()
            await overlay.forget([(nodeid, overlay.table[nodeid].lookups)])
            assert await overlay.write(await opened(overlay), 0, NEW) == PAGE_SIZE
            gate.opened.set()
        assert await read(overlay, await opened(overlay)) == NEW

    trio.run(main)
    assert overlay.statistics().overtaken_pages == 1


def test_changes_to_a_file_that_the_kernel_had_forgotten_keep_its_pages(overlay: Overlay) -> None:
    """It forgets files as it likes, so also between a read and a chmod."""

    async def forget() -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, name, CONTEXT)
        await overlay.forget([(entry.st_ino, overlay.table[entry.st_ino].lookups)])

    name = b"file"

    async def main() -> None:
        nonlocal name
        fh = await opened(overlay, os.O_RDONLY)
        assert await read(overlay, fh, size=2 * PAGE_SIZE) == OLD * 2
        await overlay.release(fh)
        await forget()
        inode = (await overlay.lookup(pyfuse3.ROOT_INODE, name, CONTEXT)).st_ino
        await overlay.setxattr(inode, b"user.any", b"value", CONTEXT)
        await forget()
        await overlay.lookup(pyfuse3.ROOT_INODE, name, CONTEXT)
        await overlay.rename(pyfuse3.ROOT_INODE, name, pyfuse3.ROOT_INODE, b"renamed", 0, CONTEXT)
        name = b"renamed"
        await forget()
        inode = (await overlay.lookup(pyfuse3.ROOT_INODE, name, CONTEXT)).st_ino
        fh = (await overlay.open(inode, os.O_RDONLY, CONTEXT)).fh
        assert await read(overlay, fh, size=2 * PAGE_SIZE) == OLD * 2

    trio.run(main)
    counted = overlay.statistics()
    assert (counted.hit_pages, counted.miss_pages, counted.foreign_changes) == (2, 2, 0)


def test_a_file_is_not_closed_under_a_read_that_waits_for_what_is_read_ahead(
    overlay: Overlay, gate: Gate, tmp_path: Path
) -> None:
    """A program that was killed has closed it: its read was given up, and goes on here."""
    content = b"".join(number.to_bytes(8, "big") for number in range(256 * PAGE_SIZE // 8))

    async def main() -> None:
        fh = await opened(overlay, os.O_RDONLY)
        for page in range(2):  # two misses that follow each other begin a stream
            assert await read(overlay, fh, page * PAGE_SIZE) == content[page * PAGE_SIZE :][:PAGE_SIZE]
        ahead = overlay._files[fh].ahead
        assert ahead is not None
        with trio.fail_after(60):
            while ahead.running:
                await trio.sleep(0.001)
        gate.arm("read:lower-read")
        await read(overlay, fh, 2 * PAGE_SIZE)  # reaches the mark: the next window is read
        await gate.wait()
        beyond = ahead._ready * PAGE_SIZE
        got: list[bytes] = []

        async def wait_for_it() -> None:
            got.append(await read(overlay, fh, beyond))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_it)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(overlay.release, fh)
            await trio.testing.wait_all_tasks_blocked()
            gate.opened.set()
        assert got == [content[beyond:][:PAGE_SIZE]]
        assert not overlay.used_by_files()

    for _ in range(8):  # whoever of the two goes on first
        gate.opened.clear()
        gate.reached.clear()
        gate.failure = OSError(5, "the lower has not answered")
        (tmp_path / "file").unlink()
        (tmp_path / "file").write_bytes(content)
        trio.run(main)
