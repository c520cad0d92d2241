"""The segment file from outside: foreign, damaged, cut short, on a full file system, destroyed under others.

Always a clear error, never a crash. `test_damaged_blocks` is about what is inside.
"""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError, SegmentError
from tmem.types import PAGE_SIZE

from . import operations as op
from .conftest import SMALL_BYTES, flipped
from .pages import oid, page, pages
from .places import Worker

HEADER_BYTES = 112
"""The part of the superblock that never changes: magic, version, ABI, geometry, checksum."""
OBJECT = oid(1)


def closed_segment(directory: Path) -> Path:
    """Return the path of a sound segment that nobody has attached."""
    path = directory / "segment"
    segment = _native.create(str(path), SMALL_BYTES)
    op.put(segment, op.new_pool(segment, "a", persistent=True), OBJECT, 0, page("text", 1))
    segment.close()
    return path


def refused(path: Path, message: str) -> None:
    """Neither attach nor destroy accepts the file; what they say has one line and names it; it stays."""
    before = path.read_bytes() if path.is_file() else None
    for call in (_native.attach, _native.destroy):
        with pytest.raises(SegmentError, match=message) as caught:
            call(str(path))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


# What is no segment.


@pytest.mark.parametrize("content", [b"", b"\0", b"tmemseg\n", b"#!/bin/sh\n" * 2000, bytes(SMALL_BYTES)])
def test_foreign_file(directory: Path, content: bytes) -> None:
    path = directory / "foreign"
    path.write_bytes(content)
    refused(path, "not a tmem segment")


def test_random_files(directory: Path) -> None:
    rng = random.Random(3)
    for size in (1, 112, 4096, 8192, 100_000):
        path = directory / f"random-{size}"
        path.write_bytes(rng.randbytes(size))
        refused(path, "not a tmem segment")


def test_nothing_there(directory: Path) -> None:
    refused(directory / "nothing", "does not exist; create it")
    with pytest.raises(SegmentError):
        _native.attach(str(directory / "no" / "such" / "directory"))


def test_fifo_does_not_block(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    refused(directory / "fifo", "not a tmem segment")


@pytest.mark.parametrize("call", [_native.attach, _native.destroy])
def test_directory_and_symbolic_link(directory: Path, call: Callable[[str], object]) -> None:
    path = closed_segment(directory)
    (directory / "link").symlink_to(path)
    for name in ("", "link"):
        with pytest.raises(OSError, match=re.escape(str(directory / name))):
            call(str(directory / name))
    _native.attach(str(path)).close()


def test_no_permission(directory: Path) -> None:
    path = closed_segment(directory)
    lines = ["import os", "from tmem.backends import _native", f"_native.attach({str(path)!r})"]
    if os.geteuid() == 0:
        directory.chmod(0o755)
        lines[2:2] = ["os.setgroups([])", "os.setgid(65534)", "os.setuid(65534)"]
    else:
        path.chmod(0)
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"PermissionError: [Errno 13] Permission denied: '{path}'" in result.stderr
    assert path.stat().st_mode & 0o077 == 0


# A header that is damaged, a file that is cut.


def test_every_bit_of_the_header(directory: Path) -> None:
    path = closed_segment(directory)
    for offset in range(HEADER_BYTES):
        message = "not a tmem segment"
        if offset >= 8:
            message = "another version of tmem"
        if offset >= 12:
            message = "built for another C library"
        if offset >= 16:
            message = "damaged header"
        for bit in range(8):
            with flipped(path, offset, bit), pytest.raises(SegmentError, match=message):
                _native.attach(str(path))
    with _attached(path) as segment:
        assert segment.check() == []


@contextmanager
def _attached(path: Path) -> Iterator[_native.Segment]:
    segment = _native.attach(str(path))
    try:
        yield segment
    finally:
        segment.close()


def test_another_version(directory: Path) -> None:
    path = closed_segment(directory)
    with path.open("r+b") as file:
        file.seek(8)
        file.write((_native.VERSION + 1).to_bytes(4, sys.byteorder))
    refused(path, "another version of tmem")


def test_cut_short(directory: Path) -> None:
    path = closed_segment(directory)
    whole = path.stat().st_size
    for size in (whole - 1, whole - 65536, whole // 2, 1 << 20, 65536, 16384):
        os.truncate(path, size)
        refused(path, "cut short")
    for size in (8191, 4096, 113, 112, 8, 1, 0):
        os.truncate(path, size)
        refused(path, "cut short|not a tmem segment")


def test_longer_than_it_should_be(directory: Path) -> None:
    path = closed_segment(directory)
    os.truncate(path, path.stat().st_size + 12345)
    with _attached(path) as segment:
        assert segment.check() == []


# Creation.


def test_creation_refuses_what_exists(directory: Path) -> None:
    path = closed_segment(directory)
    before = path.read_bytes()
    (directory / "dir").mkdir()
    (directory / "link").symlink_to(directory / "elsewhere")
    for name in ("segment", "dir", "link"):
        with pytest.raises(FileExistsError):
            _native.create(str(directory / name), SMALL_BYTES)
    assert path.read_bytes() == before
    assert sorted(p.name for p in directory.iterdir()) == ["dir", "link", "segment"]


@pytest.mark.parametrize("size", [0, 1, 4096, SMALL_BYTES - 1, 2**40, 2**63])
def test_creation_refuses_sizes(directory: Path, size: int) -> None:
    with pytest.raises(SegmentError, match=r"at least 8M|at most 512G"):
        _native.create(str(directory / "segment"), size)
    assert list(directory.iterdir()) == []


def test_created_file(directory: Path) -> None:
    segment = _native.create(str(directory / "segment"), (8 << 20) + 12345)
    info = (directory / "segment").stat()
    assert info.st_mode & 0o7777 == 0o600
    assert info.st_size <= segment.memory_bytes == (8 << 20) + 12345
    assert info.st_blocks * 512 < 2 << 20
    segment.close()


@pytest.fixture
def tmpfs(directory: Path, root: None) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of a given size; a function, once."""
    point = directory / "tmpfs"

    def mount(size: str) -> Path:
        point.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", point], check=True)
        return point

    yield mount
    if point.is_mount():
        subprocess.run(["umount", point], check=True)


def test_creation_on_a_full_file_system(tmpfs: Callable[[str], Path]) -> None:
    point = tmpfs("512k")
    with pytest.raises(SegmentError, match="does not fit"):
        _native.create(str(point / "segment"), SMALL_BYTES)
    assert list(point.iterdir()) == []


def test_file_system_fills_up_later(tmpfs: Callable[[str], Path], workers: list[Worker]) -> None:
    """No SIGBUS: a put is refused after ephemeral pages made what room they could; the rest is intact."""
    point, worker = tmpfs("6m"), workers[0]
    segment = _native.create(str(point / "segment"), 64 << 20)
    segment.close()
    worker.attach(point / "segment")
    persistent = worker.do(op.new_pool, "a", persistent=True)
    ephemeral = worker.do(op.new_pool, "a", persistent=False, exclusive=False)
    data = pages("random", 0, 2000)
    assert worker.do(op.put, persistent, OBJECT, 0, b"".join(data[:100])) == 100
    assert worker.do(op.put, ephemeral, OBJECT, 0, b"".join(data)) == 2000
    stored = worker.do(op.put, persistent, OBJECT, 100, b"".join(data[100:]), keep_old=True)
    assert 700 < stored < 1200
    assert worker.do(op.statistics, ephemeral)["pages"] == 0
    assert worker.do(op.get, persistent, OBJECT, 0, 2000) == data[: 100 + stored]
    assert worker.do(op.flush, persistent, OBJECT, 0, 50) == 50
    assert worker.do(op.put, persistent, OBJECT, 500_000, data[0]) == 1
    segment = _native.attach(str(point / "segment"))
    assert segment.check() == []
    segment.close()
    worker.close()


# Destruction.


def test_destroyed_under_others(directory: Path, workers: list[Worker]) -> None:
    path = directory / "segment"
    segment = _native.create(str(path), SMALL_BYTES)
    where = op.new_pool(segment, "a", persistent=True)
    pool = op.find(segment, where)
    assert op.put(segment, where, OBJECT, 0, b"".join(pages("random", 0, 800))) == 800
    workers[0].attach(path)
    assert workers[0].do(op.get, where, OBJECT, 5) == [page("random", 5)]
    with path.open("rb") as file:
        assert os.fstat(file.fileno()).st_blocks * 512 > 4 << 20
        _native.destroy(str(path))
        assert not path.exists()
        with pytest.raises(PoolError, match="destroyed"):
            workers[0].do(op.get, where, OBJECT, 5)
        with pytest.raises(PoolError, match="destroyed"):
            workers[0].do(op.flush_object, where, OBJECT)
        for attempt in (
            lambda: pool.put(OBJECT, 0, page("text", 0)),
            lambda: pool.put(OBJECT, 0, b"".join(pages("text", 0, 40))),
            lambda: pool.get(OBJECT, 0, bytearray(PAGE_SIZE)),
            lambda: pool.flush(OBJECT, 0),
            lambda: pool.flush_object(OBJECT),
            lambda: pool.present(OBJECT, 0, 10),
            pool.statistics,
            pool.destroy,
            lambda: segment.client("b"),
            lambda: segment.client("a").new_pool(persistent=True),
            segment.check,
            lambda: segment.populate(1 << 20),
            lambda: _native.Device(pool, OBJECT, 1 << 20).pread(None, bytearray(512), 0, 0),
        ):
            with pytest.raises(PoolError, match="destroyed"):
                attempt()
        assert not segment.alive
        assert not pool.alive
        assert os.fstat(file.fileno()).st_blocks * 512 < 2 << 20
    segment.close()
    with pytest.raises(SegmentError, match="closed"):
        pool.get(OBJECT, 0, bytearray(PAGE_SIZE))


def test_a_new_one_at_the_same_path(directory: Path) -> None:
    path = directory / "segment"
    old = _native.create(str(path), SMALL_BYTES)
    old_pool = old.client("a").new_pool(persistent=True)
    _native.destroy(str(path))
    new = _native.create(str(path), SMALL_BYTES)
    new_pool = new.client("a").new_pool(persistent=True)
    assert new_pool.put(OBJECT, 0, page("text", 1)) == 1
    with pytest.raises(PoolError):
        old_pool.put(OBJECT, 0, page("text", 2))
    old.close()
    buffer = bytearray(PAGE_SIZE)
    assert new_pool.get(OBJECT, 0, buffer) == 1
    assert bytes(buffer) == page("text", 1)
    new.close()
