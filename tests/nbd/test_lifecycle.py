"""``tmem swap add`` and ``remove`` as a person runs them, with a real manager."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.nbd import lifecycle, server, swap
from tmem.nbd.export import Export, load

from ..waiting import DEADLINE_S
from .conftest import eventually, free_address, nbd, needs_root

if TYPE_CHECKING:
    from subprocess import CompletedProcess

    from tmem.backends import _native

    Tmem = Callable[..., CompletedProcess[str]]


@pytest.fixture
def managed(paths: SegmentPaths, tmem: "Tmem") -> "Tmem":
    started = tmem("start", "-d")
    assert started.returncode == 0, started.stderr
    return tmem


def read(uri: str, count: int, offset: int) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = handle.pread(count, offset)
    handle.shutdown()
    return bytes(data)


def write(uri: str, data: bytes, offset: int) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(data, offset)
    handle.shutdown()


def test_add_serves_and_remove_leaves_nothing(
    managed: "Tmem", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    before = set(paths.state.iterdir())
    added = managed("swap", "add", "guest1", "--size", "8M")
    assert added.returncode == 0, added.stderr
    uri = added.stdout.splitlines()[-1]
    assert uri == f"nbd+unix:///guest1?socket={paths.state}/swap-guest1.sock"
    write(uri, b"page", 4096)
    (pool,) = segment.client("guest1", create=False).pools()
    assert pool.persistent
    again = managed("swap", "add", "guest1", "--size", "8M")
    assert again.stdout == added.stdout
    other = managed("swap", "add", "guest1", "--size", "16M")
    assert other.returncode == 1
    assert "remove it first with tmem swap remove guest1" in other.stderr
    assert read(uri, 4, 4096) == b"page"
    removed = managed("swap", "remove", "guest1")
    assert removed.returncode == 0, removed.stderr
    assert segment.clients() == []
    assert set(paths.state.iterdir()) == before
    missing = managed("swap", "remove", "guest1")
    assert missing.returncode == 1
    assert "there is no swap device guest1" in missing.stderr


def test_a_killed_server_comes_back_with_its_pages(managed: "Tmem", paths: SegmentPaths) -> None:
    uri = managed("swap", "add", "guest1", "--size", "8M").stdout.splitlines()[-1]
    write(uri, b"survives", 0)
    first = server.running(paths, "guest1")
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)

    def back() -> bool:
        now = server.running(paths, "guest1")
        return now is not None and now != first

    eventually(back, "the manager starts the server again")
    server.wait_ready(load(paths, "guest1"))
    assert read(uri, 8, 0) == b"survives"
    assert managed("swap", "remove", "guest1").returncode == 0


def test_without_a_manager_nothing_is_left(
    tmem: "Tmem", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    before = set(paths.state.iterdir())
    added = tmem("swap", "add", "guest1", "--size", "8M")
    assert added.returncode == 1
    assert "tmem --name default start -d" in added.stderr
    assert added.stderr.count("\n") == 1
    assert segment.clients() == []
    assert set(paths.state.iterdir()) == before


def test_tcp(managed: "Tmem") -> None:
    host, port = free_address()
    added = managed("swap", "add", "guest1", "--size", "8M", "--tcp", f"{host}:{port}")
    assert added.stdout == f"nbd://{host}:{port}/guest1\n", added.stderr
    write(added.stdout.strip(), b"tcp", 0)
    assert read(added.stdout.strip(), 3, 0) == b"tcp"
    assert managed("swap", "remove", "guest1").returncode == 0


def test_reserve_refuses_with_numbers(managed: "Tmem") -> None:
    added = managed("swap", "add", "guest1", "--size", "1G", "--reserve")
    assert added.returncode == 1
    assert "1G cannot be reserved: segment default has 64M" in added.stderr
    assert managed("swap", "add", "guest1", "--size", "40M", "--reserve").returncode == 0
    second = managed("swap", "add", "guest2", "--size", "40M", "--reserve")
    assert second.returncode == 1
    assert "40M cannot be reserved" in second.stderr
    assert managed("swap", "remove", "guest1").returncode == 0
    assert managed("swap", "add", "guest2", "--size", "40M", "--reserve").returncode == 0
    assert managed("swap", "remove", "guest2").returncode == 0


def test_serve_in_the_foreground(tmem: "Tmem", paths: SegmentPaths, segment: "_native.Segment") -> None:
    """For service files: no manager is needed, and `remove` stops this server too."""
    segment.client("guest1").new_pool(persistent=True)
    made = Export("guest1", 8 << 20, unix=lifecycle.default_socket(paths, "guest1"))
    made.save(paths)
    command = [sys.executable, "-m", "tmem", "swap", "serve", "guest1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as serving:
        try:
            server.wait_ready(made)
            assert server.running(paths, "guest1") is not None
            twice = tmem("swap", "serve", "guest1")
            assert twice.returncode == 1
            assert "runs already" in twice.stderr
            removed = tmem("swap", "remove", "guest1")
            assert removed.returncode == 0, removed.stderr
            assert serving.wait(DEADLINE_S) == 0
        finally:
            serving.kill()
    assert segment.clients() == []


def test_remove_is_refused_while_somebody_is_connected(managed: "Tmem") -> None:
    uri = managed("swap", "add", "guest1", "--size", "8M").stdout.strip()
    guest = nbd.NBD()
    guest.connect_uri(uri)
    guest.pwrite(b"in use", 0)
    refused = managed("swap", "remove", "guest1")
    assert refused.returncode == 1
    assert "1 clients are connected to guest1" in refused.stderr
    assert guest.pread(6, 0) == b"in use"
    guest.shutdown()
    assert managed("swap", "remove", "guest1").returncode == 0


def test_a_server_that_cannot_start_says_why(managed: "Tmem", segment: "_native.Segment") -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        added = managed("swap", "add", "guest1", "--size", "8M", "--tcp", f"127.0.0.1:{port}")
    assert added.returncode == 1
    assert "Address already in use" in added.stderr
    assert segment.clients() == []


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "8X"],
        [],
        ["--size", "8M", "--unix", "/s", "--tcp", "h:1"],
        ["--size", "8M", "--tls-psk", "/f"],
        ["--size", "8M", "--priority", "5"],
        ["--size", "8M", "--attach", "--tcp", "h:1", "--tls-psk", "/f"],
    ],
)
def test_usage_errors(tmem: "Tmem", options: list[str]) -> None:
    result = tmem("swap", "add", "guest1", *options)
    assert result.returncode == 2
    assert "Error:" in result.stderr


def test_attach_is_refused_unless_forced(
    swapping: None, managed: "Tmem", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    needs_root()
    before = set(paths.state.iterdir())
    refused = managed("swap", "add", "guest1", "--size", "8M", "--attach")
    if refused.returncode == 0:
        managed("swap", "remove", "guest1")
        pytest.skip("this machine is contained")
    assert "containment" in refused.stderr
    assert "--force" in refused.stderr.splitlines()[-1]
    assert refused.stdout == ""
    assert segment.clients() == []
    assert set(paths.state.iterdir()) == before
    forced = managed("swap", "add", "guest1", "--size", "8M", "--attach", "--force", "--priority", "3")
    assert forced.returncode == 0, forced.stderr
    device, uri = forced.stdout.splitlines()
    assert uri.startswith("nbd+unix:///guest1?")
    entry = swap.entry(device)
    assert entry is not None
    assert entry.priority == 3
    removed = managed("swap", "remove", "guest1")
    assert removed.returncode == 0, removed.stderr
    assert not swap.is_active(device)
    assert not Path(f"/sys/block/{Path(device).name}/loop/backing_file").exists()
    assert set(paths.state.iterdir()) == before
