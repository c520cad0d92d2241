"""Real servers on a real segment for the tests of the swap device.

Everything a fixture started is taken down again, also when the test failed, by process id; what lies in the
run-time directory goes with it.
"""

import contextlib
import errno
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.nbd import attach, server, swap
from tmem.nbd.export import Export

from ..waiting import DEADLINE_S, wait_until

if TYPE_CHECKING:
    from tmem.backends import _native

# libnbd's bindings. By name, for the checkers take our own folder nbd/ for a package of that name.
nbd: Any = importlib.import_module("nbd")

ROOT = Path(__file__).parents[2]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition` holds; fail the test after a deadline."""
    wait_until(condition, what=what)


def refused(write: Callable[..., object], *arguments: object) -> bool:
    """Say whether a write gets ENOSPC, and no other error."""
    try:
        write(*arguments)
    except nbd.Error as error:
        if error.errnum != errno.ENOSPC:
            raise
        return True
    return False


@dataclass
class Server:
    """A server of one client, run without a manager."""

    paths: SegmentPaths
    export: Export
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.export.save(self.paths)
        with self.log.open("ab") as log:
            command = server.command(self.paths, self.export.client)
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server.wait_ready(self.export)

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A libnbd handle connected to the export."""
        handle = nbd.NBD()
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.connect_uri(self.export.uri)
        try:
            yield handle
        finally:
            if handle.aio_is_ready():
                handle.shutdown()


@pytest.fixture
def paths(segment: "_native.Segment", runtime_dir: Path) -> SegmentPaths:
    return SegmentPaths("default", runtime_dir)


@pytest.fixture
def make_server(
    paths: SegmentPaths, segment: "_native.Segment", tmp_path: Path
) -> Iterator[Callable[..., Server]]:
    """Make a client with its pool and serve it: ``make_server("guest1", 16 << 20)``."""
    made: list[Server] = []

    def make(client: str = "guest1", size_bytes: int = 16 << 20, **options: Any) -> Server:
        segment.client(client).new_pool(persistent=True)
        options.setdefault("unix", str(paths.state / f"{client}.sock"))
        one = Server(paths, Export(client, size_bytes, **options), tmp_path / f"{client}.log")
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(5)
            one.kill()


@pytest.fixture
def swap_server(make_server: Callable[..., Server]) -> Server:
    """A server of 16 MiB for the client ``guest1``."""
    return make_server()


@pytest.fixture
def device_size() -> int:
    """The segment has room for so much even uncompressed."""
    return 56 << 20


@pytest.fixture
def device(swapping: None, make_server: Callable[..., Server], device_size: int) -> Iterator[str]:
    """A swap device of `device_size` bytes, attached, not in use."""
    needs_root()
    server = make_server("guest1", device_size)
    attached = attach.attach(server.paths, server.export)
    assert attached.attachment is not None
    assert attached.attachment.device is not None
    yield attached.attachment.device
    swap.off(attached.attachment.device)
    attach.detach(server.paths, attached)


@pytest.fixture
def tmem(paths: SegmentPaths) -> Iterator[Callable[..., "subprocess.CompletedProcess[str]"]]:
    """Run the command line; devices and a manager that it left are taken down after the test."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tmem", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    yield run
    clients = [path.stem.removeprefix("swap-") for path in paths.state.glob("swap-*.json")]
    for client in clients:
        run("swap", "remove", client)
    run("stop")
    # What even that left; the manager is gone and starts none again.
    for client in clients:
        if (left := server.running(paths, client)) is not None:
            os.kill(left.pid, signal.SIGKILL)
            eventually(lambda process=left: not process.alive, "the server is gone")  # type: ignore[misc]


def free_address() -> tuple[str, int]:
    """Return a TCP address of this machine that nobody uses: on a host of our own, whose ports nobody else
    takes before we do."""
    host = f"127.{os.getpid() >> 16 & 127 | 128}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    with socket.socket() as free:
        free.bind((host, 0))
        return host, int(free.getsockname()[1])


def needs_root() -> None:
    """Skip unless this may attach block devices."""
    if os.geteuid() != 0:
        pytest.skip("not root: cannot attach block devices")
    if not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
        pytest.skip("no FUSE or no loop devices")
