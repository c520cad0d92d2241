"""Segments to save from and to restore into (the fixtures `source` and `target`), and their pages."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native, save
from tmem.types import PAGE_SIZE

Pages = dict[tuple[bytes, int], bytes]


@pytest.fixture
def source(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "source", 32 << 20)


@pytest.fixture
def target(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "target", 32 << 20)


def _segment(path: Path, size_bytes: int) -> Iterator[_native.Segment]:
    made = _native.create(str(path), size_bytes)
    yield made
    assert made.check() == []
    made.close()


def saved(source: _native.Segment, *names: str) -> bytes:
    """Save clients of `source`; the file's content."""
    with tempfile.TemporaryFile() as file:
        save.save(source, "source", file.fileno(), names)
        file.seek(0)
        return file.read()


def restored(
    target: _native.Segment, content: bytes, *names: str, called: str | None = None
) -> save.Restored:
    """Restore clients of a save file with that content."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        return save.restore(target, "target", file.fileno(), "the file", names, called)


def put_all(pool: _native.Pool, pages: Pages) -> None:
    for (object_id, index), data in pages.items():
        assert pool.put(object_id, index, data) == 1


def get_all(pool: _native.Pool, pages: Pages) -> Pages:
    """Return what is there of the handles of `pages`."""
    found = {}
    buffer = bytearray(PAGE_SIZE)
    for object_id, index in pages:
        if pool.get(object_id, index, buffer):
            found[object_id, index] = bytes(buffer)
    return found


def persistent(segment: _native.Segment, name: str = "one") -> _native.Pool:
    (found,) = [pool for pool in segment.client(name, create=False).pools() if pool.persistent]
    return found
