"""Random operations on a mount with a pool, against a plain directory as the model.

Each rule does the same to the mount and to the model and compares results or errors; some rules change the
lower directory underneath, the mode of the client, or the daemon's code. After every step all files and their
attributes are the same. Also with two mounts that share a pool, each operation on one of them.
"""

import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place, in_plenty

if TYPE_CHECKING:
    from tmem.backends import _native

NAMES = st.sampled_from(["a", "b", "c", "d", "d/e", "d/f"])
OFFSETS = st.integers(0, 5 * PAGE_SIZE) | st.sampled_from([0, PAGE_SIZE, PAGE_SIZE - 1, 3 * PAGE_SIZE])
SIZES = st.sampled_from([1, 100, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE, 20_000])


class Mount(RuleBasedStateMachine):
    """The machine; `places`, mounts of one directory that take turns, and `clients` are set by the test."""

    places: list[Place]
    clients: "list[_native.Client]"

    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.cycle(self.places)
        self.model = Path(tempfile.mkdtemp(prefix="tmem-test-"))
        self.model.chmod(0o755)
        self.handles: dict[str, tuple[int, int]] = {}
        for path in self.lower.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def teardown(self) -> None:
        for pair in self.handles.values():
            for descriptor in pair:
                os.close(descriptor)
        shutil.rmtree(self.model)
        for client in self.clients:
            client.mode = "on"

    @property
    def lower(self) -> Path:
        return self.places[0].lower

    def both(self, operation: Callable[[Path], object]) -> None:
        """Do the same in the mount whose turn it is and in the model."""
        assert outcome(operation, next(self.turns).point) == outcome(operation, self.model)

    @initialize()
    def start(self) -> None:
        self.both(lambda root: (root / "d").mkdir())

    @rule(name=NAMES, offset=OFFSETS, size=SIZES, byte=st.integers(1, 255))
    def write(self, name: str, offset: int, size: int, byte: int) -> None:
        self.both(lambda root: write_at(root / name, offset, bytes([byte]) * size))

    @rule(name=NAMES, offset=OFFSETS, size=SIZES, byte=st.integers(1, 255))
    def write_underneath(self, name: str, offset: int, size: int, byte: int) -> None:
        data = bytes([byte]) * size
        lower = outcome(lambda root: write_at(root / name, offset, data), self.lower)
        assert lower == outcome(lambda root: write_at(root / name, offset, data), self.model)

    @rule(name=NAMES, size=OFFSETS)
    def truncate(self, name: str, size: int) -> None:
        self.both(lambda root: os.truncate(root / name, size))

    @rule(name=NAMES, size=OFFSETS)
    def truncate_underneath(self, name: str, size: int) -> None:
        lower = outcome(lambda root: os.truncate(root / name, size), self.lower)
        assert lower == outcome(lambda root: os.truncate(root / name, size), self.model)

    @rule(name=NAMES, data=st.binary(max_size=10))
    def append(self, name: str, data: bytes) -> None:
        self.both(lambda root: append_to(root / name, data))

    @rule(name=NAMES, offset=OFFSETS, size=SIZES)
    def read(self, name: str, offset: int, size: int) -> None:
        self.both(lambda root: read_at(root / name, offset, size))

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.both(lambda root: (root / name).unlink())

    @rule(name=NAMES)
    def mkdir(self, name: str) -> None:
        self.both(lambda root: (root / name).mkdir())

    @rule(name=NAMES)
    def rmdir(self, name: str) -> None:
        self.both(lambda root: (root / name).rmdir())

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda root: (root / old).rename(root / new) and None)

    @rule(old=NAMES, new=NAMES)
    def rename_underneath(self, old: str, new: str) -> None:
        lower = outcome(lambda root: (root / old).rename(root / new) and None, self.lower)
        assert lower == outcome(lambda root: (root / old).rename(root / new) and None, self.model)

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        self.both(lambda root: os.link(root / old, root / new, follow_symlinks=False))

    @rule(leads_to=NAMES, new=NAMES)
    def symlink(self, leads_to: str, new: str) -> None:
        self.both(lambda root: (root / new).symlink_to(leads_to))

    @rule(name=NAMES, mode=st.sampled_from([0o600, 0o644, 0o755]))
    def chmod(self, name: str, mode: int) -> None:
        self.both(lambda root: (root / name).chmod(mode))

    @rule(name=NAMES)
    def hold_open(self, name: str) -> None:
        """Keep a file open, whatever becomes of its name."""
        if name in self.handles:
            return
        pair = [
            outcome(lambda root: os.open(root / name, os.O_RDWR), root)
            for root in (next(self.turns).point, self.model)
        ]
        if isinstance(pair[0], int) and isinstance(pair[1], int):
            self.handles[name] = (pair[0], pair[1])
        else:
            assert pair[0] == pair[1]

    @rule(name=NAMES, offset=OFFSETS, size=SIZES, byte=st.integers(1, 255))
    def write_held(self, name: str, offset: int, size: int, byte: int) -> None:
        for descriptor in self.handles.get(name, ()):
            assert os.pwrite(descriptor, bytes([byte]) * size, offset) == size

    @rule(name=NAMES)
    def close_held(self, name: str) -> None:
        for descriptor in self.handles.pop(name, ()):
            os.close(descriptor)

    @rule(number=st.integers(0, 1), mode=st.sampled_from(["on", "on", "frozen", "off"]))
    def set_mode(self, number: int, mode: str) -> None:
        self.clients[number % len(self.clients)].mode = mode

    @invariant()
    def everything_is_the_same(self) -> None:
        for name in (".", "a", "b", "c", "d", "d/e", "d/f"):
            expected = outcome(lambda root: shown(root / name), self.model)  # noqa: B023
            for place in self.places:
                assert outcome(lambda root: shown(root / name), place.point) == expected  # noqa: B023


class RestartedMount(Mount):
    """The same, and now and then the daemon's code is replaced, whatever is open."""

    @rule(number=st.integers(0, 1))
    def restart(self, number: int) -> None:
        self.places[number % len(self.places)].restart()


def outcome(operation: Callable[[Path], object], root: Path) -> object:
    """Return what the operation returned, or the errno that it failed with."""
    try:
        return operation(root)
    except OSError as error:
        return f"errno {error.errno}"


def write_at(path: Path, offset: int, data: bytes) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        return os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def append_to(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def read_at(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def shown(path: Path) -> object:
    """Return what a program can see of a file: kind, mode, size, links, and content, listing or target."""
    status = path.lstat()
    common = (status.st_mode, status.st_nlink)
    if path.is_symlink():
        return (*common, os.fspath(path.readlink()))
    if path.is_dir():
        return (*common, sorted(entry.name for entry in path.iterdir()))
    return (*common, status.st_size, path.read_bytes())


@pytest.mark.parametrize(("cache", "examples"), [("auto", 8), ("direct", 12)])
def test_the_mount_behaves_as_a_plain_directory(
    segment: "_native.Segment", mounter: Mounter, monkeypatch: pytest.MonkeyPatch, cache: str, examples: int
) -> None:
    in_plenty(monkeypatch)
    place = mounter(f"timeout=0,client=web1,cache={cache}")
    place.kernel_caches = cache == "auto"
    run(segment, [place], examples=examples)


@pytest.mark.slow
def test_restarts_do_not_show(segment: "_native.Segment", mounter: Mounter) -> None:
    place = mounter("timeout=0,client=web1")
    run(segment, [place], RestartedMount, examples=10)
    assert place.restart().count > 1  # on a busy machine examples are short


def test_mounts_on_a_shared_pool_behave_as_one_plain_directory(
    segment: "_native.Segment", mounter: Mounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_plenty(monkeypatch)
    shared = uuid.uuid4()
    places = []
    for name, cache in (("web1", "auto"), ("web2", "direct")):
        segment.client(name).authorise(shared.bytes)
        options = f"timeout=0,client={name},shared={shared},cache={cache}"
        places.append(mounter(options, point=tmp_path / name))
        places[-1].kernel_caches = cache == "auto"
    run(segment, places)


def run(
    segment: "_native.Segment", places: list[Place], machine: type[Mount] = Mount, examples: int = 20
) -> None:
    Mount.places = places
    Mount.clients = [segment.client(f"web{number + 1}", create=False) for number in range(len(places))]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
    for place in places:
        statistics = place.statistics()
        assert statistics.hit_reads > 0 or place.kernel_caches  # then these are mostly the kernel's
        assert statistics.foreign_changes > 0
    assert segment.check() == []
