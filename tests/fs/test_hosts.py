"""Two hosts on one file system, and a cluster between them: segments and mounts of their own, nothing else
in common. B hits what A has loaded, sees what A changes, and goes on when the cluster does not."""

import os
import random
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import TmemError
from tmem.fs.options import MountOptions
from tmem.types import PAGE_SIZE

from ..backends.tiers.servers import Cluster
from ..waiting import wait_until
from .conftest import Mounter, Place

MIB = 1 << 20
UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
Hosts = Callable[..., tuple[Place, Place]]


@pytest.fixture
def hosts(runtime_dir: Path, mounter: Mounter, tmp_path: Path, redis_cluster: Cluster) -> Iterator[Hosts]:
    """A function that makes two hosts. Their clocks are one, so versions may be settled at once."""
    segments = []

    def mount(options: str = "settled=0,timeout=0") -> tuple[Place, Place]:
        places = []
        for name in ("a", "b"):
            (runtime_dir / f"{name}.d").mkdir(mode=0o700)
            segments.append(_native.create(str(runtime_dir / name), 64 << 20))
            segments[-1].client("web").authorise(UUID.bytes)
            tier = f'tier="{redis_cluster.url}?timeout=1"'
            places.append(
                mounter(f"{options},client=web,shared={UUID},{tier}", point=tmp_path / name, segment=name)
            )
        for place in places:
            wait_until(lambda place=place: place.statistics().tier_up)  # type: ignore[misc]
        return places[0], places[1]

    yield mount
    for segment in segments:
        segment.close()
    for name in ("a", "b"):
        if (runtime_dir / name).exists():
            _native.destroy(str(runtime_dir / name))


def sent(place: Place, npages: int) -> None:
    wait_until(lambda: place.statistics().tier_sent_pages >= npages, what="it is in the cluster")


def read(place: Place, name: str = "file") -> bytes:
    return (place.point / name).read_bytes()


def make(place: Place, length: int, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(length)
    (place.lower / "file").write_bytes(data)
    return data


def test_b_hits_what_a_has_loaded(hosts: Hosts) -> None:
    a, b = hosts()
    data = make(a, 3 * MIB + 5)
    assert read(a) == data
    sent(a, 769)
    assert a.statistics().tier_hit_pages == 0
    assert read(b) == data
    statistics = b.has_put(769)
    assert statistics.lower_bytes in (0, 5)  # the kernel may have the last page, and is asked first for one
    hits = statistics.tier_hit_pages
    assert hits >= 768
    assert read(b) == data
    assert b.statistics().tier_hit_pages == hits  # the second time from its own pool


def test_a_part_that_is_missing_comes_from_the_lower(hosts: Hosts) -> None:
    a, b = hosts("settled=0,timeout=0,read_ahead=0")
    data = make(a, 4 * MIB)
    with (a.point / "file").open("rb", buffering=0) as file:
        file.seek(MIB)
        assert file.read(2 * MIB) == data[MIB : 3 * MIB]
    sent(a, 512)
    assert read(b) == data
    statistics = b.statistics()
    assert statistics.tier_hit_pages == 512
    assert statistics.lower_bytes == 2 * MIB
    sent(b, 512)  # what A has not read, others have from B


@pytest.mark.parametrize("through", ["mount", "lower"])
def test_changes_are_never_stale(hosts: Hosts, through: str) -> None:
    """Whoever opens a file after a change sees it, whatever the cluster has of before."""
    a, b = hosts()
    data = bytearray(make(a, 2 * MIB))
    rng = random.Random(5)
    for turn in range(12):
        one, other = (a, b) if turn % 2 else (b, a)
        assert read(one) == data
        assert read(other) == data
        path = (one.point if through == "mount" else one.lower) / "file"
        at = rng.randrange(len(data) - PAGE_SIZE)
        data[at : at + 3000] = rng.randbytes(3000)
        if turn % 3 == 0:
            data = data[: len(data) - 777]
        status = path.stat()
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(data[at : at + 3000])
            file.truncate(len(data))
        if turn % 3 == 1:  # the old mtime and, mostly, the old size
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert read(other) == data
        assert read(one) == data
    assert a.statistics().tier_wrong_values == b.statistics().tier_wrong_values == 0
    assert a.statistics().tier_hit_pages + b.statistics().tier_hit_pages > 512


def test_a_file_that_replaces_another(hosts: Hosts) -> None:
    a, b = hosts()
    old = make(a, MIB, 1)
    assert read(a) == old
    sent(a, 256)
    status = (a.lower / "file").stat()
    (a.lower / "new").write_bytes(random.Random(2).randbytes(MIB))
    os.utime(a.lower / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (a.lower / "new").rename(a.lower / "file")
    assert read(b) == random.Random(2).randbytes(MIB)


def test_young_files_are_not_shared(hosts: Hosts) -> None:
    a, b = hosts("timeout=0")
    data = make(a, MIB)
    assert read(a) == data
    assert read(b) == data
    a.has_put(256)
    assert b.has_put(256).lower_bytes // PAGE_SIZE == 256
    assert a.statistics().tier_sent_pages == b.statistics().tier_hit_pages == 0


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_cluster_goes_while_it_is_read(hosts: Hosts, redis_cluster: Cluster, how: str) -> None:
    a, b = hosts("settled=0,timeout=0,read_ahead=0")
    data = make(a, 8 * MIB)
    assert read(a) == data
    sent(a, 2048)
    found = b""
    with (b.point / "file").open("rb", buffering=0) as file:
        found += file.read(MIB)
        assert b.statistics().tier_hit_pages == 256
        for server in redis_cluster.servers:
            if how == "killed":
                server.kill()
            else:
                server.signal(signal.SIGSTOP)
        while part := file.read(MIB):
            found += part
    assert found == data
    statistics = b.statistics()
    assert statistics.lower_bytes >= 6 * MIB
    assert not statistics.tier_up
    assert statistics.tier_failures == 1
    redis_cluster.mend()
    wait_until(lambda: b.statistics().tier_up, what="the cluster is asked again")


def test_new_code_goes_on_with_it(hosts: Hosts) -> None:
    a, b = hosts()
    b.restart()
    data = make(a, MIB)
    assert read(a) == data
    sent(a, 256)
    wait_until(lambda: b.statistics().tier_up)
    assert read(b) == data
    assert b.statistics().tier_hit_pages == 256


def test_options() -> None:
    options = MountOptions.parse([f'shared={UUID},tier="redis+cluster://a:1,b:2",settled=5'], "/mnt")
    assert options.tier == "redis+cluster://a:1,b:2"
    assert options.settled_seconds == 5
    assert MountOptions.parse([f"shared={UUID}"], "/mnt").settled_seconds == 60
    with pytest.raises(TmemError, match="needs shared=UUID"):
        MountOptions.parse(["tier=redis://a"], "/mnt")
    with pytest.raises(TmemError, match="use redis://"):
        MountOptions.parse([f"shared={UUID},tier=nfs://a"], "/mnt")
    with pytest.raises(TmemError, match="settled=SECONDS"):
        MountOptions.parse([f"shared={UUID},settled=soon"], "/mnt")
    secret = MountOptions.parse([f"shared={UUID},tier=redis://:sesame@a"], "/mnt")
    assert "sesame" not in repr(secret)
