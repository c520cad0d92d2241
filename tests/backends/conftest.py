"""Fixtures for tests of the native store: small segments in a private directory on a tmpfs.

`directory` and `small` are per test. TMEM_LONG=1 makes the random tests run about forty times longer.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmem.backends import _native

from .demoting import MIB, Bench
from .places import Worker

SMALL_BYTES = 8 << 20
EFFORT = 40 if os.environ.get("TMEM_LONG") == "1" else 1
"""How often random tests repeat."""


@contextmanager
def flipped(path: Path, offset: int, bit: int) -> Iterator[None]:
    """Flip a bit of the file, and flip it back afterwards."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as bytes_:
        bytes_[offset] ^= 1 << bit
        yield
        bytes_[offset] ^= 1 << bit


@pytest.fixture
def directory() -> Iterator[Path]:
    """An empty directory on a tmpfs; segments left in it are destroyed, so that nobody keeps their memory."""
    made = Path(tempfile.mkdtemp(prefix="tmem-store-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def small(directory: Path) -> Iterator[_native.Segment]:
    """A fresh segment of 8 MiB, of which about 6.9 MiB hold pages; sound when the test ends."""
    segment = _native.create(str(directory / "small"), SMALL_BYTES)
    yield segment
    if segment.alive:
        assert segment.check() == []
    segment.close()


@pytest.fixture
def client(small: _native.Segment) -> _native.Client:
    return small.client("guest")


@pytest.fixture
def persistent(client: _native.Client) -> _native.Pool:
    return client.new_pool(persistent=True)


@pytest.fixture
def ephemeral(client: _native.Client) -> _native.Pool:
    return client.new_pool(persistent=False)


@pytest.fixture
def kept(client: _native.Client) -> _native.Pool:
    """An ephemeral pool whose gets leave the page."""
    return client.new_pool(persistent=False, exclusive=False)


@pytest.fixture
def bench(small: _native.Segment, tmp_path: Path) -> Iterator[Bench]:
    """A client with a spill file of 32 MiB, and its demotion."""
    made = Bench(small, tmp_path, 32 * MIB)
    yield made
    made.demotion.close()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    """Three processes that attach whatever segment they are told to."""
    made: list[Worker] = []
    try:
        made += [Worker() for _ in range(3)]
        yield made
    finally:
        for worker in made:
            worker.close()


@pytest.fixture
def effort() -> int:
    """How often random tests repeat."""
    return EFFORT
