"""What the core's thread that makes room sees, decides and does."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmem.backends import _native

from .. import waiting
from .pages import oid, pages

MIB, GIB = 1 << 20, 1 << 30


class Machine:
    """Files that say how much memory there is."""

    def __init__(self, directory: Path) -> None:
        self.meminfo = directory / "meminfo"
        self.group = directory / "group"
        self.group.mkdir()

    def set(self, available_bytes: int, total_bytes: int = 16 * GIB) -> None:
        # Of one length: whoever reads meanwhile sees the old or the new.
        text = f"MemTotal:  {total_bytes >> 10:12} kB\nMemAvailable: {available_bytes >> 10:12} kB\n"
        mode = "r+" if self.meminfo.exists() else "w"
        with self.meminfo.open(mode, encoding="ascii") as file:
            file.write(text)

    def headroom(self, segment: "_native.Segment", *names: str) -> "_native.Headroom":
        limit, usage, stat = (
            (str(self.group / name) for name in (*names, "memory.stat")) if names else ("",) * 3
        )
        return _native.Headroom(segment, str(self.meminfo), [(limit, usage, stat)] if names else [])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.set(8 * GIB)
    return made


@contextmanager
def running(headroom: "_native.Headroom") -> Iterator[None]:
    thread = threading.Thread(target=headroom.run)
    thread.start()
    try:
        yield
    finally:
        headroom.end()
        thread.join(waiting.DEADLINE_S)
        assert not thread.is_alive()


def until(condition: Callable[[], object], what: str) -> None:
    waiting.wait_until(condition, what=what)


def fill(segment: "_native.Segment", persistent: bool, npages: int) -> "_native.Pool":
    pool = segment.client("one").new_pool(persistent, exclusive=False)
    for first in range(0, npages, 500):
        pool.put(oid(1), first, b"".join(pages("random", first, min(500, npages - first))))
    return pool


@pytest.mark.parametrize(
    ("limit", "usage", "prefix"),
    [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), ("memory.max", "memory.current", "")],
)
def test_the_tightest_room_counts(
    segment: "_native.Segment", machine: Machine, limit: str, usage: str, prefix: str
) -> None:
    group = machine.group
    (group / limit).write_text("max\n" if not prefix else "9223372036854771712\n")
    (group / usage).write_text(f"{1900 * MIB}\n")
    # v1 says what the group alone has first.
    (group / "memory.stat").write_text(
        ("inactive_file 7\n" if prefix else "anon 5\n")
        + f"{prefix}inactive_file {6 * MIB}\n{prefix}active_file {4 * MIB}\n"
    )
    headroom = machine.headroom(segment, limit, usage)
    assert headroom.look()[2:] == (8 * GIB - GIB, GIB)  # a 16th of the machine
    (group / limit).write_text(f"{2048 * MIB}\n")
    assert headroom.look()[2:] == (148 * MIB + 10 * MIB - 128 * MIB, 128 * MIB)
    (group / usage).write_text(f"{1000 * MIB}\n")
    assert headroom.look()[2:] == (1048 * MIB - 128 * MIB, 128 * MIB)  # plenty: page cache is not summed up
    (group / limit).write_text(f"{512 * MIB}\n")
    assert headroom.look()[2:] == (10 * MIB - 64 * MIB, 64 * MIB)  # more in it than it may: an eighth is left
    machine.set(GIB // 2)
    assert headroom.look()[2:] == (-GIB // 2, GIB)
    used = sum(segment.occupied[:2])
    assert headroom.look()[:2] == (used, segment.limits[0])


def test_files_that_are_not_there(segment: "_native.Segment", machine: Machine) -> None:
    with pytest.raises(OSError, match=r"memory\.max"):
        machine.headroom(segment, "memory.max", "memory.current")
    for name in ("memory.max", "memory.current", "memory.stat"):
        (machine.group / name).write_text("")
    assert machine.headroom(segment, "memory.max", "memory.current").look()[3] == GIB  # the machine's


def test_makes_room_as_long_as_there_is_need(segment: "_native.Segment", machine: Machine) -> None:
    """A program takes memory step by step: the margin is there again each time."""
    pool = fill(segment, False, 14000)
    segment.size_within(16 * MIB, 64 * MIB)
    total, others = GIB // 2, 380 * MIB  # so the margin is 64 MiB
    headroom = machine.headroom(segment)

    def available() -> int:
        left = total - others - sum(segment.occupied[:2])
        machine.set(max(left, 0), total)
        return left

    available()
    with running(headroom):
        until(lambda: headroom.statistics()["looks"] > 1, "a look")
        for _ in range(3):
            others += 10 * MIB
            until(lambda: available() >= 48 * MIB, "memory that is given back")
        until(lambda: available() and headroom.statistics()["given_back_bytes"] >= 20 * MIB, "most of it")
    assert 0 < pool.statistics()["pages"] < 14000
    segment.check()


def test_nothing_moves_while_nobody_says_how_much_there_is(
    segment: "_native.Segment", machine: Machine
) -> None:
    """A /proc that is served by a daemon, as in containers, fails while that is not there."""
    pool = fill(segment, False, 14000)
    segment.size_within(16 * MIB, 64 * MIB)
    headroom, limits = machine.headroom(segment), segment.limits
    machine.meminfo.write_text("")
    assert headroom.look()[2:] == (0, 0)
    with running(headroom):
        until(lambda: headroom.statistics()["looks"] > 2, "looks")
        assert (segment.limits, pool.statistics()["pages"]) == (limits, 14000)
        machine.set(0)  # it is back
        until(lambda: segment.limits[0] == 16 * MIB, "the limit")


def test_persistent_pages_stay_and_looks_become_rare(segment: "_native.Segment", machine: Machine) -> None:
    pool = fill(segment, True, 8000)
    segment.size_within(16 * MIB, 64 * MIB)
    machine.set(0)
    headroom = machine.headroom(segment)
    began_s = time.monotonic()
    with running(headroom):
        until(lambda: headroom.statistics()["looks"] >= 10, "ten looks")
        assert time.monotonic() - began_s > 0.8  # not a hundred in that time
    assert segment.limits[0] < 40 * MIB
    assert pool.statistics()["pages"] == 8000
    page = bytearray(4096)
    for number in range(0, 8000, 97):
        assert pool.get(oid(1), number, page) == 1
        assert page == pages("random", number, 1)[0]
    segment.check()


def test_a_fixed_size_is_only_brought_back_to(segment: "_native.Segment", machine: Machine) -> None:
    fill(segment, False, 10000)
    machine.set(0)  # which is nothing to a segment of fixed size
    headroom = machine.headroom(segment)
    with running(headroom):
        headroom.give_back(0, False)
        until(lambda: segment.limits[0] == segment.memory_bytes, "the limit")
        assert headroom.statistics()["given_back_bytes"] == 0
        segment.size_within(16 * MIB, 16 * MIB)
        headroom.give_back(0, False)
        until(lambda: sum(segment.occupied[:2]) <= 16 * MIB, "memory that is given back")
    assert headroom.statistics()["looks"] == 0


def test_one_thread_and_an_end(segment: "_native.Segment", machine: Machine) -> None:
    headroom = machine.headroom(segment)
    segment.size_within(48 * MIB, 48 * MIB)
    with running(headroom):
        until(lambda: segment.limits[0] == 48 * MIB, "its first act")
        with pytest.raises(RuntimeError, match="another thread"):
            headroom.run()
        with pytest.raises(RuntimeError, match="another thread"):
            headroom.look()
    headroom.run()  # has ended for good
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    with pytest.raises(TypeError):
        _native.Headroom.__init__(headroom, segment, str(machine.meminfo), [])


def test_is_scheduled_before_others(segment: "_native.Segment", machine: Machine) -> None:
    headroom = machine.headroom(segment)
    with running(headroom):
        until(lambda: headroom.statistics()["urgency"] > 0 or os.geteuid() != 0, "its urgency")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER  # of the thread alone
