"""A machine in small: a manager, a swap device and a mount, with a load on each, and what may befall them.

All real: the processes are started by the commands that people use. The test is the service manager: what it
kills and nobody else restarts, it starts again. Everything is taken down by `close`, whatever state it is in.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tmem.backends import _native, service
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import ServiceError, TmemError
from tmem.fs import mounts, syscalls
from tmem.nbd import export, server

from .blocks import BlockLoad
from .board import Board, Child, wait
from .files import FileLoad, make
from .ledger import Ledger

SWAP, FILES = "guest1", "files"
"""The clients of the swap device and of the mount."""

_MIB = 1 << 20
SEGMENT_BYTES = 16 * _MIB
DEVICE_BYTES = 12 * _MIB
CAP_BYTES = 2 * _MIB
"""Of memory for a device that has a tier: its pages take 5 MiB when compressed."""
FILE_COUNT = 24


class World:
    """See above; made and used by one thread. ``TMEM_RUNTIME_DIR`` must name `paths.directory`.

    `expected` are the errors with which requests to the swap device may be answered. `tier` are the options
    that give the device a tier; then most of its pages have to be there.
    """

    def __init__(
        self,
        paths: SegmentPaths,
        directory: Path,
        seed: str,
        expected: frozenset[int] = frozenset(),
        tier: Sequence[str] = (),
    ) -> None:
        self.paths = paths
        self._expected = expected
        self._tier = tier
        self._directory = directory
        self.lower, self.point = directory / "lower", directory / "mount"
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self._manager: subprocess.Popen[bytes] | None = None
        self.server_deaths = 0
        """How often the server died since the manager was started, which waits longer after each."""

    def open(self) -> None:
        """Start everything; the loads rest."""
        self._stack.callback(self._take_down)
        self.start_manager(f"--memory={SEGMENT_BYTES >> 20}M")
        self.segment = _native.attach(str(self.paths.segment))
        self._stack.callback(self.segment.close)
        tmem("swap", "add", SWAP, f"--size={DEVICE_BYTES >> 20}M", *self._tier)
        if self._tier:
            tmem("set", SWAP, f"--cap={CAP_BYTES >> 20}M")
        self.lower.mkdir()
        self.point.mkdir()
        files = make(self.lower, FILE_COUNT)
        self.mount()
        connections = self._stack.enter_context(fuse_connections())
        made = export.load(self.paths, SWAP)
        blocks, board = Ledger(DEVICE_BYTES // 4096), Board()
        load = BlockLoad(
            made.uri, blocks, board, self._seed, lambda: server.connections(self.paths, made), self._expected
        )
        self.swap = self._child("swap", board, load)
        board = Board()
        self.files = self._child(
            "files",
            board,
            FileLoad(self.point, files, board, self._seed, lambda: outstanding(connections, self.point)),
        )
        for child in self.loads:
            child.start()
            child.work()
        self.rest()

    def close(self) -> None:
        """Take everything down."""
        self._stack.close()

    @property
    def loads(self) -> tuple[Child, Child]:
        return self.swap, self.files

    def _child(self, name: str, board: Board, load: BlockLoad | FileLoad) -> Child:
        child = Child(board, load.run, self._directory / f"{name}.error")
        self._stack.callback(child.kill)
        return child

    def rest(self) -> None:
        """Let the loads verify all they know, then see that the segment is sound. AssertionError if not."""
        for child in self.loads:
            child.rest()
        check(self.segment)

    def work(self) -> None:
        """Let the loads go on."""
        for child in self.loads:
            child.work()

    def said(self) -> str:
        """Return what manager and server said last, for whoever looks for the cause of a failure."""
        logs = (self._directory / "manager.log", self.paths.state / f"service-swap-{SWAP}.log")
        return "\n".join(
            f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists()
        )

    # -- the manager

    def start_manager(self, *arguments: str) -> None:
        """Start the manager, as a service manager would, and wait until it answers."""
        with (self._directory / "manager.log").open("ab") as log:
            self._manager = subprocess.Popen(
                [sys.executable, "-P", "-m", "tmem", "start", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.server_deaths = 0
        wait(self._answers, "the manager answers")

    def _answers(self) -> bool:
        manager = self._manager
        assert manager is not None
        if manager.poll() is not None:
            log = (self._directory / "manager.log").read_text(errors="replace")
            raise AssertionError(f"the manager ended with {manager.returncode}:\n{log[-2000:]}")
        with contextlib.suppress(ServiceError):
            return service.request(self.paths, {"op": "ping"})["pid"] == manager.pid
        return False

    def kill_manager(self) -> None:
        """SIGKILL it; it stays dead until `start_manager`."""
        assert self._manager is not None
        self._manager.kill()
        self._manager.wait()

    def end_manager(self) -> None:
        """Tell it to end, and wait until it has."""
        assert self._manager is not None
        self._manager.terminate()
        status = self._manager.wait(30)
        assert status == 0, f"the manager ended with {status}"

    @property
    def manager_process(self) -> Process:
        assert self._manager is not None
        found = Process.of(self._manager.pid)
        assert found is not None, "the manager runs"
        return found

    # -- the swap device

    @property
    def server_process(self) -> Process:
        """The server; waits for one that is just being started."""
        found: list[Process] = []

        def there() -> bool:
            running = server.running(self.paths, SWAP)
            found[:] = [running] if running else []
            return bool(found)

        wait(there, "the server runs")
        return found[0]

    def kill_server(self) -> None:
        """SIGKILL it; the manager starts it again."""
        kill(self.server_process)
        self.server_deaths += 1

    # -- the mount

    def mount(self) -> None:
        """Mount, also over what a killed daemon has left."""
        tmem("mount", self.lower, self.point, "-o", f"client={FILES},timeout=0")

    @property
    def daemon_process(self) -> Process:
        found = mounts.daemon_of(str(self.point))
        assert found is not None, "the mount answers"
        return found

    def kill_daemon(self) -> None:
        """SIGKILL the mount's daemon; the mount point is dead until `mount`."""
        process = self.daemon_process
        kill(process)
        wait(lambda: not process.alive, "the daemon is gone")

    def _take_down(self) -> None:
        """End every process, then unmount what is left."""
        running = server.running(self.paths, SWAP)
        self._unmount()
        if self._manager is not None:
            with contextlib.suppress(ServiceError):
                service.request(self.paths, {"op": "unsupervise", "name": f"swap-{SWAP}", "timeout_s": 5})
            self._manager.kill()
            self._manager.wait()
        for process in (running, server.running(self.paths, SWAP)):
            if process is not None:
                kill(process)
        self._unmount()

    def _unmount(self) -> None:
        """Take what is mounted out of the tree; its daemon ends with it."""
        with contextlib.suppress(TmemError):
            while mounts.top_mount(str(self.point)) is not None:
                mounts.detach(str(self.point))


def tmem(*arguments: str | Path) -> None:
    """Run the command line; AssertionError unless it succeeds."""
    command = [sys.executable, "-P", "-m", "tmem", *map(str, arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{' '.join(command[3:])}: {done.stderr or done.stdout}"


def signal_process(process: Process, number: int) -> bool:
    """Send a signal to exactly this process; False if it has ended."""
    descriptor = process.open_pidfd()
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def kill(process: Process) -> None:
    """SIGKILL exactly this process."""
    signal_process(process, signal.SIGKILL)


@contextlib.contextmanager
def stopped(*processes: Process) -> Iterator[None]:
    """SIGSTOP processes for as long as the context lasts."""
    try:
        for process in processes:
            signal_process(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            signal_process(process, signal.SIGCONT)


def check(segment: _native.Segment) -> None:
    """Repair what the dead left and demand a sound segment.

    The check is exact while nobody works; a manager or a server may be at something, so a violation counts if
    it stays.
    """
    deadline = time.monotonic() + 10
    while True:
        segment.reap()
        violations = segment.check()
        if not violations:
            return
        assert time.monotonic() < deadline, "\n".join(violations)
        time.sleep(0.02)


@contextlib.contextmanager
def fuse_connections() -> Iterator[Path]:
    """Show the kernel's FUSE connections (a file system of their own) in a private directory."""
    directory = Path(tempfile.mkdtemp(prefix="tmem-fusectl-"))
    try:
        syscalls.mount("fusectl", str(directory), "fusectl", 0, "")
        try:
            yield directory
        finally:
            syscalls.umount(str(directory), syscalls.MNT_DETACH)
    finally:
        directory.rmdir()


def outstanding(connections: Path, point: Path) -> int:
    """Return how many requests the daemon of a mount has not answered; 0 where there is no mount."""
    numbers = [
        line.split()[2]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(point)
    ]
    try:
        return int((connections / numbers[-1].partition(":")[2] / "waiting").read_text())
    except (OSError, IndexError):
        return 0
