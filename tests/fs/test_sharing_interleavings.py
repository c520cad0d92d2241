"""Races between two mounts on a shared pool, played step by step.

As in `test_interleavings` the handlers are called directly, here of two overlays on one directory.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.fs.identity import Version, version_at
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

from .test_interleavings import NEW, OLD, Gate, opened, read

if TYPE_CHECKING:
    from tmem.backends import _native

SHARED = UUID("0123456789abcdef0123456789abcdef")


class LatePrecache(Precache):
    """Lets the test put at the worst moment: after everything was checked."""

    def __init__(self, client: str) -> None:
        super().__init__(SegmentPaths.of("default"), client, SHARED)
        self.at_put = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def put(self, oid: bytes, index: int, data: memoryview) -> int:
        self.at_put.set()
        assert self.go_on.wait(60), "nobody let the put go on"
        return super().put(oid, index, data)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def late() -> LatePrecache:
    return LatePrecache("reader")


@pytest.fixture
def pair(
    tmp_path: Path, segment: "_native.Segment", gate: Gate, late: LatePrecache
) -> Iterator[tuple[Overlay, Overlay]]:
    """A writer with a gate and a reader with late puts, on the directory of a file of two pages."""
    (tmp_path / "file").write_bytes(OLD * 2)
    overlays = []
    for precache in (Precache(SegmentPaths.of("default"), "writer", SHARED), late):
        segment.client("writer" if precache is not late else "reader").authorise(SHARED.bytes)
        root = os.open(tmp_path, os.O_RDONLY)
        overlays.append(build(root, precache, pause=gate, fine_stamps=True))
    yield overlays[0], overlays[1]
    for overlay in overlays:
        overlay.close()
    assert segment.check() == []


def test_a_put_that_comes_after_a_write_is_not_read_by_the_writer(
    pair: tuple[Overlay, Overlay], late: LatePrecache
) -> None:
    writer, reader = pair

    async def main() -> None:
        held = await opened(reader, os.O_RDONLY)
        late.go_on.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, reader, held)
            assert await trio.to_thread.run_sync(late.at_put.wait, 10)
            fh = await opened(writer)
            await writer.write(fh, 0, NEW)
            late.go_on.set()
        assert await read(writer, fh) == NEW
        assert await read(writer, await opened(writer, os.O_RDONLY)) == NEW
        assert await read(reader, await opened(reader, os.O_RDONLY)) == NEW

    trio.run(main)


def test_a_write_that_is_done_shows_although_another_one_is_not(
    pair: tuple[Overlay, Overlay], gate: Gate
) -> None:
    writer, reader = pair

    async def main() -> None:
        held = await opened(reader, os.O_RDONLY)
        assert await read(reader, held, 0, 2 * PAGE_SIZE) == OLD * 2
        assert await read(reader, held, 0, 2 * PAGE_SIZE) == OLD * 2
        assert reader.statistics().hit_reads == 1
        fh = await opened(writer)
        gate.arm("write:flushed")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, fh, 0, NEW)
            await gate.wait()
            await writer.write(fh, PAGE_SIZE, NEW)
            assert await read(reader, held, PAGE_SIZE) == NEW
            gate.opened.set()
        assert await read(reader, held) == NEW

    trio.run(main)


def test_a_mount_that_is_away_for_a_version_finds_the_next(
    pair: tuple[Overlay, Overlay], tmp_path: Path
) -> None:
    """Each change by either mount, or underneath, makes pages of its own; what the others had is not
    asked."""

    async def main() -> None:
        for turn in range(6):
            data = bytes([turn]) * PAGE_SIZE
            if turn % 3 == 2:
                (tmp_path / "file").write_bytes(data * 2)
            else:
                fh = await opened(pair[turn % 3])
                await pair[turn % 3].write(fh, 0, data * 2)
                assert await read(pair[turn % 3], fh) == data
                await pair[turn % 3].release(fh)
            hits = []
            for overlay in pair:
                before = overlay.statistics().hit_reads
                for _ in range(2):
                    fh = await opened(overlay, os.O_RDONLY)
                    assert await read(overlay, fh, 0, 2 * PAGE_SIZE) == data * 2
                    await overlay.release(fh)
                hits.append(overlay.statistics().hit_reads - before)
            assert hits == [1, 2]

    trio.run(main)


def test_a_put_that_asks_the_lower_holds_up_nobody_meanwhile(
    pair: tuple[Overlay, Overlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop's thread takes the lock of a file's state to drop pages."""
    _, reader = pair
    asked, answers = threading.Event(), threading.Event()

    def version_in_time(descriptor: int) -> Version | None:
        asked.set()
        assert answers.wait(60), "nobody let the lower answer"
        return version_at(descriptor)

    async def main() -> None:
        file = reader._files[await opened(reader, os.O_RDONLY)]
        token = reader.coherence.read_token(file.state)
        monkeypatch.setattr("tmem.fs.sharing.version_at", version_in_time)
        arguments = (file.state, token, file.descriptor, 0, memoryview(OLD))
        putting = threading.Thread(target=reader.coherence.put_if, args=arguments)
        putting.start()
        try:
            assert asked.wait(60)
            assert file.state.lock.acquire(timeout=60)
            file.state.lock.release()
        finally:
            answers.set()
            putting.join()

    trio.run(main)
