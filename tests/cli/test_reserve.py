"""``swap add --reserve``: a device that never refuses a write, whoever else fills the segment."""

import importlib
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.nbd.lifecycle import RAW_PAGE_BYTES
from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native

# libnbd's bindings. By name, for the checkers take our own folder nbd/ for a package of that name.
nbd: Any = importlib.import_module("nbd")

MIB = 1 << 20
KEY = "6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a"


@pytest.fixture
def managed(tmem: Tmem, segment: "_native.Segment") -> Tmem:
    started = tmem("start", "-d")
    assert started.status == 0, started.err
    return tmem


def test_every_write_has_room(managed: Tmem, segment: "_native.Segment") -> None:
    added = managed("swap", "add", "guest1", "--size", "24M", "--reserve")
    assert added.status == 0, added.err
    floor = 24 * MIB // PAGE_SIZE * RAW_PAGE_BYTES
    assert segment.client("guest1", create=False).floor_bytes == floor
    greedy = segment.client("greedy").new_pool(persistent=True)
    taken = greedy.put(bytes(OID_SIZE), 0, os.urandom(48 * MIB))
    assert taken < 10000  # and it got no more
    ephemeral = segment.client("file").new_pool(persistent=False)
    ephemeral.put(bytes(OID_SIZE), 0, os.urandom(16 * MIB))

    data = os.urandom(24 * MIB)  # which does not compress
    guest = nbd.NBD()
    guest.connect_uri(added.out.splitlines()[-1])
    for _ in range(2):  # and over it again
        for offset in range(0, len(data), MIB):
            guest.pwrite(data[offset : offset + MIB], offset)
    for offset in range(0, len(data), MIB):
        assert guest.pread(MIB, offset) == data[offset : offset + MIB]
    guest.shutdown()
    removed = managed("swap", "remove", "guest1")
    assert removed.status == 0, removed.err
    assert {client.name for client in segment.clients()} == {"file", "greedy"}


def test_what_cannot_be_promised_is_refused(managed: Tmem, segment: "_native.Segment") -> None:
    paths = SegmentPaths.of("default")
    before = set(paths.state.iterdir())
    refused = managed("swap", "add", "guest1", "--size", "1G", "--reserve")
    assert refused.status == 1
    assert "1G cannot be reserved: segment default has 64M" in refused.err
    assert refused.err.count("\n") == 1
    assert segment.clients() == []
    assert set(paths.state.iterdir()) == before

    assert managed("swap", "add", "guest1", "--size", "40M", "--reserve").status == 0
    assert managed("swap", "add", "guest1", "--size", "40M", "--reserve").status == 0
    second = managed("swap", "add", "guest2", "--size", "40M", "--reserve")
    assert second.status == 1
    assert "40M cannot be reserved" in second.err
    assert [client.name for client in segment.clients()] == ["guest1"]
    assert managed("swap", "remove", "guest1").status == 0
    # The promise has ended with the device.
    assert managed("swap", "add", "guest2", "--size", "40M", "--reserve").status == 0
    assert managed("swap", "remove", "guest2").status == 0


def test_a_client_that_stays_has_no_promise_any_more(managed: Tmem, segment: "_native.Segment") -> None:
    assert managed("authorise", "guest1", KEY, "--create").status == 0
    client = segment.client("guest1", create=False)
    client.new_pool(persistent=False)
    refused = managed("swap", "add", "guest1", "--size", "1G", "--reserve")
    assert (refused.status, client.floor_bytes) == (1, 0)
    assert managed("swap", "add", "guest1", "--size", "8M", "--reserve").status == 0
    assert client.floor_bytes == 8 * MIB // PAGE_SIZE * RAW_PAGE_BYTES
    assert managed("swap", "remove", "guest1").status == 0
    assert client.floor_bytes == 0
    assert [pool.persistent for pool in client.pools()] == [False]


def test_a_device_that_cannot_start_reserves_nothing(managed: Tmem, segment: "_native.Segment") -> None:
    client = segment.client("guest1")
    client.new_pool(persistent=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        failed = managed("swap", "add", "guest1", "--size", "8M", "--reserve", "--tcp", address)
    assert "Address already in use" in failed.err
    assert client.floor_bytes == 0
    assert [pool.persistent for pool in client.pools()] == [False]
