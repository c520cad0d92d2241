"""The task that keeps a segment as large as it should be, and the thread of the core beside it."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import trio

from tmem.backends.resizing import Resizer
from tmem.errors import SegmentError

from .. import waiting
from .pages import oid, pages

if TYPE_CHECKING:
    from tmem.backends import _native

MIB, GIB = 1 << 20, 1 << 30


class World:
    """Files of a machine of 512 MiB, whose margin is 64 MiB."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        for name in ("self", "pressure"):
            (proc / name).mkdir()
        (proc / "self" / "mountinfo").write_text("")
        (proc / "self" / "cgroup").write_text("")
        self.available(512 * MIB)
        self.stalled(0)

    def available(self, size: int) -> None:
        text = f"MemTotal: {512 << 10:12} kB\nMemAvailable: {size >> 10:12} kB\n"
        fresh = not (self.proc / "meminfo").exists()
        with (self.proc / "meminfo").open("w" if fresh else "r+") as file:
            file.write(text)

    def stalled(self, us: int) -> None:
        (self.proc / "pressure" / "memory").write_text(f"some avg10=0.00 total={us}\n")

    def resizer(self, segment: "_native.Segment") -> Resizer:
        return Resizer(segment, lambda: 0, lambda: False, self.proc)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def beside(task: Callable[[], Awaitable[None]], test: Callable[[], Awaitable[None]]) -> None:
    """Run `test` while `task` runs."""

    async def main() -> None:
        with trio.fail_after(waiting.DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)
                await test()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.005)


def fill(segment: "_native.Segment", npages: int) -> None:
    pool = segment.client("one").new_pool(persistent=False, exclusive=False)
    for first in range(0, npages, 500):
        pool.put(oid(1), first, b"".join(pages("random", first, min(500, npages - first))))


def test_does_not_grow_while_nobody_says_how_much_there_is(
    segment: "_native.Segment", world: World, caplog: pytest.LogCaptureFixture
) -> None:
    segment.size_within(16 * MIB, 64 * MIB)
    segment.set_limits(32 * MIB, 32 * MIB)
    before = segment.limits
    (world.proc / "meminfo").write_text("")
    resizing = world.resizer(segment)

    async def test() -> None:
        await until(lambda: bool(caplog.records))
        assert resizing.statistics.looks

    with caplog.at_level(logging.WARNING):
        beside(resizing.run, test)
    assert "/proc/meminfo cannot be read" in caplog.records[0].getMessage()
    assert segment.limits == before
    caplog.clear()


def test_the_thread_that_gives_back_goes_on_after_a_trouble(
    segment: "_native.Segment", world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """There may have been no room for another thread in the segment's table, in that moment."""
    fill(segment, 14000)
    segment.size_within(16 * MIB, 16 * MIB)
    resizing = world.resizer(segment)
    core = resizing._headroom
    fails = [True]

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def run(self) -> None:
            if fails:
                fails.pop()
                raise SegmentError("no room for another thread")
            core.run()

    resizing._headroom = cast("_native.Headroom", Failing())

    async def test() -> None:
        await until(lambda: sum(segment.occupied[:2]) <= 16 * MIB)

    with caplog.at_level(logging.WARNING):
        beside(resizing.run, test)
    assert [record.getMessage() for record in caplog.records] == [
        "memory is not given back: no room for another thread"
    ]
    caplog.clear()


def test_gives_way_and_says_so_once(
    segment: "_native.Segment", world: World, caplog: pytest.LogCaptureFixture
) -> None:
    fill(segment, 14000)
    segment.size_within(16 * MIB, 64 * MIB)
    world.available(0)
    resizing = world.resizer(segment)

    async def test() -> None:
        await until(lambda: sum(segment.occupied[:2]) <= 17 * MIB)
        await until(lambda: resizing.statistics.given_back_bytes > 30 * MIB)
        await until(lambda: bool(said()))
        seen = resizing.statistics.looks
        await until(lambda: resizing.statistics.looks > seen)

    def said() -> list[str]:
        return [text for record in caplog.records if "memory is short" in (text := record.getMessage())]

    with caplog.at_level(logging.INFO):
        beside(resizing.run, test)
    assert len(said()) == 1
    counts = resizing.statistics
    assert counts.lowered >= 1
    assert counts.raised == 0
    assert counts.spare_bytes < 0
    assert counts.margin_bytes == 64 * MIB
    segment.check()


def test_grows_where_nobody_needs_it(segment: "_native.Segment", world: World) -> None:
    segment.size_within(16 * MIB, 64 * MIB)
    segment.set_limits(16 * MIB, 16 * MIB)
    resizing = world.resizer(segment)

    async def test() -> None:
        await until(lambda: resizing.statistics.raised > 1)

    beside(resizing.run, test)
    assert 16 * MIB < segment.limits[0] <= 16 * MIB + 48 * MIB // 16 * 4


def test_what_pressure_takes_away_goes_back(segment: "_native.Segment", world: World) -> None:
    """There is a margin, and programs wait nevertheless."""
    fill(segment, 14000)
    segment.size_within(16 * MIB, 64 * MIB)
    world.available(100 * MIB)
    resizing = world.resizer(segment)
    before = segment.limits[0]

    async def test() -> None:
        await until(lambda: resizing.statistics.margin_bytes > 0)
        for waited_s in range(1, 100):
            world.stalled(waited_s * 100_000_000)
            await trio.sleep(0.05)
            if sum(segment.occupied[:2]) < before - 20 * MIB:
                return

    beside(resizing.run, test)
    assert sum(segment.occupied[:2]) < before - 20 * MIB
    assert resizing.statistics.stalled_percent == 100


def test_goes_on_after_an_error(
    segment: "_native.Segment", world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that cannot be read now: it says so once, and the core makes room meanwhile."""
    fill(segment, 10000)
    failures = [OSError("no memory for that"), OSError("no memory for that")]

    def reserve() -> int:
        if failures:
            raise failures.pop()
        return 0

    resizing = Resizer(segment, reserve, lambda: True, world.proc)
    segment.size_within(16 * MIB, 16 * MIB)

    async def test() -> None:
        await until(lambda: not failures and sum(segment.occupied[:2]) <= 16 * MIB)

    with caplog.at_level(logging.WARNING):
        beside(resizing.run, test)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot follow how much memory there is: no memory for that"
    ]
    caplog.clear()
