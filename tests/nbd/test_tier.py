"""Real swap with a spill file: most pages leave memory, and every one comes back whole, also while the
manager and the server are killed."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.errors import ServiceError
from tmem.nbd import swap

from ..backends.tiers.servers import Cluster
from ..groups import set_limit
from .conftest import Server, eventually, nbd, needs_root

if TYPE_CHECKING:
    from tmem.backends import _native

from .hogs import Hog, filled

Tmem = Callable[..., CompletedProcess[str]]
MIB = 1 << 20
HOG_BYTES, SMALL_GROUP_BYTES, LARGE_GROUP_BYTES = 64 * MIB, 24 * MIB, 160 * MIB
CAP = "6M"


@pytest.fixture
def device(swapping: None, tmem: Tmem, paths: SegmentPaths, tmp_path: Path) -> Iterator[str]:
    """A swap device of which 6 MiB may be in memory."""
    needs_root()
    assert tmem("start", "-d").returncode == 0
    # So large that the kernel keeps the slots of pages that it reads: without a manager none may be written.
    argv = ("swap", "add", "local", "--size", "256M", "--attach", "--force", "--priority", "32767")
    added = tmem(*argv, "--tier", str(tmp_path / "spill"))
    assert added.returncode == 0, added.stderr
    assert tmem("set", "local", "--cap", CAP).returncode == 0
    made = added.stdout.splitlines()[0]
    yield made
    swap.off(made)


@pytest.fixture
def hog(device: str, control_group: Callable[..., Path]) -> Iterator[Hog]:
    """A hog with more than 32 MiB on the device."""
    with filled(control_group(SMALL_GROUP_BYTES), HOG_BYTES) as made:
        yield made


def fails(handle: Any, index: int, expected: bytes) -> bool:
    """Say whether reading a page gets EIO; else it must be as expected."""
    try:
        found = handle.pread(4096, index * 4096)
    except nbd.Error as error:
        if error.errnum != errno.EIO:
            raise
        return True
    assert found == expected
    return False


def in_tier(segment: "_native.Segment") -> int:
    return segment.client("local", create=False).statistics()["tier_pages"]


def manager_pid(paths: SegmentPaths) -> int | None:
    try:
        pid = service.request(paths, {"op": "ping"})["pid"]
    except ServiceError:
        return None
    assert isinstance(pid, int)
    return pid


def test_most_of_a_hog_is_in_the_tier_and_comes_back(
    tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment", tmp_path: Path
) -> None:
    eventually(lambda: in_tier(segment) > 4000, "most pages are in the tier")
    assert hog.bad_pages() == 0
    assert segment.client("local").statistics()["used_bytes"] <= 6 * MIB
    (pool,) = segment.client("local").pools()
    assert pool.statistics()["pages_fetched"] > 1000
    listed = tmem("list")
    assert f"of pages in file:{tmp_path}/spill" in listed.stdout, listed.stdout
    set_limit(hog.group, LARGE_GROUP_BYTES)
    swap.off(device)
    assert hog.bad_pages() == 0
    assert hog.process.poll() is None
    assert tmem("swap", "remove", "local").returncode == 0
    eventually(lambda: not (tmp_path / "spill").exists(), "the file goes with the client")
    assert tmem("stop").returncode == 0  # the check is exact while nobody works
    assert segment.check() == []


def test_kills_of_manager_and_server_while_pages_go_and_come(
    tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment", paths: SegmentPaths
) -> None:
    eventually(lambda: in_tier(segment) > 1000, "pages are in the tier")
    assert hog.bad_pages() == 0
    for _ in range(3):
        manager = manager_pid(paths)
        assert manager is not None
        os.kill(manager, signal.SIGKILL)
        assert hog.bad_pages() == 0  # without a manager: the server reads by itself
        eventually(lambda: tmem("start", "-d").returncode == 0, "another manager runs")
        before = in_tier(segment)
        assert hog.bad_pages() == 0
        eventually(lambda least=before // 2: in_tier(segment) > least, "demotion goes on")  # type: ignore[misc]
    assert segment.client("local").statistics()["unreachable_gets"] == 0


def test_a_server_that_is_killed_is_followed_by_one_that_reads_the_tier(
    make_server: Callable[..., Server], segment: "_native.Segment", tmem: Tmem, tmp_path: Path
) -> None:
    made = make_server("guest1", 32 * MIB)
    client = segment.client("guest1")
    assert tmem("set", "guest1", "--tier", str(tmp_path), "--tier-size", "32M").returncode == 0
    assert tmem("set", "guest1", "--cap", "4M").returncode == 0
    assert tmem("start", "-d").returncode == 0
    pages = [os.urandom(4096) for _ in range(4096)]
    with made.client() as handle:
        for first in range(0, 4096, 16):
            handle.pwrite(b"".join(pages[first : first + 16]), first * 4096)
    eventually(lambda: client.statistics()["tier_pages"] > 3000, "most pages are in the tier")
    made.kill()
    made.start()
    with made.client() as handle:
        for first in range(0, 4096, 32):
            assert handle.pread(32 * 4096, first * 4096) == b"".join(pages[first : first + 32])
    assert tmem("stop").returncode == 0
    (file,) = tmp_path.glob("*.spill")
    os.truncate(file, 8192)
    with made.client() as handle:
        bad = 0
        for first in range(0, 4096, 64):
            bad += fails(handle, first, pages[first])
        assert bad > 30
        handle.pwrite(pages[0], 77 * 4096)
        assert handle.pread(4096, 77 * 4096) == pages[0]


def test_pages_go_to_a_cluster_and_come_back(
    make_server: Callable[..., Server], segment: "_native.Segment", tmem: Tmem, redis_cluster: Cluster
) -> None:
    made = make_server("guest1", 16 * MIB)
    client = segment.client("guest1")
    assert tmem("start", "-d").returncode == 0
    assert tmem("set", "guest1", "--tier", redis_cluster.url, "--cap", "2M").returncode == 0
    pages = [os.urandom(4096) for _ in range(2048)]
    with made.client() as handle:
        for first in range(0, 2048, 16):
            handle.pwrite(b"".join(pages[first : first + 16]), first * 4096)
        eventually(lambda: client.statistics()["tier_pages"] > 1400, "most pages are in the tier")
        assert f"of pages in {redis_cluster.url}" in tmem("list").stdout
        for first in range(0, 2048, 32):
            assert handle.pread(32 * 4096, first * 4096) == b"".join(pages[first : first + 32])
        redis_cluster.primaries()[0].kill()
        for first in range(0, 2048, 32):  # the replica takes over
            assert handle.pread(32 * 4096, first * 4096) == b"".join(pages[first : first + 32])
    assert client.statistics()["unreachable_gets"] == 0


@pytest.mark.parametrize("tier", ["redis://127.0.0.1:1", "/no/such/directory/x"])
def test_a_tier_that_is_not_there_leaves_no_device(
    tmem: Tmem, segment: "_native.Segment", paths: SegmentPaths, tier: str
) -> None:
    assert tmem("start", "-d").returncode == 0
    refused = tmem("swap", "add", "guest1", "--size", "8M", "--tier", tier)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert segment.clients() == []
    assert not list(paths.state.glob("tier-*"))
