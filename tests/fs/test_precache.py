"""The precache: what was read is served from the pool, and never when the lower file has changed."""

import ctypes
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.errors import AttachError
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20


def pools(segment: "_native.Segment", client: str) -> list["_native.Pool"]:
    return [pool for found in segment.clients() if found.name == client for pool in found.pools()]


@pytest.fixture(params=["loop=plain", "loop=fast", "loop=native", "cache=kernel"])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount with a pool of the client ``web``."""
    place = mounter(f"timeout=0,client=web,{request.param}")
    place.kernel_caches = request.param == "cache=kernel"
    return place


def read(path: Path) -> bytes:
    return path.read_bytes()


def drop_kernel_copy(path: Path) -> None:
    """Make the kernel forget what it caches of a file in the mount, so that the next read asks the daemon."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_the_second_read_comes_from_the_pool_and_not_from_the_lower_file(place: Place) -> None:
    content = random.Random(1).randbytes(4 * MIB + 5)
    (place.lower / "file").write_bytes(content)
    assert read(place.point / "file") == content
    first = place.has_put(1025)
    assert first.miss_pages + first.ahead_pages == 1025
    drop_kernel_copy(place.point / "file")
    read_before = place.read_by_daemon()
    assert read(place.point / "file") == content
    second = place.statistics()
    assert second.hit_pages - first.hit_pages >= 1025  # more where a request begins within a page
    assert second.miss_pages == first.miss_pages
    assert second.lower_bytes == first.lower_bytes
    assert place.read_by_daemon() - read_before < MIB  # requests, not content


@pytest.mark.parametrize("cached", [False, True])
def test_the_lower_file_does_not_stay_in_the_page_cache(place: Place, cached: bool) -> None:
    path = place.lower / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_SYNC)  # dirty pages cannot be dropped
    source = random.Random(1)
    for _ in range(512):  # page by page: the kernel drops a large folio only as a whole
        os.write(descriptor, source.randbytes(PAGE_SIZE))
    # A machine may reclaim what it takes for cold (DAMON) while this is written.
    wait_until(lambda: len(os.pread(descriptor, 512 * PAGE_SIZE, 0)) > 0 and cached_pages(descriptor) == 512)
    if not cached:
        wait_until(lambda: dropped(descriptor), what="the kernel has let go of what was just written")
    read(place.point / "file")
    place.has_put(512)
    wait_until(lambda: cached_pages(descriptor) == 0)
    os.close(descriptor)


def test_pages_read_one_by_one_are_right_and_do_not_stay_either(place: Place) -> None:
    """Whether they were in the page cache, on the disk alone, or written and not on the disk yet."""
    pages, path = 256, place.lower / "file"
    content = bytearray(random.Random(1).randbytes(pages * PAGE_SIZE - 100))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_SYNC)
    for start in range(0, len(content), PAGE_SIZE):  # else the kernel drops a large folio only as a whole
        os.write(descriptor, content[start : start + PAGE_SIZE])
    wait_until(lambda: dropped(descriptor), what="the kernel has let go of what was just written")
    other = random.Random(2).randbytes(PAGE_SIZE)
    with path.open("r+b", buffering=0) as written:
        for page in range(3, pages - 1, 16):
            os.pwrite(written.fileno(), other, page * PAGE_SIZE)
            content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = other
    place.read_reports()
    order = random.Random(3).sample(range(pages), pages)
    with (place.point / "file").open("rb", buffering=0) as file:
        for page in order:
            start = page * PAGE_SIZE
            assert os.pread(file.fileno(), PAGE_SIZE, start) == content[start : start + PAGE_SIZE], page
    place.has_put(pages)
    assert cached_pages(descriptor) <= pages // 16 + 1  # what is not on the disk yet has to stay
    os.close(descriptor)


def dropped(descriptor: int) -> bool:
    """Ask the kernel to forget what it caches of a file; say whether it has."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_pages(descriptor) == 0


def cached_pages(descriptor: int) -> int:
    """Return how many pages of a file the kernel caches (mincore(2), which Python does not have)."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = os.fstat(descriptor).st_size
    present = (ctypes.c_ubyte * -(-size // PAGE_SIZE))()
    with mmap.mmap(descriptor, size) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), present)
        del anchor
    assert result == 0
    return sum(value & 1 for value in present)


def test_a_change_underneath_shows_at_the_next_open(place: Place) -> None:
    path = place.lower / "file"
    for number in range(8):  # as quickly as can be, same size: only the time stamp can tell
        content = random.Random(number).randbytes(3 * PAGE_SIZE + 1)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(content)
        assert read(place.point / "file") == content
        assert read(place.point / "file") == content


def test_a_file_replaced_underneath_shows_at_the_next_open(place: Place, tmp_path: Path) -> None:
    (place.lower / "file").write_bytes(b"old" * 5000)
    assert read(place.point / "file") == b"old" * 5000
    (place.lower / "new").write_bytes(b"new" * 5000)
    (place.lower / "new").rename(place.lower / "file")
    assert read(place.point / "file") == b"new" * 5000


def test_an_inode_number_that_is_used_again_is_another_file(place: Place) -> None:
    for number in range(20):
        content = b"%d" % number * 3000
        (place.lower / "file").write_bytes(content)
        assert read(place.point / "file") == content
        (place.lower / "file").unlink()


def test_own_writes_drop_only_what_they_touch(place: Place) -> None:
    content = bytearray(random.Random(1).randbytes(64 * PAGE_SIZE))
    (place.lower / "file").write_bytes(content)
    assert read(place.point / "file") == content
    with (place.point / "file").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"new", 10 * PAGE_SIZE + 5)
        content[10 * PAGE_SIZE + 5 : 10 * PAGE_SIZE + 8] = b"new"
    before = place.statistics()
    assert before.flushed_pages == 1
    drop_kernel_copy(place.point / "file")
    assert read(place.point / "file") == content
    after = place.statistics()
    assert after.foreign_changes == 0
    if not place.kernel_caches:
        assert after.miss_pages - before.miss_pages == 54  # from the flushed page on, in one request
    assert after.hit_pages > before.hit_pages


def test_changes_of_names_and_attributes_keep_the_pages(place: Place) -> None:
    path = place.point / "file"
    (place.lower / "file").write_bytes(b"x" * 10 * PAGE_SIZE)
    read(path)
    path.chmod(0o600)
    os.utime(path, ns=(1, 2))
    os.link(path, place.point / "second")
    path.rename(place.point / "renamed")
    (place.point / "second").unlink()
    drop_kernel_copy(place.point / "renamed")
    before = place.statistics()
    read(place.point / "renamed")
    after = place.statistics()
    assert (after.miss_pages, after.foreign_changes) == (before.miss_pages, 0)
    assert after.hit_pages - before.hit_pages == 10


def test_truncation_through_the_mount(place: Place) -> None:
    path = place.point / "file"
    path.write_bytes(b"x" * 10 * PAGE_SIZE)
    read(path)
    os.truncate(path, 5000)
    assert read(path) == b"x" * 5000
    os.truncate(path, 20_000)
    assert read(path) == b"x" * 5000 + bytes(15_000)
    path.write_bytes(b"short")
    assert read(path) == b"short" == read(path)


def test_holes_and_empty_files(place: Place) -> None:
    with (place.lower / "file").open("wb") as file:
        file.truncate(3 * MIB)
        file.seek(MIB)
        file.write(b"island")
    expected = bytes(MIB) + b"island" + bytes(2 * MIB - 6)
    (place.lower / "empty").touch()
    for _ in range(2):
        assert read(place.point / "file") == expected
        assert read(place.point / "empty") == b""


def test_removed_files_leave_no_pages(place: Place, segment: "_native.Segment") -> None:
    for name in ("unlinked", "replaced", "other"):
        (place.point / name).write_bytes(b"x" * 10 * PAGE_SIZE)
        read(place.point / name)
    with (place.point / "unlinked").open("rb") as file:
        (place.point / "unlinked").unlink()
        assert file.read() == b"x" * 10 * PAGE_SIZE  # puts again
    (place.point / "other").rename(place.point / "replaced")
    wait_until(lambda: pool_pages(segment) == 10)


def pool_pages(segment: "_native.Segment") -> int:
    (pool,) = pools(segment, "web")
    return pool.statistics()["pages"]


def test_unmounting_destroys_the_pool_and_the_client(place: Place, segment: "_native.Segment") -> None:
    (place.lower / "file").write_bytes(b"x" * PAGE_SIZE)
    read(place.point / "file")
    assert len(pools(segment, "web")) == 1
    place.umount()
    assert [client.name for client in segment.clients()] == []
    assert segment.check() == []


def test_a_killed_daemon_leaves_nothing_that_is_served(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web")
    path = place.lower / "file"
    path.write_bytes(b"old" * 5000)
    read(place.point / "file")
    stamps = path.stat()
    place.kill()
    path.write_bytes(b"new" * 5000)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    place = mounter("timeout=0,client=web")
    assert read(place.point / "file") == b"new" * 5000
    assert place.statistics().hit_pages == 0
    assert len(pools(segment, "web")) == 1
    segment.reap()
    assert segment.check() == []


def test_a_segment_that_appears_is_used_and_one_that_ends_is_not_missed(
    runtime_dir: Path, mounter: Mounter
) -> None:
    from tmem.backends import _native

    place = mounter("timeout=0,client=web")
    content = random.Random(1).randbytes(MIB)
    (place.lower / "file").write_bytes(content)
    with (place.point / "file").open("rb", buffering=0) as held:
        for _ in range(2):
            assert read(place.point / "file") == content
            assert not place.statistics().pool_active
            segment = _native.create(str(runtime_dir / "default"), 64 << 20)
            wait_until(lambda: place.statistics().pool_active)
            before = place.statistics()
            assert read(place.point / "file") == content == read(place.point / "file")
            assert os.pread(held.fileno(), MIB, 0) == content
            assert place.statistics().hit_pages - before.hit_pages >= 512
            segment.close()
            _native.destroy(str(runtime_dir / "default"))
            assert os.pread(held.fileno(), MIB, 0) == content


def test_a_client_destroyed_by_the_administrator_comes_back_empty(
    segment: "_native.Segment", mounter: Mounter
) -> None:
    place = mounter("timeout=0,client=web")
    (place.lower / "file").write_bytes(b"x" * 5000)
    read(place.point / "file")
    segment.client("web", create=False).destroy()
    assert read(place.point / "file") == b"x" * 5000
    wait_until(lambda: place.statistics().pool_active)
    assert read(place.point / "file") == read(place.point / "file") == b"x" * 5000


def test_a_damaged_segment_is_passed_by(runtime_dir: Path, mounter: Mounter) -> None:
    (runtime_dir / "default").write_bytes(b"no segment" * 10_000)
    place = mounter("timeout=0")
    (place.lower / "file").write_text("x")
    assert (place.point / "file").read_text() == "x"
    assert not place.statistics().pool_active


def test_a_daemon_that_is_just_ending_is_waited_for(segment: "_native.Segment", mounter: Mounter) -> None:
    """One that was killed lets go of its mount, which is swept, a moment before it lets go of its client."""
    held = f"_lock_client({segment.path!r}, 'web', {segment.client('web').id})"
    script = (
        f"import time; from tmem.fs.precache import _lock_client; {held}; print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as dying:
        assert dying.stdout is not None
        dying.stdout.readline()
        ending = threading.Timer(0.3, dying.kill)
        ending.start()
        place = mounter("client=web")
        ending.join()
    assert place.statistics().pool_active


def test_a_client_has_one_mount_at_a_time(
    segment: "_native.Segment", mounter: Mounter, tmp_path: Path
) -> None:
    mounter("client=web")
    with pytest.raises(AttachError, match="used by another mount: mount with -o client=NAME"):
        mounter("client=web", lower=tmp_path / "l2", point=tmp_path / "m2")
    segment.client("disk").new_pool(persistent=True)
    with pytest.raises(AttachError, match="has a swap device: mount with -o client=NAME"):
        mounter("client=disk", lower=tmp_path / "l2", point=tmp_path / "m2")
    assert len(pools(segment, "disk")) == 1
    mounter("client=web2", lower=tmp_path / "l2", point=tmp_path / "m2")


def test_a_file_larger_than_the_segment_is_still_right(runtime_dir: Path, mounter: Mounter) -> None:
    from tmem.backends import _native

    segment = _native.create(str(runtime_dir / "default"), 8 << 20)
    place = mounter("timeout=0")
    content = random.Random(1).randbytes(12 * MIB)
    (place.lower / "file").write_bytes(content)
    assert read(place.point / "file") == content == read(place.point / "file")
    assert segment.check() == []
    segment.close()
    _native.destroy(str(runtime_dir / "default"))


@pytest.mark.parametrize("loop", ["plain", "fast"])
def test_writers_and_readers_of_one_file_at_once_never_see_the_past(
    segment: "_native.Segment", mounter: Mounter, loop: str
) -> None:
    """Several processes write counters to the pages of one file and check that they never go back."""
    place = mounter(f"timeout=0,loop={loop}")
    (place.lower / "file").write_bytes(bytes(8 * PAGE_SIZE))
    code = """
import os, sys
path, own = sys.argv[1], int(sys.argv[2])
descriptor = os.open(path, os.O_RDWR)
last = [0] * 8
for count in range(1, 150):
    os.pwrite(descriptor, count.to_bytes(8, "little") * 512, own * 4096)
    for page in range(8):
        data = os.pread(descriptor, 4096, page * 4096)
        seen = {data[at : at + 8] for at in range(0, 4096, 8)}
        values = [int.from_bytes(value, "little") for value in seen]
        assert max(values) - min(values) <= 1, values
        assert max(values) >= last[page], (page, values, last)
        last[page] = max(values)
    assert last[own] == count
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, place.point / "file", str(number)])
        for number in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
