"""What is read ahead of whom: streams with a source that does as it is told, then real mounts."""

import ctypes
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio
import trio.testing

from tmem.fs.loading import bridged
from tmem.fs.readahead import CHUNK_PAGES, FIRST_PAGES, LOADS, MOST_STREAMS, NEVER, Stream, Streams
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

LIMIT = 2048


class Source:
    """A file of `pages` pages; each load takes one of `permits`."""

    def __init__(self, pages: int = 1 << 20) -> None:
        self.pages = pages
        self.loaded: list[tuple[int, int]] = []
        self.left: list[tuple[int, int]] = []
        self.present: set[int] = set()
        self.stored = True
        self.error: Exception | None = None
        self.marker = NEVER
        self.begun: list[int] = []
        self.told: int | None = None
        self.permits = trio.Semaphore(1 << 20)

    def length(self) -> int:
        return self.pages

    async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
        await trio.lowlevel.checkpoint()
        ranges: list[tuple[int, int]] = []
        for page in range(first, last):
            if page in self.present:
                continue
            if ranges and ranges[-1][1] == page:
                ranges[-1] = (ranges[-1][0], page + 1)
            else:
                ranges.append((page, page + 1))
        return ranges

    async def load(self, first: int, last: int) -> bool:
        await self.permits.acquire()
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.loaded.append((first, last))
        return self.stored

    def leave(self, first: int, last: int) -> None:
        self.left.append((first, last))

    def begin(self, page: int) -> None:
        self.begun.append(page)

    def mark(self, page: int, end: int) -> None:
        self.marker = page

    def position(self) -> int | None:
        return self.told

    @property
    def pages_loaded(self) -> list[int]:
        return [page for first, last in self.loaded for page in range(first, last)]


def play(act: Callable[[Source, Streams], object]) -> Source:
    """Run the coroutine function `act` in a trio loop, and wait for what it has begun."""
    made: list[Source] = []

    async def main() -> None:
        made.append(Source())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(act, made[0], Streams())  # type: ignore[arg-type]

    trio.run(main)
    return made[0]


def read(stream: Stream, upto: int, pages: int = 8) -> None:
    """Have the stream's reader go on until a read reaches page `upto`."""
    at = stream.at
    while at <= upto:
        stream.comes(at, at + pages)
        at += pages


async def settled(stream: Stream) -> None:
    with trio.fail_after(60):
        while stream.running:
            await trio.lowlevel.checkpoint()


def test_windows_double_at_each_mark_up_to_the_limit() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        sizes, end = [], 64
        for _ in range(9):
            await settled(stream)
            loaded = sorted(source.pages_loaded)
            assert loaded == list(range(64, loaded[-1] + 1))
            sizes.append(loaded[-1] + 1 - end)
            end += sizes[-1]
            assert source.marker == end - sizes[-1]
            read(stream, source.marker)
        assert sizes == [FIRST_PAGES, 64, 128, 256, 512, 1024, 1024, 1024, 1024]

    source = play(act)
    assert max(last - first for first, last in source.loaded) == CHUNK_PAGES


def test_the_first_window_is_four_requests() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 0, 100, LIMIT)
        stream.extend(0)
        await settled(stream)
        assert len(source.pages_loaded) == 400

    play(act)


def test_nothing_beyond_the_end_of_the_file() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.pages = 150
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        for _ in range(3):
            await settled(stream)
            read(stream, 142)
        assert sorted(source.pages_loaded) == list(range(64, 150))
        assert not streams.running

    play(act)


def test_a_reader_that_goes_elsewhere_is_not_followed() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await settled(stream)
        stream.comes(5000, 5008)
        stream.comes(0, 8)
        assert not stream.running
        assert not stream.covers(5000, 5008)
        assert (len(source.pages_loaded), source.marker) == (FIRST_PAGES, 64)

    play(act)


def test_what_is_there_is_left_out() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.present = {64, 65, 70, 95}
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await settled(stream)
        assert sorted(source.loaded) == [(66, 70), (71, 95)]
        source.present = set(range(96, 96 + 64))
        read(stream, source.marker, 1)
        await settled(stream)
        assert len(source.loaded) == 2
        assert source.marker == 96  # and it goes on from there

    play(act)


def test_a_reader_waits_for_pages_on_their_way_and_no_longer() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.permits = trio.Semaphore(0)
        stream = Stream(source, streams, 64, 256, LIMIT)
        stream.extend(64)
        assert not await stream.wait(63, 70)  # not read ahead
        assert not await stream.wait(64 + 1024, 64 + 1025)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.wait, 64, 70)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(LOADS):
                source.permits.release()
        assert len(source.loaded) == LOADS
        assert stream.running
        for _ in range(4 - LOADS):
            source.permits.release()
        await settled(stream)
        assert not await stream.wait(64, 70)

    play(act)


def test_a_reader_that_overtakes_reads_by_itself_what_is_not_under_way() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.permits = trio.Semaphore(0)
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await trio.testing.wait_all_tasks_blocked()
        stream.missed(96, 200)
        for _ in range(3):
            source.permits.release()
        await settled(stream)
        assert sorted(source.loaded) == [(64, 96), (200, 264)]
        assert source.marker == 200
        assert stream.covers(263, 264)

    play(act)


def test_a_reader_that_leaves_some_out_is_found_again() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await settled(stream)
        stream.comes(152, 160)
        assert not stream.running
        stream.missed(152, 160)
        await settled(stream)
        assert source.begun == [64, 160]
        read(stream, source.marker)
        await settled(stream)
        assert sorted(source.pages_loaded) == [*range(64, 96), *range(160, 160 + 64 + 128)]

    play(act)


def test_requests_that_begin_within_a_page_are_followed() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await settled(stream)
        stream.comes(63, 72)
        await settled(stream)
        assert len(source.pages_loaded) == FIRST_PAGES + 64

    play(act)


@pytest.mark.parametrize("trouble", ["refused", "error", "bug"])
def test_trouble_ends_the_stream_and_lets_the_reader_go(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.permits = trio.Semaphore(0)
        source.stored = trouble != "refused"
        source.error = {"error": OSError(5, "EIO"), "bug": ValueError("bug")}.get(trouble)
        stream = Stream(source, streams, 64, 256, LIMIT)
        stream.extend(64)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.wait, 200, 700)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(LOADS):
                source.permits.release()
        assert not stream.running
        assert not streams.running
        assert not stream.covers(64, 72)
        assert source.begun == [64, NEVER]
        assert not await stream.wait(200, 700)
        assert source.left == [(64 + LOADS * CHUNK_PAGES, 64 + 1024)]
        stream.comes(64, 70)
        assert not stream.running

    play(act)
    assert ("reading ahead failed" in caplog.text) is (trouble == "bug")
    caplog.clear()


def test_closing_waits_for_the_reads_in_hand_only() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.permits = trio.Semaphore(0)
        stream = Stream(source, streams, 64, 256, LIMIT)
        stream.extend(64)
        async with trio.open_nursery() as nursery:
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(stream.close)
            await trio.testing.wait_all_tasks_blocked()
            assert stream.running
            for _ in range(LOADS):
                source.permits.release()
        assert not stream.running
        assert len(source.loaded) == LOADS
        assert source.left == [(64 + LOADS * CHUNK_PAGES, 64 + 1024)]

    play(act)


def test_pages_that_were_evicted_before_their_time_halve_the_window() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 256, LIMIT)
        stream.extend(64)
        await settled(stream)
        assert len(source.pages_loaded) == 1024
        for first in range(64, 64 + 128, 8):
            stream.missed(first, first + 8)
        read(stream, 64)
        await settled(stream)
        assert len(source.pages_loaded) == 1024 + 1024  # an eighth may have had its time
        stream.missed(72, 80)
        for first in range(80, 80 + 128, 8):
            stream.missed(first, first + 8)
        read(stream, 64 + 1024)
        await settled(stream)
        assert len(source.pages_loaded) == 1024 + 1024 + 512
        read(stream, source.marker)
        await settled(stream)
        assert len(source.pages_loaded) == 1024 + 1024 + 512 + 512 + FIRST_PAGES  # and it tries more again

    play(act)


def test_what_others_read_in_the_file_is_no_matter_of_the_stream() -> None:
    """Of a reader whose requests arrive in disorder, beside random ones, which hit and miss."""
    choice = random.Random(4)

    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        requests = list(range(64, 64 + 8 * 2000, 8))
        for start in range(0, len(requests), 8):
            some = requests[start : start + 8]
            choice.shuffle(some)
            for first in some:
                stream.comes(first, first + 8)
                await settled(stream)
                elsewhere = choice.randrange(20_000) // 8 * 8
                stream.comes(elsewhere, elsewhere + 8)
                if elsewhere < stream.at - 128 and stream.covers(elsewhere, elsewhere + 8):
                    stream.missed(elsewhere, elsewhere + 8)
        end = max(source.pages_loaded)
        assert sorted(source.pages_loaded) == list(range(64, end + 1))
        assert requests[-1] + 1024 <= end < requests[-1] + 3 * 1024
        assert stream.covers(requests[-1], requests[-1] + 8)

    play(act)


def test_the_source_may_know_where_the_reader_is() -> None:
    async def act(source: Source, streams: Streams) -> None:
        stream = Stream(source, streams, 64, 8, LIMIT)
        stream.extend(64)
        await settled(stream)
        source.told = 64
        stream.comes(64, 72)
        assert not stream.running
        source.told = 88  # this is somebody else's: the reader was answered elsewhere
        stream.comes(9000, 9008)
        await settled(stream)
        assert max(source.pages_loaded) + 1 == 64 + FIRST_PAGES + 64

    play(act)


def test_gaps_that_are_shorter_than_a_request_is_long_are_read() -> None:
    assert bridged([(0, 4), (20, 21), (38, 40), (40, 41)]) == [(0, 21), (38, 41)]
    assert bridged([]) == []


def test_only_so_many_at_a_time() -> None:
    async def act(source: Source, streams: Streams) -> None:
        source.permits = trio.Semaphore(0)
        made = [Stream(source, streams, 0, 8, LIMIT) for _ in range(MOST_STREAMS + 1)]
        for stream in made:
            stream.extend(0)
        assert [stream.running for stream in made] == [True] * MOST_STREAMS + [False]
        for _ in range(MOST_STREAMS + 1):
            source.permits.release()
        await settled(made[0])
        made[-1].extend(0)
        assert made[-1].running

    play(act)


@pytest.fixture(params=["loop=auto", "loop=fast", "loop=plain", "cache=kernel"])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount with a pool that has room for read-ahead of 2 MiB."""
    place = mounter(f"timeout=0,client=web,{request.param}")
    place.kernel_caches = request.param == "cache=kernel"
    return place


SIZE = 3000 * PAGE_SIZE + 5


def stored_file(place: Place) -> bytes:
    """Make a file whose pages are not in the page cache; its content."""
    content = random.Random(1).randbytes(SIZE)
    path = place.lower / "file"
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return content


def cached_pages(path: Path) -> int:
    """Return how many pages of a file the kernel caches."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        present = (ctypes.c_ubyte * -(-len(mapped) // PAGE_SIZE))()
        address = ctypes.c_void_p()
        libc = ctypes.CDLL(None, use_errno=True)
        view = np.frombuffer(mapped, np.uint8)
        address.value = view.ctypes.data
        assert libc.mincore(address, ctypes.c_size_t(len(mapped)), present) == 0
        del view
        return sum(value & 1 for value in present)


@pytest.mark.parametrize("request_bytes", [PAGE_SIZE, 10_000, 128 << 10, 1 << 20])
def test_a_stream_misses_twice_and_is_right(
    place: Place, request_bytes: int, eventually: Callable[..., None]
) -> None:
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        found = b"".join(iter(lambda: file.read(request_bytes), b""))
    assert found == content
    eventually(lambda: place.statistics().put_pages >= 3001)  # see Place.has_put
    counted = place.statistics()
    if place.kernel_caches:  # it reads ahead by itself, in several requests at once
        assert counted.ahead_pages > 0
    else:
        assert counted.ahead_pages > 2000
        assert counted.miss_pages + counted.ahead_pages == 3001
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_random_reads_and_small_files_read_nothing_ahead(place: Place) -> None:
    content = stored_file(place)
    (place.lower / "small").write_bytes(content[:100_000])
    choice = random.Random(2)
    with (place.point / "file").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # as to the kernel's own
        for _ in range(200):
            at = choice.randrange(1500) * 2 * PAGE_SIZE  # never two that follow each other
            assert os.pread(file.fileno(), PAGE_SIZE, at) == content[at : at + PAGE_SIZE]
    assert (place.point / "small").read_bytes() == content[:100_000]
    assert place.statistics().ahead_pages == 0
    assert cached_pages(place.lower / "file") == 0


def test_a_reader_that_stops_leaves_little_behind(place: Place, eventually: Callable[..., None]) -> None:
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        for number in range(4):
            start = number * 16 * PAGE_SIZE
            assert os.pread(file.fileno(), 16 * PAGE_SIZE, start) == content[start : start + 16 * PAGE_SIZE]
    assert 0 < place.statistics().put_pages < 1000
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_a_stream_beside_random_readers(place: Place, eventually: Callable[..., None]) -> None:
    """Through one open file, half of whose pages are there: it is read ahead of all the same."""
    content = stored_file(place)
    choice = random.Random(5)
    there = {page for page in range(3001) if choice.random() < 0.5}
    with (place.point / "file").open("rb", buffering=0) as file:
        if not place.kernel_caches:
            for page in there:
                os.pread(file.fileno(), 1, page * PAGE_SIZE)
        before = place.statistics()
        for at in range(0, SIZE, 16 * PAGE_SIZE):
            assert os.pread(file.fileno(), 16 * PAGE_SIZE, at) == content[at : at + 16 * PAGE_SIZE]
            for _ in range(3):
                page = choice.choice([page for page in there if page < 16 + at // PAGE_SIZE]) if there else 0
                found = os.pread(file.fileno(), PAGE_SIZE, page * PAGE_SIZE)
                assert found == content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    eventually(lambda: place.statistics().put_pages >= 3001)
    counted = place.statistics()
    if not place.kernel_caches:
        misses = counted.miss_reads - before.miss_reads
        assert misses < 12
        assert counted.put_pages < 3001 + 16 * misses  # each reads and puts all from its first miss on
        assert counted.ahead_pages > 1300
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_writes_to_what_is_read_ahead_show(place: Place) -> None:
    content = bytearray(stored_file(place))
    choice = random.Random(3)
    with (place.point / "file").open("r+b", buffering=0) as file:
        at = 0
        while at < SIZE:
            assert os.pread(file.fileno(), 32 * PAGE_SIZE, at) == content[at : at + 32 * PAGE_SIZE]
            at += 32 * PAGE_SIZE
            where = min(at + choice.randrange(64) * PAGE_SIZE + 100, SIZE - 10)
            os.pwrite(file.fileno(), b"new bytes", where)
            content[where : where + 9] = b"new bytes"
    assert (place.point / "file").read_bytes() == content == (place.lower / "file").read_bytes()
    assert place.statistics().ahead_pages > 0


def test_a_restart_in_the_middle_of_a_stream(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web")
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        half = SIZE // 2 // PAGE_SIZE * PAGE_SIZE
        assert file.read(half) == content[:half]
        place.restart()
        assert file.readall() == content[half:]
    assert segment.check() == []


def test_nothing_is_read_ahead_when_told_so(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web,read_ahead=0")
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        assert b"".join(iter(lambda: file.read(128 << 10), b"")) == content
    assert (place.statistics().ahead_pages, place.statistics().miss_pages) == (0, 3001)


def test_a_mount_never_has_more_than_its_cap(segment: "_native.Segment", mounter: Mounter) -> None:
    """A client sees what is used at every moment; it never is more than the cap, to the byte."""
    cap = 3_000_000
    segment.client("web").cap_bytes = cap
    place = mounter("timeout=0,client=web")
    client = segment.client("web", create=False)
    content = stored_file(place)
    most = 0
    with (place.point / "file").open("rb", buffering=0) as file:
        while data := file.read(64 << 10):
            start = file.tell() - len(data)
            assert data == content[start : start + len(data)]
            most = max(most, client.statistics()["used_bytes"])
    assert cap * 0.9 < most <= cap
    assert segment.check() == []


def test_nothing_stays_in_the_page_cache_however_it_was_read(
    place: Place, eventually: Callable[..., None]
) -> None:
    content = stored_file(place)
    (place.lower / "small").write_bytes(content[:5000])
    os.sync()
    with (place.lower / "small").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (place.point / "small").read_bytes() == content[:5000]
    with (place.point / "file").open("rb", buffering=0) as raw:
        for start, size in ((0, 1), (PAGE_SIZE - 1, 2), (700_001, 1 << 20), (SIZE - 3, 10), (9_000_000, 9)):
            assert os.pread(raw.fileno(), size, start) == content[start : start + size]
    assert cached_pages(place.lower / "small") == 0
    eventually(
        lambda: cached_pages(place.lower / "file") == 0
    )  # the kernel's own read-ahead may be under way
    with (
        (place.point / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        for start in (2_000_000, 11_000_000, 2_300_000):
            assert mapped[start : start + 10_000] == content[start : start + 10_000]
        assert mapped[:] == content
    eventually(lambda: cached_pages(place.lower / "file") == 0)
