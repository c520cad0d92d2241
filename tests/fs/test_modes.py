"""A mount while its client, or the whole segment, is frozen or off: never a stale byte, and back at once."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
SetMode = Callable[[str], None]


@pytest.fixture(params=["loop=plain", "loop=fast", "loop=native"])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount with a pool of the client ``web``."""
    return mounter(f"timeout=0,client=web,{request.param}")


@pytest.fixture(params=["client", "segment"])
def set_mode(request: pytest.FixtureRequest, segment: "_native.Segment", place: Place) -> SetMode:
    """A function that sets the mode of the mount's client, or of everybody."""

    def set_it(mode: str) -> None:
        where = segment if request.param == "segment" else segment.client("web", create=False)
        where.mode = mode

    return set_it


def read_until_kept(place: Place, content: bytes | bytearray, *names: str) -> None:
    """Read files through the mount until all of it hits: an early read may find a version not trusted."""

    def kept() -> bool:
        before = place.statistics().hit_pages
        for name in names:
            assert (place.point / name).read_bytes() == content
        return place.statistics().hit_pages - before == len(names) * (len(content) // PAGE_SIZE)

    wait_until(kept, what=f"{names} are in the pool")


def pages(segment: "_native.Segment") -> int:
    """How many pages the mount has in its pool."""
    (pool,) = segment.client("web", create=False).pools()
    return pool.statistics()["pages"]


def test_off_in_the_midst_of_reads(place: Place, segment: "_native.Segment", set_mode: SetMode) -> None:
    content = random.Random(1).randbytes(2 * MIB)
    (place.lower / "file").write_bytes(content)
    turned_off, stop = threading.Event(), threading.Event()
    wrong: list[str] = []
    rounds_after = [0]

    def read() -> None:
        while not stop.is_set():
            was_off = turned_off.is_set()
            if (place.point / "file").read_bytes() != content:
                wrong.append("off" if was_off else "on")
            rounds_after[0] += was_off

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while place.statistics().hit_pages < 2000:
            assert reader.is_alive()
        set_mode("off")
        assert pages(segment) == 0
        hits = place.statistics().hit_pages
        turned_off.set()
        while rounds_after[0] < 3:
            assert reader.is_alive()
    finally:
        stop.set()
        reader.join()
    assert not wrong
    after = place.statistics()
    assert after.hit_pages == hits
    assert not after.pool_active
    assert pages(segment) == 0
    assert segment.check() == []


def test_writes_while_off_are_not_forgotten(
    place: Place, segment: "_native.Segment", set_mode: SetMode
) -> None:
    content = bytearray(random.Random(2).randbytes(64 * PAGE_SIZE))
    (place.lower / "file").write_bytes(content)
    (place.lower / "other").write_bytes(content)
    with (place.point / "file").open("r+b", buffering=0) as held:
        assert held.read() == content
        assert (place.point / "other").read_bytes() == content
        set_mode("off")
        content[5000:5003] = b"new"
        os.pwrite(held.fileno(), b"new", 5000)  # through the mount
        (place.lower / "other").write_bytes(content)  # underneath
        assert os.pread(held.fileno(), len(content), 0) == content
        set_mode("on")
        before = place.statistics()
        assert before.pool_active
        assert os.pread(held.fileno(), len(content), 0) == content
        read_until_kept(place, content, "file", "other")
        after = place.statistics()
    assert after.passthrough_reads == before.passthrough_reads
    assert segment.check() == []


def test_hits_go_on_while_frozen(place: Place, segment: "_native.Segment", set_mode: SetMode) -> None:
    content = random.Random(3).randbytes(16 * PAGE_SIZE)
    for name in ("file", "other"):
        (place.lower / name).write_bytes(content)
    read_until_kept(place, content, "file")
    set_mode("frozen")
    before = place.statistics()
    for _ in range(2):
        assert (place.point / "file").read_bytes() == content == (place.point / "other").read_bytes()
    after = place.statistics()
    assert after.hit_pages - before.hit_pages == 32
    assert after.put_pages == before.put_pages
    assert after.refused_pages - before.refused_pages == 32
    assert after.pool_active
    assert pages(segment) == 16
    set_mode("on")
    read_until_kept(place, content, "other")
    assert pages(segment) == 32


def test_writes_while_frozen_are_flushed(place: Place, segment: "_native.Segment", set_mode: SetMode) -> None:
    content = bytearray(random.Random(4).randbytes(16 * PAGE_SIZE))
    (place.lower / "file").write_bytes(content)
    read_until_kept(place, content, "file")
    set_mode("frozen")
    with (place.point / "file").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"new", 2 * PAGE_SIZE - 1)  # two pages
        content[2 * PAGE_SIZE - 1 : 2 * PAGE_SIZE + 2] = b"new"
        assert pages(segment) == 14
        assert file.read() == content
    assert (place.point / "file").read_bytes() == content
    os.truncate(place.point / "file", 4 * PAGE_SIZE)
    assert pages(segment) == 2
    set_mode("on")
    assert (place.point / "file").read_bytes() == content[: 4 * PAGE_SIZE]
    (place.point / "file").unlink()
    assert pages(segment) == 0


def test_the_stricter_mode_counts(place: Place, segment: "_native.Segment") -> None:
    (place.lower / "file").write_bytes(b"x" * 5000)
    client = segment.client("web", create=False)
    for own, common, active in [
        ("off", "on", False),
        ("on", "off", False),
        ("frozen", "off", False),
        ("on", "frozen", True),
        ("on", "on", True),
    ]:
        client.mode, segment.mode = own, common
        assert place.statistics().pool_active is active
        assert (place.point / "file").read_bytes() == b"x" * 5000


def test_a_client_destroyed_while_off_comes_back(
    place: Place, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    (place.lower / "file").write_bytes(b"x" * 5000)
    assert (place.point / "file").read_bytes() == b"x" * 5000
    client = segment.client("web", create=False)
    client.mode = "off"
    client.destroy()
    assert (place.point / "file").read_bytes() == b"x" * 5000
    eventually(lambda: place.statistics().pool_active)
    assert segment.client("web", create=False).held
    before = place.statistics()
    assert (place.point / "file").read_bytes() == b"x" * 5000 == (place.point / "file").read_bytes()
    # Both reads hit if the new pool was there for the one before.
    assert place.statistics().hit_pages - before.hit_pages in (2, 4)


def test_a_mount_begins_in_the_mode_that_is_set(segment: "_native.Segment", mounter: Mounter) -> None:
    segment.client("web").mode = "off"
    place = mounter("timeout=0,client=web")
    (place.lower / "file").write_bytes(b"x" * 5000)
    for _ in range(2):
        assert (place.point / "file").read_bytes() == b"x" * 5000
    assert place.statistics().hit_pages == 0
    place.umount()
    kept = segment.client("web", create=False)  # somebody has set something for it
    assert (kept.mode, kept.pools()) == ("off", [])


def test_a_mount_holds_its_client_as_long_as_it_lives(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web")
    client = segment.client("web", create=False)
    assert client.held
    assert client.statistics()["held"]
    place.kill()
    segment.reap()
    assert not client.held
    mounter("timeout=0,client=web")
    assert segment.client("web", create=False).held


@pytest.mark.parametrize("loop", ["plain", "native"])
def test_readers_and_writers_never_see_the_past_while_modes_change(
    segment: "_native.Segment", mounter: Mounter, loop: str
) -> None:
    """Processes write counters to the pages of one file and check that no page goes back, whatever the
    mode."""
    place = mounter(f"timeout=0,client=web,loop={loop}")
    (place.lower / "file").write_bytes(bytes(8 * PAGE_SIZE))
    code = """
import os, sys
path, own = sys.argv[1], int(sys.argv[2])
descriptor = os.open(path, os.O_RDWR)
last = [0] * 8
for count in range(1, 300):
    os.pwrite(descriptor, count.to_bytes(8, "little") * 512, own * 4096)
    for page in range(8):
        data = os.pread(descriptor, 4096, page * 4096)
        values = {int.from_bytes(data[at : at + 8], "little") for at in range(0, 4096, 8)}
        assert max(values) - min(values) <= 1, values
        assert max(values) >= last[page], (page, values, last)
        last[page] = max(values)
    assert last[own] == count
    if count % 10 == 0:
        os.close(descriptor)
        descriptor = os.open(path, os.O_RDWR)
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, place.point / "file", str(number)])
        for number in range(3)
    ]
    client = segment.client("web", create=False)
    choice = random.Random(5)
    flips = 0
    try:
        while any(worker.poll() is None for worker in workers):
            mode = choice.choice(["on", "on", "frozen", "off"])
            if choice.random() < 0.3:
                segment.mode = mode
            else:
                client.mode = mode
            flips += 1
            place.statistics()  # paces the flips: one request between them
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.wait() for worker in workers] == [0] * 3
    assert flips > 20
    client.mode = segment.mode = "on"
    for _ in range(2):
        assert (place.point / "file").read_bytes() == (place.lower / "file").read_bytes()
    statistics = place.statistics()
    assert statistics.hit_pages > 0 < statistics.passthrough_reads
    assert segment.check() == []
