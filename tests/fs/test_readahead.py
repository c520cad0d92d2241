"""What is read ahead of whom: streams with a source that does as it is told.

`test_readahead_mounts` has real mounts.
"""

import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tmem.fs.loading import bridged
from tmem.fs.readahead import CHUNK_PAGES, FIRST_PAGES, LOADS, MOST_STREAMS, NEVER, Stream, Streams

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


def test_a_load_that_fails_while_the_next_window_is_prepared_ends_the_stream() -> None:
    """Nothing of that window is missing, so no other load would wake it: a reader waited for ever."""

    class Slow(Source):
        def __init__(self) -> None:
            super().__init__()
            self.may_prepare = trio.Event()
            self.may_load = {64: trio.Event(), 81: trio.Event()}

        async def prepare(self, first: int, last: int) -> list[tuple[int, int]]:
            if first > 64:
                await self.may_prepare.wait()
            return await super().prepare(first, last)

        async def load(self, first: int, last: int) -> bool:
            await self.may_load[first].wait()
            await super().load(first, last)
            return first == 64

    async def main() -> None:
        source = Slow()
        source.present = {80, *range(64 + FIRST_PAGES, 1000)}
        async with trio.open_nursery() as nursery:
            stream = Stream(source, Streams(), 64, 8, LIMIT)

            @nursery.start_soon
            async def begin() -> None:
                stream.extend(64)
                await trio.testing.wait_all_tasks_blocked()
                read(stream, source.marker)
                source.may_load[64].set()  # after which the next window is prepared
                await trio.testing.wait_all_tasks_blocked()
                source.may_load[81].set()
                await trio.testing.wait_all_tasks_blocked()
                source.may_prepare.set()
                with trio.fail_after(60):
                    await stream.wait(81, 90)
                await settled(stream)

        assert source.loaded == [(64, 80), (81, 64 + FIRST_PAGES)]

    trio.run(main)
