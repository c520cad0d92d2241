"""What real mounts read ahead, and what is left of it."""

import ctypes
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

SIZE = 3000 * PAGE_SIZE + 5


@pytest.fixture(params=["loop=auto", "loop=fast", "loop=plain", "cache=kernel"])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount with a pool that has room for read-ahead of 2 MiB."""
    place = mounter(f"timeout=0,client=web,{request.param}")
    place.kernel_caches = request.param == "cache=kernel"
    return place


def stored_file(place: Place) -> bytes:
    """Make a file whose pages are not in the page cache; its content."""
    content = random.Random(1).randbytes(SIZE)
    path = place.lower / "file"
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return content


def cached_pages(path: Path) -> int:
    """Return how many pages of a file the kernel caches."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        present = (ctypes.c_ubyte * -(-len(mapped) // PAGE_SIZE))()
        address = ctypes.c_void_p()
        libc = ctypes.CDLL(None, use_errno=True)
        view = np.frombuffer(mapped, np.uint8)
        address.value = view.ctypes.data
        assert libc.mincore(address, ctypes.c_size_t(len(mapped)), present) == 0
        del view
        return sum(value & 1 for value in present)


@pytest.mark.parametrize("request_bytes", [PAGE_SIZE, 10_000, 128 << 10, 1 << 20])
def test_a_stream_misses_twice_and_is_right(
    place: Place, request_bytes: int, eventually: Callable[..., None]
) -> None:
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        found = b"".join(iter(lambda: file.read(request_bytes), b""))
    assert found == content
    eventually(lambda: place.statistics().put_pages >= 3001)  # see Place.has_put
    counted = place.statistics()
    if place.kernel_caches:  # it reads ahead by itself, in several requests at once
        assert counted.ahead_pages > 0
    else:
        assert counted.ahead_pages > 2000
        assert counted.miss_pages + counted.ahead_pages == 3001
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_random_reads_and_small_files_read_nothing_ahead(place: Place) -> None:
    content = stored_file(place)
    (place.lower / "small").write_bytes(content[:100_000])
    choice = random.Random(2)
    with (place.point / "file").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # as to the kernel's own
        for _ in range(200):
            at = choice.randrange(1500) * 2 * PAGE_SIZE  # never two that follow each other
            assert os.pread(file.fileno(), PAGE_SIZE, at) == content[at : at + PAGE_SIZE]
    assert (place.point / "small").read_bytes() == content[:100_000]
    assert place.statistics().ahead_pages == 0
    assert cached_pages(place.lower / "file") == 0


def test_a_reader_that_stops_leaves_little_behind(place: Place, eventually: Callable[..., None]) -> None:
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        for number in range(4):
            start = number * 16 * PAGE_SIZE
            assert os.pread(file.fileno(), 16 * PAGE_SIZE, start) == content[start : start + 16 * PAGE_SIZE]
    assert 0 < place.statistics().put_pages < 1000
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_a_stream_beside_random_readers(place: Place, eventually: Callable[..., None]) -> None:
    """Through one open file, half of whose pages are there: it is read ahead of all the same."""
    content = stored_file(place)
    choice = random.Random(5)
    there = {page for page in range(3001) if choice.random() < 0.5}
    with (place.point / "file").open("rb", buffering=0) as file:
        if not place.kernel_caches:
            for page in there:
                os.pread(file.fileno(), 1, page * PAGE_SIZE)
        before = place.statistics()
        for at in range(0, SIZE, 16 * PAGE_SIZE):
            assert os.pread(file.fileno(), 16 * PAGE_SIZE, at) == content[at : at + 16 * PAGE_SIZE]
            for _ in range(3):
                page = choice.choice([page for page in there if page < 16 + at // PAGE_SIZE]) if there else 0
                found = os.pread(file.fileno(), PAGE_SIZE, page * PAGE_SIZE)
                assert found == content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    eventually(lambda: place.statistics().put_pages >= 3001)
    counted = place.statistics()
    if not place.kernel_caches:
        misses = counted.miss_reads - before.miss_reads
        assert misses < 12
        assert counted.put_pages < 3001 + 16 * misses  # each reads and puts all from its first miss on
        assert counted.ahead_pages > 1300
    eventually(lambda: cached_pages(place.lower / "file") == 0)


def test_writes_to_what_is_read_ahead_show(place: Place) -> None:
    content = bytearray(stored_file(place))
    choice = random.Random(3)
    with (place.point / "file").open("r+b", buffering=0) as file:
        at = 0
        while at < SIZE:
            assert os.pread(file.fileno(), 32 * PAGE_SIZE, at) == content[at : at + 32 * PAGE_SIZE]
            at += 32 * PAGE_SIZE
            where = min(at + choice.randrange(64) * PAGE_SIZE + 100, SIZE - 10)
            os.pwrite(file.fileno(), b"new bytes", where)
            content[where : where + 9] = b"new bytes"
    assert (place.point / "file").read_bytes() == content == (place.lower / "file").read_bytes()
    assert place.statistics().ahead_pages > 0


def test_a_restart_in_the_middle_of_a_stream(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web")
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        half = SIZE // 2 // PAGE_SIZE * PAGE_SIZE
        assert file.read(half) == content[:half]
        place.restart()
        assert file.readall() == content[half:]
    assert segment.check() == []


def test_nothing_is_read_ahead_when_told_so(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web,read_ahead=0")
    content = stored_file(place)
    with (place.point / "file").open("rb", buffering=0) as file:
        assert b"".join(iter(lambda: file.read(128 << 10), b"")) == content
    assert (place.statistics().ahead_pages, place.statistics().miss_pages) == (0, 3001)


def test_a_mount_never_has_more_than_its_cap(segment: "_native.Segment", mounter: Mounter) -> None:
    """A client sees what is used at every moment; it never is more than the cap, to the byte."""
    cap = 3_000_000
    segment.client("web").cap_bytes = cap
    place = mounter("timeout=0,client=web")
    client = segment.client("web", create=False)
    content = stored_file(place)
    most = 0
    with (place.point / "file").open("rb", buffering=0) as file:
        while data := file.read(64 << 10):
            start = file.tell() - len(data)
            assert data == content[start : start + len(data)]
            most = max(most, client.statistics()["used_bytes"])
    assert cap * 0.9 < most <= cap
    assert segment.check() == []


def test_nothing_stays_in_the_page_cache_however_it_was_read(
    place: Place, eventually: Callable[..., None]
) -> None:
    content = stored_file(place)
    (place.lower / "small").write_bytes(content[:5000])
    os.sync()
    with (place.lower / "small").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (place.point / "small").read_bytes() == content[:5000]
    with (place.point / "file").open("rb", buffering=0) as raw:
        for start, size in ((0, 1), (PAGE_SIZE - 1, 2), (700_001, 1 << 20), (SIZE - 3, 10), (9_000_000, 9)):
            assert os.pread(raw.fileno(), size, start) == content[start : start + size]
    assert cached_pages(place.lower / "small") == 0
    eventually(
        lambda: cached_pages(place.lower / "file") == 0
    )  # the kernel's own read-ahead may be under way
    with (
        (place.point / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        for start in (2_000_000, 11_000_000, 2_300_000):
            assert mapped[start : start + 10_000] == content[start : start + 10_000]
        assert mapped[:] == content
    eventually(lambda: cached_pages(place.lower / "file") == 0)
