"""The task that keeps a segment as large as it should be: what goes wrong does not end it, and it is quiet
when there is nothing it can do."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tmem.backends.compacting import Compactor
from tmem.backends.pressure import Room
from tmem.backends.resizing import Resizer
from tmem.errors import SegmentError

from .. import waiting
from .pages import oid, pages

if TYPE_CHECKING:
    from tmem.backends import _native

MIB, GIB = 1 << 20, 1 << 30


class Failing:
    """A segment that raises `errors` where memory is to be given back, one after the other."""

    def __init__(self, segment: "_native.Segment", errors: list[Exception]) -> None:
        self._segment = segment
        self._errors = errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segment, name)

    def shrink(self, keep_bytes: int, hard: bool, most_bytes: int) -> int:
        if self._errors:
            raise self._errors.pop(0)
        return self._segment.shrink(keep_bytes, hard, most_bytes)


def resizer(segment: "_native.Segment", available_bytes: int = 16 * GIB) -> Resizer:
    rooms = [Room(16 * GIB, available_bytes)]
    return Resizer(segment, Compactor(segment), lambda: 0, lambda: False, lambda now_s: rooms)


def beside(task: Callable[[], Awaitable[None]], test: Callable[[], Awaitable[None]]) -> None:
    """Run `test` while `task` runs."""

    async def main() -> None:
        with trio.fail_after(waiting.DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)
                await test()
                nursery.cancel_scope.cancel()

    trio.run(main)


def fill(segment: "_native.Segment", persistent: bool, npages: int) -> None:
    pool = segment.client("one").new_pool(persistent, exclusive=False)
    for first in range(0, npages, 500):
        pool.put(oid(1), first, b"".join(pages("random", first, min(500, npages - first))))


@pytest.mark.parametrize("error", [SegmentError("no room for another thread"), MemoryError()])
def test_goes_on_after_an_error(
    segment: "_native.Segment", error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    fill(segment, False, 10000)
    segment.size_within(16 * MIB, 16 * MIB)
    failing = cast("_native.Segment", Failing(segment, [error, error]))

    async def given_back() -> None:
        while sum(segment.occupied[:2]) > 16 * MIB:
            await trio.sleep(0.005)

    with caplog.at_level(logging.WARNING):
        beside(resizer(failing).run, given_back)
    assert [record.getMessage() for record in caplog.records] == [f"cannot give memory back: {error}"]
    caplog.clear()


def test_looks_seldom_while_there_is_nothing_to_give(
    segment: "_native.Segment", caplog: pytest.LogCaptureFixture
) -> None:
    """Persistent pages hold all that is used, and others need it."""
    fill(segment, True, 8000)
    segment.size_within(16 * MIB, 64 * MIB)
    resizing = resizer(segment, available_bytes=0)

    async def looks() -> None:
        while resizing.statistics.looks < 10:
            await trio.sleep(0.005)

    began_s = time.monotonic()
    with caplog.at_level(logging.INFO):
        beside(resizing.run, looks)
    assert time.monotonic() - began_s > 1  # not a hundred in that time
    assert sum("memory is short" in record.getMessage() for record in caplog.records) <= 1
    assert segment.limits[0] < 40 * MIB


def test_an_urgent_slice_follows_one_that_was_not(segment: "_native.Segment") -> None:
    """All that exceeds the limit goes, slice by slice."""
    fill(segment, False, 15000)
    segment.size_within(16 * MIB, 64 * MIB)
    resizing = resizer(segment, available_bytes=0)

    async def given_back() -> None:
        while sum(segment.occupied[:2]) > 17 * MIB:
            await trio.sleep(0.005)

    beside(resizing.run, given_back)
    assert resizing.statistics.given_back_bytes > 40 * MIB
