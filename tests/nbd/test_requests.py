"""What libnbd reads is what it wrote, whatever the offset and length, as a bytearray would have it."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmem.types import PAGE_SIZE

from .conftest import Server, nbd

SMALL = 16 * PAGE_SIZE


def test_reads_zeros_before_the_first_write(swap_server: Server) -> None:
    with swap_server.client() as client:
        assert client.pread(1 << 20, 12345) == bytes(1 << 20)


def test_round_trip_of_large_requests(swap_server: Server) -> None:
    data = random.Random(1).randbytes(4 << 20)
    with swap_server.client() as client:
        client.pwrite(data, 3 * PAGE_SIZE)
        assert client.pread(len(data), 3 * PAGE_SIZE) == data
        assert client.pread(3 * PAGE_SIZE, 0) == bytes(3 * PAGE_SIZE)


def test_the_last_byte_is_there_and_nothing_beyond(swap_server: Server) -> None:
    size = swap_server.export.size_bytes
    with swap_server.client() as client:
        client.pwrite(b"x", size - 1)
        assert client.pread(PAGE_SIZE, size - PAGE_SIZE) == bytes(PAGE_SIZE - 1) + b"x"
        client.set_strict_mode(0)
        with pytest.raises(nbd.Error):
            client.pwrite(b"xy", size - 1)


def test_announces_what_it_can(swap_server: Server) -> None:
    with swap_server.client() as client:
        assert client.get_size() == swap_server.export.size_bytes
        for ability in ("multi_conn", "flush", "trim", "zero", "fast_zero", "fua"):
            assert getattr(client, f"can_{ability}")(), ability
        assert not client.is_read_only()
        assert not client.is_rotational()
        sizes = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        assert [client.get_block_size(size) for size in sizes] == [1, PAGE_SIZE, 32 << 20]


def test_flush_and_fua_are_accepted(swap_server: Server) -> None:
    with swap_server.client() as client:
        client.pwrite(b"fua", 5, nbd.CMD_FLAG_FUA)
        client.flush()
        assert client.pread(3, 5) == b"fua"


def test_trim_and_zero_drop_pages_from_the_pool(swap_server: Server, segment: Any) -> None:
    (pool,) = segment.client("guest1").pools()
    noise = random.Random(2).randbytes(8 * PAGE_SIZE)
    with swap_server.client() as client:
        client.pwrite(noise, 0)
        assert pool.statistics()["pages"] == 8
        client.trim(2 * PAGE_SIZE, 0)
        assert pool.statistics()["pages"] == 6
        client.zero(2 * PAGE_SIZE, 2 * PAGE_SIZE, nbd.CMD_FLAG_FAST_ZERO)
        assert client.pread(8 * PAGE_SIZE, 0) == bytes(4 * PAGE_SIZE) + noise[4 * PAGE_SIZE :]
        client.zero(100, 4 * PAGE_SIZE + 50)
        zeroed = noise[4 * PAGE_SIZE :][:50] + bytes(100) + noise[4 * PAGE_SIZE + 150 : 5 * PAGE_SIZE]
        assert client.pread(PAGE_SIZE, 4 * PAGE_SIZE) == zeroed


def test_extents_tell_holes_from_pages(swap_server: Server) -> None:
    noise = random.Random(3).randbytes(2 * PAGE_SIZE)
    with swap_server.client() as client:
        client.pwrite(noise, 4 * PAGE_SIZE)
        found: list[tuple[int, int]] = []

        def note(context: str, offset: int, entries: list[int], error: Any) -> int:
            found.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        client.block_status(16 * PAGE_SIZE, 0, note)
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert [found[0], found[1]] == [(4 * PAGE_SIZE, hole), (2 * PAGE_SIZE, 0)]
    assert found[2][1] == hole


_requests = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "zero", "trim"]),
        st.integers(0, SMALL - 1),
        st.integers(1, 3 * PAGE_SIZE),
        st.integers(0, 255),
        st.booleans(),
    ),
    max_size=30,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests=_requests)
def test_behaves_like_a_bytearray(
    swap_server: Server, requests: list[tuple[str, int, int, int, bool]]
) -> None:
    model = bytearray(SMALL)
    with swap_server.client() as client:
        client.zero(SMALL, 0)
        for what, start, size, seed, repeated in requests:
            length = min(size, SMALL - start)
            if what == "write":
                data = bytes([seed]) * length if repeated else random.Random(seed).randbytes(length)
                client.pwrite(data, start)
                model[start : start + length] = data
            elif what == "read":
                assert client.pread(length, start) == model[start : start + length]
            elif what == "zero":
                client.zero(length, start)
                model[start : start + length] = bytes(length)
            else:
                # A trim may keep what does not fill a page: the range then reads as before, or as zeros.
                client.trim(length, start)
                after = client.pread(length, start)
                pairs = zip(after, model[start : start + length], strict=True)
                assert all(new in (0, old) for new, old in pairs)
                model[start : start + length] = after
        assert client.pread(SMALL, 0) == model
