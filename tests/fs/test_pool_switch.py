"""The pool that hits come from below Python is always the one that Python flushes."""

from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native


def test_a_late_error_of_a_former_pool_leaves_the_new_one(segment: "_native.Segment") -> None:
    now = [0.0]
    precache = Precache(SegmentPaths.of("default"), "web", clock=lambda: now[0])
    told: list[_native.Pool | None] = []
    precache.on_pool = told.append
    precache.claim()
    old = precache.pool()
    assert old is not None
    segment.client("web", create=False).destroy()
    now[0] += 10
    new = precache.pool()
    assert new not in (None, old)
    assert told == [old, None, new]
    # A worker thread that has been in a call of the former pool comes back.
    assert precache.get(old, bytes(24), 0, memoryview(bytearray(PAGE_SIZE))) == 0
    assert precache.current is new
    assert told == [old, None, new]
    precache.close()
    assert told[-1] is None
