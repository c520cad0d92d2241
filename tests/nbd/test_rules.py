"""Rules and historic defects of docs/semantics.md that a swap device must mind, with real servers.

Named as ``tests/backends/test_rules.py`` and ``test_history.py`` do: K4 what becomes of the pool, D4 what a
block device needs instead of D1, 10.13 log lines that a client can cause.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths
from tmem.backends.supervisor import OUTPUT_BYTES
from tmem.types import PAGE_SIZE

from .conftest import Server, eventually, nbd, refused

if TYPE_CHECKING:
    from subprocess import CompletedProcess

    from tmem.backends import _native

    Tmem = Callable[..., CompletedProcess[str]]


def test_k4_discarding_a_whole_device_keeps_its_pool(
    make_server: Callable[..., Server], segment: "_native.Segment"
) -> None:
    """As after swapoff: every page is dropped, the device goes on, and no other device notices."""
    servers = [make_server(name) for name in ("guest1", "guest2")]
    data = random.Random(1).randbytes(64 * PAGE_SIZE)
    for server in servers:
        with server.client() as handle:
            handle.pwrite(data, 128 * PAGE_SIZE)
    pools = [segment.client(name, create=False).pools()[0] for name in ("guest1", "guest2")]
    with servers[0].client() as handle:
        handle.trim(servers[0].export.size_bytes, 0)
        assert pools[0].alive
        assert [pool.statistics()["pages"] for pool in pools] == [0, 64]
        assert handle.pread(64 * PAGE_SIZE, 128 * PAGE_SIZE) == bytes(64 * PAGE_SIZE)
        handle.pwrite(data, 0)
        assert handle.pread(len(data), 0) == data
    with servers[1].client() as handle:
        assert handle.pread(len(data), 128 * PAGE_SIZE) == data


def test_k4_removing_a_device_drops_its_pool_and_no_other(
    tmem: "Tmem", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    assert tmem("start", "-d").returncode == 0
    data = random.Random(2).randbytes(64 * PAGE_SIZE)
    uris = {}
    for name in ("guest1", "guest2"):
        added = tmem("swap", "add", name, "--size", "8M")
        assert added.returncode == 0, added.stderr
        uris[name] = added.stdout.splitlines()[-1]
        handle = nbd.NBD()
        handle.connect_uri(uris[name])
        handle.pwrite(data, 0)
        handle.shutdown()
    assert tmem("swap", "remove", "guest1").returncode == 0
    assert [client.name for client in segment.clients()] == ["guest2"]
    assert segment.statistics()["persistent_pages"] == 64
    handle = nbd.NBD()
    handle.connect_uri(uris["guest2"])
    assert handle.pread(len(data), 0) == data
    handle.shutdown()


def test_d4_a_sector_is_old_or_new(swap_server: Server, segment: "_native.Segment") -> None:
    """Not as tmem, where a refused put leaves a miss: the old bytes stay, whatever refuses the new ones."""
    client = segment.client("guest1", create=False)
    noise = random.Random(3)
    old, new = noise.randbytes(16 * PAGE_SIZE), noise.randbytes(16 * PAGE_SIZE)
    with swap_server.client() as handle:
        handle.pwrite(old, 0)
        for setting, restricted, free in (
            ("cap_bytes", 1, 0),
            ("mode", "frozen", "on"),
            ("mode", "off", "on"),
        ):
            setattr(client, setting, restricted)
            for start, count in ((0, 16), (PAGE_SIZE + 100, 2), (5 * PAGE_SIZE, 1)):
                length = count * PAGE_SIZE
                # An old page may be replaced by one that needs no more memory, also above the cap.
                if not refused(handle.pwrite, new[:length], start):
                    assert setting == "cap_bytes"
                    handle.pwrite(old[start : start + length], start)
                assert handle.pread(len(old), 0) == old
            setattr(client, setting, free)
        handle.pwrite(new, 0)
        assert handle.pread(len(new), 0) == new


def test_10_13_what_a_client_causes_to_be_said_is_bounded(
    tmem: "Tmem", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    """Refused writes and bad names do not fill the memory beside the pages, and the manager says nothing."""
    assert tmem("start", "-d").returncode == 0
    added = tmem("swap", "add", "guest1", "--size", "64M")
    assert added.returncode == 0, added.stderr
    segment.client("guest1", create=False).mode = "frozen"
    outputs = sorted(paths.state.glob("*.log"))
    (output,) = [path for path in outputs if "guest1" in path.name]
    others = {path: path.read_bytes() for path in outputs if path != output}
    assert others, "the manager has a log"
    handle = nbd.NBD()
    handle.connect_uri(added.stdout.splitlines()[-1])
    most = 0
    for number in range(25_000):
        assert refused(handle.pwrite, b"x" * PAGE_SIZE, number % 1000 * PAGE_SIZE)
        if number % 1000 == 0:
            most = max(most, output.stat().st_size)
    handle.shutdown()
    for number in range(50):
        stranger = nbd.NBD()
        stranger.set_export_name(f"stranger {number}\n" * 50)
        try:
            stranger.connect_unix(str(paths.state / "swap-guest1.sock"))
        except nbd.Error:
            continue
        raise AssertionError("a stranger is served")
    eventually(lambda: output.stat().st_size <= OUTPUT_BYTES, "the output is short")
    assert most < 8 * OUTPUT_BYTES
    assert {path: path.read_bytes() for path in others} == others
