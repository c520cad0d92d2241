"""The manager service, as a process of its own: housekeeping, its one lock, its end, and what outlives it."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmem.backends import _native, manager
from tmem.backends import segment as segments
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.backends.service import request
from tmem.errors import ServiceError
from tmem.types import OID_SIZE, PAGE_SIZE, SizeRange

from ..waiting import DEADLINE_S

RUN = """
import logging
from tmem.backends import manager, segment
from tmem.backends.paths import SegmentPaths
logging.basicConfig(level=logging.INFO)
manager.run(SegmentPaths.of("default"), segment.attach("default"))
"""
USE = """
import sys
from tmem.backends import segment
pool = segment.attach("default").client("doomed").new_pool(persistent=True)
pool.put(bytes(24), 0, bytes(4096))
print("ready", flush=True)
sys.stdin.read()
"""

Eventually = Callable[..., None]


@contextmanager
def running(paths: SegmentPaths, eventually: Eventually) -> Iterator[subprocess.Popen[bytes]]:
    """A manager that answers; its log is what pytest shows when the test fails."""
    with subprocess.Popen([sys.executable, "-c", RUN]) as process:
        try:
            eventually(lambda: answers(paths) or process.poll() is not None)
            assert process.poll() is None, "the manager ended at once"
            yield process
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def answers(paths: SegmentPaths) -> bool:
    try:
        return bool(request(paths, {"op": "ping"})["ok"])
    except ServiceError:
        return False


@pytest.fixture
def paths(segment: _native.Segment) -> SegmentPaths:
    return SegmentPaths.of("default")


def test_nobody_there_says_how_to_start_one(runtime_dir: Path) -> None:
    with pytest.raises(ServiceError, match="start -d"):
        request(SegmentPaths.of("default"), {"op": "ping"})


def test_there_is_only_one(paths: SegmentPaths, eventually: Eventually) -> None:
    with running(paths, eventually) as first:
        with segments_attached() as opened, pytest.raises(ServiceError, match=f"pid {first.pid}"):
            manager.run(paths, opened)
        assert request(paths, {"op": "ping"})["pid"] == first.pid


@contextmanager
def segments_attached() -> Iterator[_native.Segment]:
    opened = segments.attach("default")
    yield opened
    opened.close()


def test_keeps_a_reserve_and_gives_back_the_rest(
    paths: SegmentPaths, segment: _native.Segment, eventually: Eventually
) -> None:
    reserve = manager.Reserve(segment.memory_bytes).size_bytes
    with running(paths, eventually):
        eventually(lambda: segment.statistics()["reserve_bytes"] >= reserve)
        pool = segment.client("one").new_pool(persistent=True)
        oid = bytes(OID_SIZE)
        stored = pool.put(oid, 0, os.urandom(16 * reserve))
        assert stored * PAGE_SIZE == 16 * reserve
        # The burst makes it keep more for a while.
        eventually(lambda: segment.statistics()["reserve_bytes"] >= 2 * reserve)
        pool.flush(oid, 0, stored)
        eventually(lambda: segment.statistics()["reserve_bytes"] <= 2 * reserve + (1 << 20))
        assert segment.statistics()["reserve_bytes"] >= reserve


def test_a_segment_grows_while_there_is_memory_and_falls_to_the_size_it_is_given(
    paths: SegmentPaths, segment: _native.Segment, eventually: Eventually
) -> None:
    """The machine has more to spare than this segment could take."""
    least, most = 16 << 20, segment.memory_bytes
    segments.resize(segment, SizeRange(least, most))
    pool = segment.client("cache").new_pool(persistent=False)
    with running(paths, eventually):
        eventually(lambda: segment.limits[0] > least + (4 << 20))
        pool.put(bytes(OID_SIZE), 0, os.urandom(most))
        assert segment.occupied[0] > least
        segments.resize(segment, SizeRange(least, least))
        eventually(lambda: Path(segment.path).stat().st_blocks * 512 <= least)
        statistics = request(paths, {"op": "ping"})["statistics"]
        assert isinstance(statistics, dict)
        assert statistics["raised"] > 0
        assert statistics["looks"] > 0
        assert statistics["given_back_bytes"] > 0


@pytest.mark.parametrize("persistent", [True, False])
def test_memory_goes_back_after_freeing_at_random(
    paths: SegmentPaths, segment: _native.Segment, eventually: Eventually, persistent: bool
) -> None:
    """Nine pages of ten, in no order: four fifths of the memory are back with the system."""
    pool = segment.client("one").new_pool(persistent, exclusive=False)
    # So many that what is never worth moving (4 MiB) is much less than a fifth.
    oid, npages, size = bytes(OID_SIZE), 26000, 2000
    source = random.Random(1).randbytes(npages * size)
    for index in range(npages):
        assert pool.put(oid, index, source[index * size : (index + 1) * size].ljust(PAGE_SIZE, b"\0")) == 1
    used = Path(segment.path).stat().st_blocks * 512 - segment.statistics()["metadata_bytes"]
    order = random.Random(2).sample(range(npages), npages)
    with running(paths, eventually):
        for index in order[npages // 10 :]:
            assert pool.flush(oid, index) == 1

        def left() -> int:
            now = segment.statistics()
            backed = Path(segment.path).stat().st_blocks * 512
            return backed - now["metadata_bytes"] - now["reserve_bytes"]

        # Not what the manager keeps ready, which is much of so small a segment.
        eventually(lambda: left() <= used // 5)
    buffer = bytearray(PAGE_SIZE)
    for index in order[: npages // 10]:
        assert pool.get(oid, index, buffer) == 1
        assert buffer.rstrip(b"\0") == source[index * size : (index + 1) * size].rstrip(b"\0")
    assert segment.check() == []


def test_the_reserve_follows_the_load() -> None:
    reserve = manager.Reserve(512 << 20)
    assert reserve.size_bytes == 8 << 20
    assert not reserve.follow(1 << 20)
    for expected in (16, 32, 64, 64):
        assert reserve.follow(reserve.size_bytes)
        assert reserve.size_bytes == expected << 20
    for expected in (32, 16, 8, 8):
        assert not reserve.follow(0)
        assert reserve.size_bytes == expected << 20


def test_repairs_what_the_dead_leave(
    paths: SegmentPaths, segment: _native.Segment, eventually: Eventually
) -> None:
    def reaped() -> bool:
        statistics = request(paths, {"op": "ping"})["statistics"]
        assert isinstance(statistics, dict)
        return bool(statistics["reaped"])

    with running(paths, eventually):
        user = subprocess.Popen([sys.executable, "-c", USE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with user:
            assert user.stdout is not None
            assert user.stdout.readline() == b"ready\n"
            user.kill()
        eventually(reaped)
    assert segment.client("doomed", create=False).pools()[0].present(bytes(OID_SIZE), 0, 2) == [(0, 1)]
    assert segment.check() == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_its_end_leaves_servers_to_the_next(
    paths: SegmentPaths, eventually: Eventually, end: signal.Signals
) -> None:
    with running(paths, eventually) as first:
        pid = request(paths, {"op": "supervise", "name": "one", "argv": ["sleep", "300"], "env": {}})["pid"]
        assert isinstance(pid, int)
        server = Process.of(pid)
        assert server is not None
        first.send_signal(end)
        assert first.wait(DEADLINE_S) == (0 if end is not signal.SIGKILL else -signal.SIGKILL)
        assert paths.control.exists() == (end is signal.SIGKILL)
        assert server.alive
    with running(paths, eventually):
        assert request(paths, {"op": "services"})["services"] == [
            {"name": "one", "pid": pid, "state": "running", "starts": 0}
        ]
        request(paths, {"op": "unsupervise", "name": "one", "timeout_s": DEADLINE_S})
        assert not server.alive


def test_stop_is_answered(paths: SegmentPaths, eventually: Eventually) -> None:
    with running(paths, eventually) as process:
        assert request(paths, {"op": "stop"})["pid"] == process.pid
        assert process.wait(DEADLINE_S) == 0


def test_ends_with_its_segment(paths: SegmentPaths, eventually: Eventually) -> None:
    with running(paths, eventually) as process:
        _native.destroy(str(paths.segment))
        assert process.wait(DEADLINE_S) == 0


def test_bad_requests_are_answered_and_change_nothing(paths: SegmentPaths, eventually: Eventually) -> None:
    bad: list[tuple[dict[str, object], str]] = [
        ({}, "does not know"),
        ({"op": "dance"}, "does not know"),
        ({"op": ["ping"]}, "does not know"),
        ({"op": "supervise", "name": "one", "argv": "ls"}, "argv"),
        ({"op": "supervise", "name": "one", "argv": ["ls"], "env": [1]}, "env"),
        ({"op": "supervise", "name": "../one", "argv": ["ls"]}, "service name"),
        ({"op": "unsupervise", "name": "one"}, "timeout_s"),
    ]
    with running(paths, eventually):
        for message, reason in bad:
            with pytest.raises(ServiceError, match=reason):
                request(paths, message)
        assert answers(paths)


def test_a_run_time_directory_may_lie_deep(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    deep = runtime_dir / ("d" * 60) / ("e" * 60)
    monkeypatch.setenv("TMEM_RUNTIME_DIR", str(deep))
    opened = segments.create("default", 16 << 20)
    opened.close()
    with running(SegmentPaths.of("default"), eventually):
        pass
    segments.destroy("default")
