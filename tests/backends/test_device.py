"""A block device on a pool: bytes in, the same bytes out, whatever the offsets, lengths and other writers.

The device's callbacks are called as nbdkit does; nbdkit itself is the business of ``tests/nbd``.
"""

import errno
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .activities import write_stripe
from .conftest import EFFORT
from .pages import oid, page, pages
from .places import Worker

OBJECT = oid(4)
SIZE_BYTES = 70 * PAGE_SIZE + 1234
FLAG_REQ_ONE = 4
HOLE_ZERO = 3

edges = st.builds(
    lambda number, near: min(max(number * PAGE_SIZE + near, 0), SIZE_BYTES),
    st.integers(0, 71),
    st.one_of(st.just(0), st.integers(-3, 3), st.sampled_from((512, 1024, -512)), st.integers(0, PAGE_SIZE)),
)
requests = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "write", "zero", "trim", "read", "extents")),
        edges,
        edges,
        st.sampled_from(("random", "text", "zero", "word32")),
    ),
    max_size=30,
)


@pytest.fixture
def pool(small: _native.Segment) -> _native.Pool:
    return small.client("disk").new_pool(persistent=True)


@pytest.fixture
def device(pool: _native.Pool) -> _native.Device:
    return _native.Device(pool, OBJECT, SIZE_BYTES)


def read(device: _native.Device, start: int = 0, end: int | None = None) -> bytes:
    buffer = bytearray(b"?" * ((device.size_bytes if end is None else end) - start))
    device.pread(None, buffer, start, 0)
    return bytes(buffer)


def content(kind: str, length: int, seed: int) -> bytes:
    return b"".join(pages(kind, seed, length // PAGE_SIZE + 1))[:length]


def check_extents(device: _native.Device, start: int, end: int, expected: bytes | bytearray) -> None:
    """Extents cover the range without gap; holes are zero; what is written and not zero is data."""
    at = start
    for offset, length, kind in device.extents(None, end - start, start, 0):
        assert offset == at
        assert length > 0
        assert kind in (0, HOLE_ZERO)
        assert kind == 0 or not any(expected[offset : offset + length])
        at += length
    assert at == end
    if end > start:
        every = device.extents(None, end - start, start, 0)
        assert all(one[2] != other[2] for one, other in pairwise(every))
        assert device.extents(None, end - start, start, FLAG_REQ_ONE) == every[:1]


@settings(
    deadline=None,
    max_examples=200 * EFFORT,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests=requests)
def test_any_request(small: _native.Segment, requests: list[tuple[str, int, int, str]]) -> None:
    pool = small.client("disk").new_pool(persistent=True)
    device, expected = _native.Device(pool, OBJECT, SIZE_BYTES), bytearray(SIZE_BYTES)
    for number, (kind, one, other, what) in enumerate(requests):
        start, end = min(one, other), max(one, other)
        match kind:
            case "write":
                data = content(what, end - start, number)
                device.pwrite(None, data, start, 0)
                expected[start:end] = data
            case "zero":
                device.zero(None, end - start, start, 0)
                expected[start:end] = bytes(end - start)
            case "trim":
                device.trim(None, end - start, start, 0)
                expected[start:end] = bytes(end - start)
            case "read":
                assert read(device, start, end) == expected[start:end]
            case _:
                check_extents(device, start, end, expected)
    assert read(device) == expected
    check_extents(device, 0, SIZE_BYTES, expected)
    assert small.check() == []
    pool.destroy()


def test_never_written_reads_as_zeros(device: _native.Device, pool: _native.Pool) -> None:
    assert device.size_bytes == SIZE_BYTES
    assert read(device) == bytes(SIZE_BYTES)
    assert device.extents(None, SIZE_BYTES, 0, 0) == [(0, SIZE_BYTES, HOLE_ZERO)]
    assert pool.statistics()["pages"] == 0


def test_pages_are_those_of_the_pool(device: _native.Device, pool: _native.Pool) -> None:
    device.pwrite(None, page("text", 1), 3 * PAGE_SIZE, 0)
    assert pool.present(OBJECT, 0, 100) == [(3, 1)]
    device.pwrite(None, b"x", 5 * PAGE_SIZE + 7, 0)
    buffer = bytearray(PAGE_SIZE)
    assert pool.get(OBJECT, 5, buffer) == 1
    assert buffer == bytes(7) + b"x" + bytes(PAGE_SIZE - 8)
    device.trim(None, PAGE_SIZE, 3 * PAGE_SIZE, 0)
    assert pool.present(OBJECT, 0, 100) == [(5, 1)]


def test_trim_gives_memory_back(small: _native.Segment, device: _native.Device) -> None:
    client = small.client("disk")
    device.pwrite(None, content("random", SIZE_BYTES, 1), 0, 0)
    used = client.statistics()["used_bytes"]
    device.trim(None, 35 * PAGE_SIZE, 0, 0)
    assert client.statistics()["used_bytes"] <= used // 2 + PAGE_SIZE
    device.zero(None, SIZE_BYTES, 0, 0)
    assert client.statistics()["used_bytes"] == 0


def test_beyond_the_end(device: _native.Device) -> None:
    for start, length in (
        (SIZE_BYTES, 1),
        (SIZE_BYTES - 1, 2),
        (0, SIZE_BYTES + 1),
        (2**63, 1),
        (2**64 - 1, 2),
    ):
        with pytest.raises(ValueError, match="beyond the end"):
            device.pread(None, bytearray(length), start, 0)
        with pytest.raises(ValueError, match="beyond the end"):
            device.pwrite(None, bytes(length), start, 0)
        for call in (device.zero, device.trim, device.extents):
            with pytest.raises(ValueError, match="beyond the end"):
                call(None, length, start, 0)
    with pytest.raises(OverflowError):
        device.pread(None, bytearray(1), -1, 0)
    assert read(device, SIZE_BYTES, SIZE_BYTES) == b""
    assert device.extents(None, 0, SIZE_BYTES, 0) == []


def test_what_no_device_can_be_made_of(small: _native.Segment, pool: _native.Pool) -> None:
    ephemeral = small.client("disk").new_pool(persistent=False)
    for bad in ((ephemeral, OBJECT, 4096), (pool, OBJECT[:-1], 4096), (pool, OBJECT, 2**44 + 1)):
        with pytest.raises(ValueError, match="persistent pool"):
            _native.Device(*bad)
    with pytest.raises(TypeError):
        _native.Device(None, OBJECT, 4096)  # type: ignore[arg-type]
    device = _native.Device(pool, OBJECT, 4096)
    pool.destroy()
    for call in (
        lambda: read(device),
        lambda: device.pwrite(None, b"1", 1, 0),
        lambda: device.zero(None, 9, 1, 0),
    ):
        with pytest.raises(PoolError):
            call()


def test_the_largest(pool: _native.Pool) -> None:
    device = _native.Device(pool, OBJECT, 2**44)
    end = 2**44
    device.pwrite(None, b"the end", end - 7, 0)
    device.pwrite(None, b"middle" * 2000, end // 2 - 5000, 0)
    assert read(device, end - PAGE_SIZE - 9, end) == bytes(PAGE_SIZE + 2) + b"the end"
    assert read(device, end // 2 - 5001, end // 2 + 7001) == b"\0" + b"middle" * 2000 + b"\0"
    assert device.extents(None, PAGE_SIZE + 1, end - PAGE_SIZE - 1, 0) == [
        (end - PAGE_SIZE - 1, 1, HOLE_ZERO),
        (end - PAGE_SIZE, PAGE_SIZE, 0),
    ]


@pytest.mark.parametrize("start", [0, 100, 17 * PAGE_SIZE - 1])
def test_no_space_keeps_old_bytes(small: _native.Segment, device: _native.Device, start: int) -> None:
    """A page is old or new, and those behind the refused one are old."""
    old = content("text", SIZE_BYTES, 0)
    device.pwrite(None, old, 0, 0)
    client = small.client("disk")
    client.cap_bytes = client.statistics()["used_bytes"] + 10000
    new = content("random", 30 * PAGE_SIZE, 7)
    with pytest.raises(OSError, match="No space") as caught:
        device.pwrite(None, new, start, 0)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        device.pwrite(None, new[:3000], 50 * PAGE_SIZE + 50, 0)
    wanted = old[:start] + new + old[start + len(new) :]
    now = read(device)
    kinds = ""
    for first in range(0, SIZE_BYTES, PAGE_SIZE):
        piece = slice(first, first + PAGE_SIZE)
        assert now[piece] in (old[piece], wanted[piece])
        kinds += "n" if now[piece] != old[piece] else "o"
    written = kinds.strip("o")
    assert set(written) == {"n"}
    assert kinds.index("n") == start // PAGE_SIZE
    client.cap_bytes = 0
    device.pwrite(None, new, start, 0)
    assert read(device) == wanted


@pytest.mark.parametrize(("stripe", "steps"), [(100, 3000), (100_001, 200)])
def test_writers_of_the_same_pages_in_threads(
    pool: _native.Pool, small: _native.Segment, stripe: int, steps: int
) -> None:
    """Nobody's bytes are lost when others write next to them, in a page or over many pages."""
    where = op.Where("disk", pool.id)
    errors: list[BaseException] = []

    def run(writer: int) -> None:
        try:
            write_stripe(small, where, OBJECT, writer, 4, stripe, steps)
        except BaseException as error:  # raised below: a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(("stripe", "steps"), [(61, 30_000), (1024, 15_000), (100_001, 1000)])
def test_writers_of_the_same_pages_in_processes(
    directory: Path, workers: list[Worker], stripe: int, steps: int
) -> None:
    segment = _native.create(str(directory / "disk"), 16 << 20)
    where = op.new_pool(segment, "disk", persistent=True)
    for writer, worker in enumerate(workers):
        worker.attach(directory / "disk")
        worker.start(write_stripe, where, OBJECT, writer, len(workers), stripe, steps)
    for worker in workers:
        worker.finish(write_stripe)
    assert segment.check() == []
    segment.close()


@pytest.mark.parametrize("arguments", [(), (None,), (None, 1), (None, 1, 2), (None, 1, 2, 3, 4)])
def test_wrong_number_of_arguments(device: _native.Device, arguments: tuple[int | None, ...]) -> None:
    calls: list[Callable[..., object]] = [
        device.pread,
        device.pwrite,
        device.zero,
        device.trim,
        device.extents,
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call(*arguments)


def test_never_initialised(pool: _native.Pool) -> None:
    device = _native.Device.__new__(_native.Device)
    with pytest.raises(ValueError, match="initialised"):
        device.pread(None, bytearray(), 0, 0)
    device.__init__(pool, OBJECT, 4096)
    assert read(device) == bytes(4096)


def test_wrong_kind_of_buffer(device: _native.Device) -> None:
    with pytest.raises((BufferError, TypeError)):
        device.pread(None, b"read only", 0, 0)
    with pytest.raises((BufferError, TypeError)):
        device.pwrite(None, memoryview(bytearray(20))[::2], 0, 0)
    with pytest.raises(TypeError):
        device.pwrite(None, 5, 0, 0)  # type: ignore[arg-type]
