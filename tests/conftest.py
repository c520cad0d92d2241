"""Fixtures that every part of the suite shares: a run-time directory of the test's own and a fresh segment.

Nothing native is imported here at import time, so tests of pure Python run (and say clearly what fails)
without a built core. Fixtures are per test; what a test starts it ends itself, and what it forgets is swept.
"""

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from .groups import Groups
from .waiting import wait_until

if TYPE_CHECKING:
    from tmem.backends import _native

    from .backends.tiers.servers import Cluster, Server

SEGMENT_BYTES = 64 << 20

# How long an example takes says how busy the machine is, and nothing of what is tested.
hypothesis.settings.register_profile(
    "whatever else the machine does", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("whatever else the machine does")

# Shells have what they start in the background ignore these, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
SHARED_MEMORY = Path("/dev/shm")


_OF_THE_MACHINE = ("nbd/", "faults/", "fs/test_lower_disk.py", "fs/test_sharing_places.py")
"""Tests that use the swap or loop devices of this machine: never two of them at a time."""


_LONG = (
    "machine",
    "guest/test_hosts.py",
    "fs/posix/test_table.py",
    "backends/test_state.py",
    "guest/test_self.py",
    "fs/test_model.py",
    "backends/test_endurance.py",
    "backends/test_handoff.py",
    "guest/test_boot.py",
)
"""What takes longest of all that stays together, as `_group` names it: begun last, it would end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say to several workers (scripts/test) what stays with one, and in which order to begin."""
    places = {name: place for place, name in enumerate(_LONG)}
    groups = {item: _group(item) for item in items}
    for item, name in groups.items():
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: places.get(groups[item], len(_LONG)))


def _group(item: pytest.Item) -> str:
    """Return what stays with one worker: what is of the machine, else each file."""
    path = str(item.path.relative_to(Path(__file__).parent))
    alone = path.startswith(_OF_THE_MACHINE) or "swapping" in getattr(item, "fixturenames", ())
    return "machine" if alone else path


@pytest.fixture
def eventually() -> Callable[..., None]:
    """`wait_until`, for tests that do not import it."""
    return wait_until


@pytest.fixture
def control_group() -> Iterator[Callable[..., Path]]:
    """Make a memory control group, ``control_group(24 << 20)`` or without a limit; gone after the test."""
    with Groups() as groups:
        yield groups.make


@pytest.fixture
def swapping() -> Iterator[None]:
    """Be the only test of this machine that uses swap: areas of one priority share the pages."""
    with (Path(tempfile.gettempdir()) / "tmem-tests-swap.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """One Redis server without replicas; a test that uses it empties it first."""
    from .backends.tiers.servers import single

    with single(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """A Redis cluster for the whole session; see `redis_cluster`."""
    from .backends.tiers.servers import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


@pytest.fixture
def redis_cluster(shared_cluster: "Cluster") -> "Cluster":
    """Three primaries and three replicas, empty, whatever the test before did to them."""
    shared_cluster.mend()
    return shared_cluster


@pytest.fixture
def root() -> None:
    """Skip a test that only root can run."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty run-time directory on a tmpfs, in force for this process and its children."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        pytest.fail(f"{SHARED_MEMORY} is not writable: mount a tmpfs there")
    directory = Path(tempfile.mkdtemp(prefix="tmem-test-", dir=SHARED_MEMORY))
    monkeypatch.setenv("TMEM_RUNTIME_DIR", str(directory))
    monkeypatch.delenv("TMEM_NAME", raising=False)
    monkeypatch.setenv("TMEM_CONFIG", os.devnull)  # not what this machine has
    yield directory
    _sweep(directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def segment(runtime_dir: Path) -> Iterator["_native.Segment"]:
    """A fresh segment of 64 MiB called ``default``, attached; its state directory is there too."""
    from tmem.backends import _native

    (runtime_dir / "default.d").mkdir(mode=0o700)
    attached = _native.create(str(runtime_dir / "default"), SEGMENT_BYTES)
    yield attached
    attached.close()
    if (runtime_dir / "default").exists():
        _native.destroy(str(runtime_dir / "default"))


def _sweep(directory: Path) -> None:
    """End the processes that a failed test left: those that were started with its run-time directory."""
    left = _started_with(directory)
    # Under an attached swap device a dead server means I/O errors; then a leak is the lesser evil.
    if any(name == "nbdfuse" for name in left.values()):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5
        while left and time.monotonic() < deadline:
            time.sleep(0.01)
            left = _started_with(directory)


def _started_with(directory: Path) -> dict[int, str]:
    """Return pid and name of every running process whose environment names `directory`."""
    wanted = f"TMEM_RUNTIME_DIR={directory}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "comm").read_text().strip()
                with suppress(ChildProcessError):
                    os.waitpid(int(process.name), os.WNOHANG)
    return found
