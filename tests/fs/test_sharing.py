"""Several mounts of one directory on a shared pool: all hit what one read, none serves what one changed."""

import mmap
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import AttachError, TmemError
from tmem.fs.precache import ClaimError
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
Pair = tuple[Place, Place]
Share = Callable[..., Place]


@pytest.fixture
def share(segment: "_native.Segment", mounter: Mounter, tmp_path: Path) -> Share:
    """A function that mounts the lower directory for a client that may share: ``share("web1")``."""

    def mount(name: str, options: str = "timeout=0") -> Place:
        segment.client(name).authorise(UUID.bytes)
        return mounter(f"{options},client={name},shared={UUID}", point=tmp_path / name)

    return mount


@pytest.fixture(params=["cache=direct", "cache=kernel"])
def pair(request: pytest.FixtureRequest, share: Share) -> Pair:
    """Two mounts of one directory."""
    options = f"timeout=0,{request.param}"
    return share("web1", options), share("web2", options)


def the_pool(segment: "_native.Segment", client: str = "web1") -> "_native.Pool":
    (pool,) = segment.client(client, create=False).pools()
    return pool


def test_what_one_has_read_the_other_finds(pair: Pair, segment: "_native.Segment") -> None:
    one, two = pair
    content = random.Random(1).randbytes(2 * MIB + 5)
    (one.lower / "file").write_bytes(content)
    assert (one.point / "file").read_bytes() == content
    one.has_put(513)
    read_before = two.read_by_daemon()
    assert (two.point / "file").read_bytes() == content
    statistics = two.statistics()
    assert (statistics.miss_pages, statistics.lower_bytes) == (0, 0)
    assert statistics.hit_pages >= 513
    assert two.read_by_daemon() - read_before < MIB
    assert the_pool(segment).uuid == UUID.bytes
    assert {sharer.name for sharer in the_pool(segment).sharers} == {"web1", "web2"}
    assert the_pool(segment).statistics()["pages"] == 513
    assert segment.check() == []


def test_the_others_writes_show_at_once_and_at_the_next_open(pair: Pair) -> None:
    one, two = pair
    content = bytearray(random.Random(2).randbytes(16 * PAGE_SIZE))
    (one.lower / "file").write_bytes(content)
    for place in pair:
        assert (place.point / "file").read_bytes() == content
    for turn, (writer, reader) in enumerate([(one, two), (two, one)] * 3):
        with (reader.point / "file").open("rb", buffering=0) as held:
            assert held.read() == content
            with (writer.point / "file").open("r+b", buffering=0) as file:
                data = b"turn %d" % turn
                os.pwrite(file.fileno(), data, turn * PAGE_SIZE)
                content[turn * PAGE_SIZE : turn * PAGE_SIZE + len(data)] = data
                assert os.pread(file.fileno(), len(content), 0) == content
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(held.fileno(), len(content), 0) == content
        for place in pair:
            assert (place.point / "file").read_bytes() == content
            assert (place.point / "file").read_bytes() == content


def test_changes_underneath_show_at_the_next_open_of_each(pair: Pair) -> None:
    for number in range(6):  # as quickly as can be, of the same size
        content = random.Random(number).randbytes(3 * PAGE_SIZE + 1)
        (pair[0].lower / "file").write_bytes(content)
        for place in pair[:: 1 - 2 * (number % 2)]:
            assert (place.point / "file").read_bytes() == content
            assert (place.point / "file").read_bytes() == content


def test_truncation_and_growth_by_the_other(share: Share) -> None:
    one, two = share("web1"), share("web2")
    path = one.point / "file"
    path.write_bytes(b"x" * 10_000)
    with (two.point / "file").open("rb", buffering=0) as held:
        assert os.pread(held.fileno(), 20_000, 0) == b"x" * 10_000
        os.truncate(path, 5000)
        assert path.read_bytes() == b"x" * 5000 == (two.point / "file").read_bytes()
        assert os.pread(held.fileno(), 20_000, 0) == b"x" * 5000
        os.truncate(path, 9000)
        assert path.read_bytes() == b"x" * 5000 + bytes(4000) == (two.point / "file").read_bytes()
        with path.open("ab") as file:
            file.write(b"end")
        assert os.pread(held.fileno(), 20_000, 0) == b"x" * 5000 + bytes(4000) + b"end"


def test_what_is_read_of_a_newer_version_is_not_put_for_the_older(share: Share) -> None:
    one, two = share("web1"), share("web2")
    (one.lower / "file").write_bytes(b"x" * 10_000)
    with (one.point / "file").open("rb", buffering=0) as held, (two.point / "file").open("rb") as other:
        os.truncate(one.lower / "file", 5000)  # underneath; both still take it for 10,000 bytes
        for file in (held, other):
            assert os.pread(file.fileno(), 2 * PAGE_SIZE, 0) == b"x" * 5000  # not followed by zeros


def test_a_change_flushes_also_while_its_client_is_off(share: Share, segment: "_native.Segment") -> None:
    one, two = share("web1"), share("web2")
    old, new = b"old" * 5000, b"new" * 5000
    (one.lower / "file").write_bytes(old)
    with (two.point / "file").open("rb", buffering=0) as held:
        assert os.pread(held.fileno(), 20_000, 0) == old
        assert os.pread(held.fileno(), 20_000, 0) == old
        assert two.statistics().hit_pages == 4
        segment.client("web1", create=False).mode = "off"
        with (one.point / "file").open("r+b", buffering=0) as file:
            file.write(new)
        assert the_pool(segment).statistics()["pages"] == 0
        assert os.pread(held.fileno(), 20_000, 0) == new
    assert (one.point / "file").read_bytes() == new == (two.point / "file").read_bytes()


def test_nothing_is_put_while_somebody_may_write(share: Share, segment: "_native.Segment") -> None:
    one, two = share("web1"), share("web2")
    path = one.lower / "file"
    path.write_bytes(b"1" * 8 * PAGE_SIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for place in (one, two):
            assert (place.point / "file").read_bytes() == b"1" * 8 * PAGE_SIZE
        mapped[:1] = b"2"
        for place in (one, two):
            assert (place.point / "file").read_bytes()[:2] == b"21"
        mapped[:1] = b"3"  # without a new stamp, if nothing has written the page back
        for place in (one, two):
            assert (place.point / "file").read_bytes()[:2] == b"31"
        assert the_pool(segment).statistics()["pages"] == 0
    for place in (one, two):
        assert (place.point / "file").read_bytes()[:2] == b"31"
    assert the_pool(segment).statistics()["pages"] == 8


def test_a_killed_mount_leaves_pages_that_are_right(share: Share, segment: "_native.Segment") -> None:
    one, two = share("web1"), share("web2")
    content = random.Random(3).randbytes(64 * PAGE_SIZE)
    (one.lower / "file").write_bytes(content)
    assert (one.point / "file").read_bytes() == content
    assert (two.point / "file").read_bytes() == content  # the last user
    one.kill()
    before = two.statistics()
    assert (two.point / "file").read_bytes() == content
    assert two.statistics().miss_pages == before.miss_pages == 0
    again = share("web1")
    assert (again.point / "file").read_bytes() == content
    assert again.statistics().lower_bytes == 0
    segment.reap()
    assert segment.check() == []


def test_the_pool_ends_with_its_last_mount(share: Share, segment: "_native.Segment") -> None:
    one, two = share("web1"), share("web2")
    content = random.Random(4).randbytes(16 * PAGE_SIZE)
    (one.lower / "file").write_bytes(content)
    assert (one.point / "file").read_bytes() == content == (two.point / "file").read_bytes()
    one.umount()
    assert segment.client("web1", create=False).authorised() == [UUID.bytes]  # for the next mount
    assert the_pool(segment, "web2").statistics()["pages"] == 16
    assert (two.point / "file").read_bytes() == content
    assert two.statistics().miss_pages == 0
    two.umount()
    assert [pool for client in segment.clients() for pool in client.pools()] == []
    assert segment.statistics()["ephemeral_pages"] == 0
    assert segment.check() == []


def test_a_client_that_may_not_share_is_told_how(
    segment: "_native.Segment", mounter: Mounter, eventually: Callable[..., None]
) -> None:
    segment.client("web")
    options = f"timeout=0,client=web,shared={UUID}"
    with pytest.raises((AttachError, ClaimError), match=f"tmem --name default authorise web {UUID}"):
        mounter(options)
    segment.client("web").authorise(UUID.bytes)
    place = mounter(options)
    (place.lower / "file").write_bytes(b"x" * 5000)
    assert place.statistics().pool_active
    segment.client("web").revoke(UUID.bytes)
    assert (place.point / "file").read_bytes() == b"x" * 5000
    eventually(lambda: not place.statistics().pool_active)
    segment.client("web").authorise(UUID.bytes)
    eventually(lambda: place.statistics().pool_active)


@pytest.mark.parametrize("word", ["shared=", "shared=x", f"shared={uuid.UUID(int=0)}"])
def test_a_uuid_that_is_none_is_refused(word: str) -> None:
    from tmem.fs.options import MountOptions

    with pytest.raises(TmemError, match="use shared=UUID"):
        MountOptions.parse([word], "/mnt")


def test_readers_of_one_mount_never_miss_a_write_of_the_other(
    share: Share, segment: "_native.Segment"
) -> None:
    """Writers count in the pages of a file and publish what they have closed; who opens then must see it."""
    one, two = share("web1"), share("web2")
    (one.lower / "file").write_bytes(bytes(4 * PAGE_SIZE))
    (one.lower.parent / "closed").write_bytes(bytes(32))
    code = """
import mmap, os, sys, time
path, closed, own = sys.argv[1], sys.argv[2], int(sys.argv[3])
descriptor = os.open(closed, os.O_RDWR)
shown = memoryview(mmap.mmap(descriptor, 32)).cast("Q")
last = [0] * 4
for count in range(1, 250):
    if own >= 0:
        file = os.open(path, os.O_RDWR)
        os.pwrite(file, count.to_bytes(8, "little") * 512, own * 4096)
        os.close(file)
        shown[own] = count
    for again in range(3):
        least = list(shown)
        file = os.open(path, os.O_RDONLY)
        data = os.pread(file, 4 * 4096, 0)
        data = os.pread(file, 4 * 4096, 0)
        os.close(file)
        for page in range(4):
            words = {data[at : at + 8] for at in range(page * 4096, page * 4096 + 4096, 8)}
            values = [int.from_bytes(word, "little") for word in words]
            assert max(values) - min(values) <= 1, values
            assert max(values) >= least[page], (page, values, least)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, place.point / "file", one.lower.parent / "closed", str(own)]
        )
        for place, own in [(one, 0), (two, 1), (two, -1)]
    ]
    choice = random.Random(6)
    clients = [segment.client(name, create=False) for name in ("web1", "web2")]
    try:
        while any(worker.poll() is None for worker in workers):
            choice.choice(clients).mode = choice.choice(["on", "on", "on", "frozen", "off"])
            one.statistics()
            two.statistics()
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.wait() for worker in workers] == [0] * 3
    for client in clients:
        client.mode = "on"
    for place in (one, two):
        assert (place.point / "file").read_bytes() == (one.lower / "file").read_bytes()
    assert two.statistics().hit_pages > 0
    assert segment.check() == []
