"""Which files the kernel keeps copies of: the rule, and a mount with its defaults."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.backends.pressure import Room
from tmem.fs import caching
from tmem.fs.caching import SMALL_BYTES, CacheRule
from tmem.fs.options import Cache
from tmem.types import PAGE_SIZE

from .conftest import Mounter

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20


def status(size: int) -> os.stat_result:
    return os.stat_result((0o100644, 1, 1, 1, 0, 0, size, 0, 0, 0))


@pytest.mark.parametrize(
    ("wanted", "direct_mmap", "is_plenty", "small", "large"),
    [
        (Cache.AUTO, True, True, True, False),
        (Cache.AUTO, True, False, False, False),
        (Cache.AUTO, False, False, True, True),
        (Cache.DIRECT, True, True, False, False),
        (Cache.DIRECT, False, True, False, False),
        (Cache.KERNEL, True, False, True, True),
    ],
)
def test_which_files(wanted: Cache, direct_mmap: bool, is_plenty: bool, small: bool, large: bool) -> None:
    rule = CacheRule(wanted, lambda: is_plenty)
    rule.settle(direct_mmap)
    assert [rule(status(size)) for size in (1, SMALL_BYTES)] == [small, small]
    assert [rule(status(size)) for size in (0, SMALL_BYTES + 1)] == [large, large]
    assert rule(status(1), appends=True) == (small and not direct_mmap)


def test_memory_is_looked_at_now_and_then() -> None:
    now, there, looks = 0.0, True, 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return there

    rule = CacheRule(Cache.AUTO, look, lambda: now)
    rule.settle(True)
    assert [rule(status(1)) for _ in range(10)] == [True] * 10
    assert looks == 1
    there, now = False, 60.0
    assert not rule(status(1))
    assert looks == 2


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ([Room(100 * MIB, 25 * MIB)], True),
        ([Room(100 * MIB, 24 * MIB)], False),
        ([Room(100 * MIB, 90 * MIB), Room(16 * MIB, 3 * MIB)], False),  # a control group of the daemon's
    ],
)
def test_plenty(monkeypatch: pytest.MonkeyPatch, rooms: list[Room], expected: bool) -> None:
    monkeypatch.setattr("tmem.backends.pressure.rooms", lambda: rooms)
    assert caching.plenty() is expected


def test_a_small_file_is_read_again_without_the_daemon(
    mounter: Mounter, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    place = mounter("cache=auto")
    if not caching.plenty():
        pytest.skip("this machine has too little memory")
    small, large = place.lower / "small", place.lower / "large"
    small.write_bytes(os.urandom(3 * PAGE_SIZE))
    large.write_bytes(os.urandom(SMALL_BYTES + PAGE_SIZE))
    for file in (small, large):
        os.utime(file, (1e9, 1e9))
        eventually(lambda file=file: (place.point / file.name).stat().st_mtime == 1e9)
    read = [(place.point / file.name).read_bytes() for file in (small, large)]
    place.has_put(3 + SMALL_BYTES // PAGE_SIZE + 1)

    def again(name: str) -> int:
        """Read it, and return how many reads came to the daemon for that."""
        before = place.statistics()
        assert (place.point / name).read_bytes() == (place.lower / name).read_bytes()
        after = place.statistics()
        return after.hit_reads + after.miss_reads - before.hit_reads - before.miss_reads

    assert read == [small.read_bytes(), large.read_bytes()]
    # A file that was written just now is not trusted: its copy is dropped at each open.
    wait_until(lambda: again("small") == 0, what="the kernel keeps its copy")
    assert again("large") > 0
    small.write_bytes(os.urandom(5 * PAGE_SIZE))  # underneath
    wait_until(lambda: (place.point / "small").read_bytes() == small.read_bytes(), what="the change shows")
