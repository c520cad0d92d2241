"""Writers whose stamps do not tell: a version that is seen while one is there is not trusted."""

import mmap
import os
import threading
from pathlib import Path

import pytest

from tmem.fs.writers import is_quiet
from tmem.types import PAGE_SIZE

from .conftest import Mounter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    able = is_quiet(descriptor)
    os.close(descriptor)
    if able is None:
        pytest.skip(f"the file system of {tmp_path} has no leases")
    return path


def test_writers_are_seen_and_readers_are_not(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    with file.open("rb"):
        assert is_quiet(descriptor)
    with file.open("r+b") as writing:
        assert is_quiet(descriptor) is False
        mapped = mmap.mmap(writing.fileno(), PAGE_SIZE)
    assert is_quiet(descriptor) is False  # the mapping is enough
    mapped.close()
    assert is_quiet(descriptor)
    os.close(descriptor)


def test_a_descriptor_that_writes_asks_for_others(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    assert is_quiet(descriptor)
    with file.open("r+b"):
        assert is_quiet(descriptor) is False
    assert is_quiet(descriptor)
    os.close(descriptor)


def test_where_it_cannot_be_told() -> None:
    reading, writing = os.pipe()
    assert is_quiet(reading) is None
    os.close(reading)
    os.close(writing)


def test_asking_disturbs_nobody_who_opens_meanwhile(file: Path) -> None:
    """The one who asks is signalled when an open conflicts; it must not die of it."""
    descriptor = os.open(file, os.O_RDONLY)
    stop = threading.Event()

    def open_and_close() -> None:
        while not stop.is_set():
            os.close(os.open(file, os.O_RDWR))

    other = threading.Thread(target=open_and_close)
    other.start()
    answers = {is_quiet(descriptor) for _ in range(3000)}
    stop.set()
    other.join()
    os.close(descriptor)
    assert None not in answers


def test_a_store_to_a_mapped_page_after_an_open_shows_at_the_next(
    segment: object, mounter: Mounter, runtime_dir: Path
) -> None:
    """The second store to a page that is dirty already leaves no trace in the stamps; on tmpfs, where no
    writeback makes it clean in between."""
    place = mounter("timeout=0", lower=runtime_dir / "lower")
    path = place.lower / "file"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    assert (place.point / "file").read_bytes() == bytes(4 * PAGE_SIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0:5] = b"first"
        assert (place.point / "file").read_bytes()[:5] == b"first"
        mapped[0:5] = b"later"
        assert (place.point / "file").read_bytes()[:5] == b"later"
    assert (place.point / "file").read_bytes()[:5] == b"later"
    before = place.statistics().hit_pages
    assert (place.point / "file").read_bytes()[:5] == b"later"
    assert place.statistics().hit_pages - before == 4  # nobody writes any more


def test_an_open_during_a_long_write_does_not_keep_its_old_bytes(
    segment: object, mounter: Mounter, tmp_path: Path
) -> None:
    """A write(2) stamps the file when it begins: what is read of its end meanwhile is from before."""
    place = mounter("timeout=0")
    path = place.lower / "file"
    size = 64 << 20
    path.write_bytes(b"o" * size)

    def last_page() -> bytes:
        with (place.point / "file").open("rb", buffering=0) as file:
            return os.pread(file.fileno(), PAGE_SIZE, size - PAGE_SIZE)

    assert last_page() == b"o" * PAGE_SIZE
    overlapped = 0
    for number in range(30):
        data = bytes([number]) * size
        stamp = path.stat().st_mtime_ns
        with path.open("r+b", buffering=0) as file:
            writer = threading.Thread(target=file.write, args=(data,))
            writer.start()
            while path.stat().st_mtime_ns == stamp:
                pass  # it changes before the writer ends
            overlapped += last_page() != data[:PAGE_SIZE]
            writer.join()
        assert last_page() == data[:PAGE_SIZE]
        if overlapped == 3:
            break
    assert overlapped
