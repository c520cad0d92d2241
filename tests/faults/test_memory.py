"""Memory runs out under load: writes are refused, pages stay, reads go on, and room that returns is used.

Three bounds: the segment itself, the tmpfs that it lies on, and the control group of who serves the device.
Pages that go to tiers meanwhile are in `test_tiers`. A spill file has all of its size from the first, so a
disk that is full is met when one is made: tests/backends/tiers/test_spill.py.
"""

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.fs import syscalls
from tmem.types import OID_SIZE, PAGE_SIZE

from ..groups import set_limit, used_bytes
from .board import Child, Word, wait
from .serving import Serving, load, serving
from .world import World, check

FULL = frozenset({errno.ENOSPC})
_MIB = 1 << 20
_DEVICE_BYTES = 24 * _MIB
"""Of which the load's pages take about half when compressed."""

Make = Callable[[int, int], tuple[_native.Segment, SegmentPaths]]


@pytest.fixture
def tmpfs(root: None, runtime_dir: Path) -> Iterator[Path]:
    """A tmpfs of its own, whose size `grow` sets."""
    directory = runtime_dir / "tmpfs"
    directory.mkdir(mode=0o700)
    syscalls.mount("tmem-test", str(directory), "tmpfs", 0, "size=64m,mode=700")
    yield directory
    syscalls.umount(str(directory), syscalls.MNT_DETACH)


@pytest.fixture
def make(tmpfs: Path) -> Iterator[Make]:
    """Make a segment of so many bytes on a tmpfs of so many bytes of its own."""
    made: list[_native.Segment] = []

    def make(memory_bytes: int, tmpfs_bytes: int) -> tuple[_native.Segment, SegmentPaths]:
        grow(tmpfs, tmpfs_bytes)
        paths = SegmentPaths("default", tmpfs)
        paths.state.mkdir(mode=0o700)
        made.append(_native.create(str(paths.segment), memory_bytes))
        return made[0], paths

    yield make
    for segment in made:
        segment.close()


def grow(directory: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(directory)], check=True)


def until_refused(swap: Child, times: int) -> None:
    """Wait until so many writes were refused while others, and reads, were served."""
    swap.wait(lambda: swap.board[Word.REFUSED] >= times, f"{times} writes are refused")
    swap.proceed(200)


def none_refused(swap: Child, answers: int) -> bool:
    """Say whether all of so many further requests were served."""
    before = swap.board[Word.REFUSED]
    swap.proceed(answers)
    return swap.board[Word.REFUSED] == before


def test_the_segment_is_full(make: Make, tmp_path: Path, seed: str) -> None:
    segment, paths = make(24 * _MIB, 64 * _MIB)
    hog = segment.client("hog").new_pool(persistent=True)
    noise, stored = random.Random(seed), 0
    while stored < 4000 and hog.put(bytes(OID_SIZE), stored, noise.randbytes(PAGE_SIZE)):
        stored += 1
    with (
        serving(Serving(paths, segment, "guest1", _DEVICE_BYTES)) as made,
        load(made, tmp_path / "error", seed, FULL) as swap,
    ):
        for _ in range(3):
            until_refused(swap, swap.board[Word.REFUSED] + 50)
            made.kill()  # and again with no more memory than before
            made.start()
        swap.rest()
        check(segment)
        buffer, again = bytearray(PAGE_SIZE), random.Random(seed)
        for index in range(stored):
            assert hog.get(bytes(OID_SIZE), index, buffer) == 1
            assert buffer == again.randbytes(PAGE_SIZE)
        hog.destroy()
        swap.work()
        assert none_refused(swap, 2000)
    check(segment)


def test_the_tmpfs_is_full(make: Make, tmp_path: Path, seed: str) -> None:
    """A chunk that cannot be backed is a refused write, never a SIGBUS."""
    segment, paths = make(64 * _MIB, 8 * _MIB)
    with (
        serving(Serving(paths, segment, "guest1", _DEVICE_BYTES)) as made,
        load(made, tmp_path / "error", seed, FULL) as swap,
    ):
        until_refused(swap, 50)
        assert made.runs
        swap.rest()
        check(segment)
        # Who dies now can be started again, and serves every page.
        made.kill()
        made.start()
        swap.work()
        until_refused(swap, swap.board[Word.REFUSED] + 50)
        grow(paths.directory, 64 * _MIB)
        wait(lambda: none_refused(swap, 200), "room is used")
        swap.proceed(1000)
    check(segment)


def test_there_is_not_even_room_for_a_record(
    tmpfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    """The tmpfs is full to its last page: who dies is started again all the same, and serves every page."""
    monkeypatch.setenv("TMEM_RUNTIME_DIR", str(tmpfs))
    world = World(SegmentPaths("default", tmpfs), tmp_path, seed, FULL)
    try:
        world.open()
        filler = tmpfs / "filler"
        fill(filler)
        for die in (world.kill_server, world.kill_manager, world.kill_daemon):
            world.work()
            die()
            if die == world.kill_manager:
                world.start_manager()
            if die == world.kill_daemon:
                world.mount()
            for child in world.loads:
                child.proceed(50)
            world.rest()
        filler.unlink()
        world.work()
        world.rest()
    finally:
        print(world.said())
        world.close()


def fill(path: Path) -> None:
    """Write to a file until there is no room."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE_SIZE))
    assert os.statvfs(path).f_bavail == 0


def test_a_control_group_is_full(
    make: Make, tmp_path: Path, seed: str, control_group: Callable[..., Path]
) -> None:
    """Memory is charged to who touches it first: here to the server, in a group with a limit.

    The kernel refuses the memory if it may kill nobody in the group (OOM score -1000), else it kills. Then
    the next server has what the killed one has acknowledged.
    """
    group = control_group()
    segment, paths = make(64 * _MIB, 80 * _MIB)
    with serving(Serving(paths, segment, "guest1", _DEVICE_BYTES)) as made:
        (group / "cgroup.procs").write_text(str(made.pid))
        with load(made, tmp_path / "error", seed, FULL) as swap:
            set_limit(group, used_bytes(group) + 4 * _MIB)
            swap.wait(lambda: swap.board[Word.REFUSED] >= 50 or not made.runs, "the group is full")
            set_limit(group, 128 * _MIB)
            if not made.runs:
                made.start()
            wait(lambda: none_refused(swap, 200), "room is used")
            swap.proceed(500)
    check(segment)
