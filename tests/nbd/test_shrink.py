"""Repatriation: real swap comes back from the device, which goes on empty, whatever happens on the way."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, cast

import pytest

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.nbd import attach, export, room, server, shrink, swap
from tmem.nbd.export import SwapUse

from ..groups import set_limit
from .conftest import Server, eventually, nbd, needs_root
from .hogs import (
    HOG_BYTES,
    LARGE_GROUP_BYTES,
    MIB,
    SMALL_GROUP_BYTES,
    STRAY_BYTES,
    STRAY_PAGES,
    Hog,
    filled,
    is_freed,
    pages,
    used_bytes,
)

if TYPE_CHECKING:
    from tmem.backends import _native

Tmem = Callable[..., CompletedProcess[str]]


@pytest.fixture
def device(swapping: None, tmem: Tmem, paths: SegmentPaths) -> Iterator[str]:
    """A swap device of this machine, in use, as a person makes it."""
    needs_root()
    assert tmem("start", "-d").returncode == 0
    added = tmem(
        "swap", "add", "local", "--size", "56M", "--attach", "--force", "--priority", "32767", "--no-discard"
    )
    assert added.returncode == 0, added.stderr
    made = added.stdout.splitlines()[0]
    yield made
    swap.off(made)


@pytest.fixture
def hog(device: str, control_group: Callable[..., Path]) -> Iterator[Hog]:
    """A hog with more than 12 MiB on the device."""
    with filled(control_group(SMALL_GROUP_BYTES), HOG_BYTES) as made:
        assert used_bytes(device) > 12 * MIB
        yield made


def test_everything_comes_back_and_the_device_goes_on(
    tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment"
) -> None:
    assert pages(segment) > 3000
    set_limit(hog.group, LARGE_GROUP_BYTES)
    used = segment.client("local").statistics()["used_bytes"]
    done = tmem("shrink", "local")
    assert done.returncode == 0, done.stderr
    assert "local has " in done.stdout
    assert pages(segment) < STRAY_PAGES
    assert segment.client("local").statistics()["used_bytes"] < used // 100
    entry = swap.entry(device)
    assert entry is not None
    assert entry.used_bytes < STRAY_BYTES
    assert entry.priority == 32767
    assert hog.bad_pages() == 0

    # The kernel swaps to it as before.
    set_limit(hog.group, SMALL_GROUP_BYTES)
    eventually(lambda: used_bytes(device) > 8 * MIB, "the hog swaps again")
    assert pages(segment) > 2000
    assert hog.bad_pages() == 0


def test_stale_pages_go(tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment") -> None:
    """Without discard nobody tells the pool that their owner is gone."""
    hog.process.kill()
    hog.process.wait()
    eventually(lambda: is_freed(device, hog), "the kernel has freed the slots")
    assert pages(segment) > 3000
    assert tmem("shrink", "local").returncode == 0
    assert pages(segment) < STRAY_PAGES


def test_to_a_size_that_is_kept(tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment") -> None:
    set_limit(hog.group, LARGE_GROUP_BYTES)
    before = pages(segment)
    done = tmem("shrink", "local", "--to", "56M")
    assert (done.returncode, done.stdout.partition(":")[0]) == (0, "nothing to do")
    assert pages(segment) >= before
    assert tmem("shrink", "local", "--to", "1M").returncode == 0
    assert pages(segment) < STRAY_PAGES
    assert hog.bad_pages() == 0


def test_a_group_that_would_be_full_is_named(
    tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment"
) -> None:
    """swapoff charges every page to its group again, and the kernel kills who is in a full one."""
    refused = tmem("shrink", "local")
    assert refused.returncode == 1
    assert f"the control group {hog.group} would need" in refused.stderr
    assert "is limited to 24M" in refused.stderr
    assert "--force" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert used_bytes(device) > 12 * MIB
    assert hog.bad_pages() == 0


@pytest.mark.parametrize("late", [False, True], ids=["during swapoff", "after swapoff"])
def test_interrupted_the_device_is_in_use(
    device: str, hog: Hog, paths: SegmentPaths, segment: "_native.Segment", late: bool
) -> None:
    set_limit(hog.group, LARGE_GROUP_BYTES)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(left_bytes: int) -> None:
        if (left_bytes == 0) == late:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        shrink.shrink(paths, "local", progress=interrupt)
    assert swap.is_active(device)
    assert signal.getsignal(signal.SIGINT) is before
    assert (pages(segment) < STRAY_PAGES) == late
    assert hog.bad_pages() == 0


def test_who_is_stopped_on_the_way_goes_on(device: str, hog: Hog, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-Z: swapoff(2) ends at any signal, SIGCONT as well."""
    set_limit(hog.group, LARGE_GROUP_BYTES)
    complaints: list[str] = []
    once = swap._run_swapoff

    def stopped_at_first(which: str, progress: Callable[[int], None]) -> str:
        def stop(left_bytes: int) -> None:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                if not complaints and "swapoff" in Path(f"/proc/{child}/comm").read_text():
                    os.kill(int(child), signal.SIGSTOP)
                    os.kill(int(child), signal.SIGCONT)

        complaints.append(once(which, stop))
        return complaints[-1]

    monkeypatch.setattr(swap, "_run_swapoff", stopped_at_first)
    monkeypatch.setattr(swap, "_PROGRESS_INTERVAL_S", 0.001)
    swap.off(device)
    assert "Interrupted system call" in complaints[0]
    assert complaints[-1] == ""
    assert swap.entry(device) is None
    assert hog.bad_pages() == 0


def test_a_device_that_another_hand_swapped_off_is_completed(
    tmem: Tmem, device: str, hog: Hog, segment: "_native.Segment"
) -> None:
    """As after a shrink that was killed outright."""
    set_limit(hog.group, LARGE_GROUP_BYTES)
    swap.off(device)
    assert pages(segment) > 3000
    assert tmem("shrink", "local", "--to", "56M").returncode == 0
    entry = swap.entry(device)
    assert entry is not None
    assert entry.priority == 32767
    assert pages(segment) < STRAY_PAGES
    assert hog.bad_pages() == 0


class Watched:
    """A pool that has something done while it is flushed."""

    def __init__(self, pool: "_native.Pool", meanwhile: Callable[[], None]) -> None:
        self._pool = pool
        self._meanwhile = meanwhile

    def flush(self, oid: bytes, index: int, npages: int) -> int:
        self._meanwhile()
        return self._pool.flush(oid, index, npages)


def test_nobody_else_can_use_the_device_while_its_pages_are_dropped(
    device: str, paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    """As "swapon -a" of a service would: what the kernel swapped out then would be dropped as well."""
    complaints: list[str] = []

    def others() -> None:
        tried = subprocess.run(["swapon", device], capture_output=True, text=True, check=False)
        complaints.append(tried.stderr)

    made = export.load(paths, "local")
    assert made.use is not None
    pool = cast("_native.Pool", Watched(shrink._pool_of(segment, "local"), others))
    swap.off(device)
    shrink._use_again(paths, made, pool, device, made.use)
    assert "busy" in complaints[0]
    entry = swap.entry(device)
    assert entry is not None
    assert entry.priority == 32767

    # Another hand was quicker: what is there is live.
    before = pages(segment)
    shrink._use_again(paths, made, pool, device, made.use)
    assert len(complaints) == 1
    assert pages(segment) >= before


def test_a_header_that_is_gone_is_written_anew(device: str, segment: "_native.Segment", tmem: Tmem) -> None:
    swap.off(device)
    with Path(device).open("r+b") as file:
        file.write(bytes(4096))
    assert tmem("shrink", "local").returncode == 0
    assert swap.is_active(device)
    assert pages(segment) < STRAY_PAGES


def test_frozen_it_comes_back_too(device: str, hog: Hog, segment: "_native.Segment", tmem: Tmem) -> None:
    """Freeze and shrink: no page is left, and no new one gets in."""
    set_limit(hog.group, LARGE_GROUP_BYTES)
    assert tmem("freeze", "local").returncode == 0
    assert tmem("shrink", "local").returncode == 0
    assert pages(segment) < STRAY_PAGES
    assert swap.is_active(device)
    assert hog.bad_pages() == 0
    assert tmem("thaw", "local").returncode == 0


def test_a_server_that_dies_after_swapoff(device: str, paths: SegmentPaths, tmem: Tmem) -> None:
    if attach.kernel_driver():
        pytest.skip("the kernel's driver waits for the server")

    def kill(left_bytes: int) -> None:
        if left_bytes == 0:
            service.request(paths, {"op": "stop"})  # or the manager starts it again
            process = server.running(paths, "local")
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            eventually(lambda: not process.alive, "the server is gone")

    with pytest.raises(AttachError) as caught:
        shrink.shrink(paths, "local", progress=kill)
    assert f"{device} is empty, but not in use as swap any more" in str(caught.value)
    assert "tmem --name default swap remove local" in str(caught.value)
    assert tmem("start", "-d").returncode == 0
    removed = tmem("swap", "remove", "local")
    assert removed.returncode == 0, removed.stderr


def test_others_that_are_connected_may_have_pages_there(
    device: str, paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    guest = nbd.NBD()
    guest.connect_uri(export.load(paths, "local").uri)
    guest.pwrite(b"its own", 50 * MIB)
    with pytest.raises(AttachError, match="1 other clients are connected to local"):
        shrink.shrink(paths, "local")
    assert guest.pread(7, 50 * MIB) == b"its own"
    guest.shutdown()
    eventually(lambda: server.connections(paths, export.load(paths, "local")) == 1, "it has left")
    shrink.shrink(paths, "local")
    assert pages(segment) < STRAY_PAGES


def test_a_device_of_a_guest_is_the_guests(tmem: Tmem, swap_server: Server) -> None:
    refused = tmem("shrink", "guest1")
    assert refused.returncode == 1
    assert "swapoff DEVICE && swapon --discard DEVICE" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_device_that_never_was_swap_is_left_alone(tmem: Tmem, swap_server: Server) -> None:
    needs_root()
    attached = attach.attach(swap_server.paths, swap_server.export)
    try:
        refused = tmem("shrink", "guest1")
        assert refused.returncode == 1
        assert "is not in use as swap" in refused.stderr
    finally:
        attach.detach(swap_server.paths, attached)


def test_how_it_is_used_is_in_the_record(device: str, paths: SegmentPaths) -> None:
    made = export.load(paths, "local")
    assert made.use == SwapUse(32767, discard=False)
    record = paths.record("swap", "local")
    record.write_text(record.read_text().replace('"use"', '"was"', 1))
    with pytest.raises(Exception, match="damaged"):
        export.load(paths, "local")
    made.save(paths)


# -- room, on machines made of files


MEMINFO = "MemTotal:        4194304 kB\nMemAvailable:     {} kB\n"


def machine(directory: Path, available_bytes: int, version: int) -> tuple[Path, Path]:
    """The /proc of a machine with 4 GiB, and the root of its memory controller."""
    proc, root = directory / "proc", directory / "cgroup"
    for path in (proc / "self", root):
        path.mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO.format(available_bytes >> 10))
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    (proc / "self" / "mountinfo").write_text(f"30 25 0:26 / {root} rw,nosuid - {kind}\n")
    (root / "cgroup.controllers").write_text("cpu memory\n")
    return proc, root


def group(root: Path, name: str, limit_bytes: int | None, here_bytes: int, swapped_bytes: int) -> None:
    """A group in both versions' words."""
    made = root / name
    made.mkdir(parents=True)
    half = here_bytes // 2
    (made / "memory.stat").write_text(
        f"anon {half}\nfile 99999999999\nshmem {half}\ntotal_rss {half}\ntotal_shmem {half}\n"
        f"total_swap {swapped_bytes}\n"
    )
    (made / "memory.swap.current").write_text(f"{swapped_bytes}\n")
    (made / "memory.max").write_text("max\n" if limit_bytes is None else f"{limit_bytes}\n")
    (made / "memory.limit_in_bytes").write_text(f"{limit_bytes or 9223372036854771712}\n")


def test_room_in_ram(tmp_path: Path) -> None:
    # A 32nd of 4 GiB has to stay.
    proc, _ = machine(tmp_path, 1128 * MIB, 2)
    assert room.lacking(1000 * MIB, proc) == []
    assert room.lacking(1001 * MIB, proc) == ["1.1G of RAM are available, less than 1001M and 128M to spare"]


@pytest.mark.parametrize(
    ("swapped_mib", "cached_mib", "needs_mib"),
    [
        (1200, 0, 1200),
        (1200, 300, 900),  # is there already
        (1200, 1200, 0),
        (2000, 700, 1200),  # may all be of another device, which has 800
        (2000, 1000, 1000),
    ],
)
def test_pages_that_are_in_ram_as_well_need_no_room(
    tmp_path: Path, swapped_mib: int, cached_mib: int, needs_mib: int
) -> None:
    for missing_mib in (0, 1):
        proc, _ = machine(tmp_path / str(missing_mib), (128 + needs_mib - missing_mib) * MIB, 2)
        with (proc / "meminfo").open("a") as file:
            file.write(f"SwapTotal: {4 << 20} kB\nSwapFree: {(4 << 20) - (swapped_mib << 10)} kB\n")
            file.write(f"SwapCached: {cached_mib << 10} kB\n")
        assert len(room.lacking(1200 * MIB, proc)) == missing_mib


@pytest.mark.parametrize(
    ("cached_mib", "listed_mib", "fits_mib"),
    [
        (0, 60, 110),
        (20, 60, 90),  # all of them are mapped, so they are among the 60 and among the 50
        (20, 72, 102),  # 12 of them are not
        (20, 500, 110),  # cannot be told: as many pages are on the lists for other reasons
    ],
)
def test_pages_of_a_group_are_counted_once(
    tmp_path: Path, cached_mib: int, listed_mib: int, fits_mib: int
) -> None:
    for missing_mib in (0, 1):
        proc, root = machine(tmp_path / str(missing_mib), 4000 * MIB, 2)
        group(root, "web", (fits_mib - missing_mib) * MIB, 60 * MIB, 50 * MIB)
        with (root / "web" / "memory.stat").open("a") as file:
            file.write(f"swapcached {cached_mib * MIB}\ninactive_anon {(listed_mib - 10) * MIB}\n")
            file.write(f"active_anon {8 * MIB}\nunevictable {2 * MIB}\n")
        assert len(room.lacking(1000 * MIB, proc)) == missing_mib


@pytest.mark.parametrize("version", [1, 2])
def test_room_in_control_groups(tmp_path: Path, version: int) -> None:
    proc, root = machine(tmp_path, 4000 * MIB, version)
    group(root, "unlimited", None, 500 * MIB, 500 * MIB)
    group(root, "fits", 100 * MIB, 50 * MIB, 50 * MIB)
    group(root, "never-swapped", 100 * MIB, 200 * MIB, 0)
    assert room.lacking(1000 * MIB, proc) == []
    group(root, "web/app", 100 * MIB, 60 * MIB, 50 * MIB)
    assert room.lacking(1000 * MIB, proc) == [
        f"the control group {root}/web/app would need 110M and is limited to 100M"
    ]
    # Not more can come back than the device has.
    assert room.lacking(20 * MIB, proc) == []


def test_room_without_control_groups(tmp_path: Path) -> None:
    proc, _ = machine(tmp_path, 4000 * MIB, 2)
    (proc / "self" / "mountinfo").write_text("")
    assert room.lacking(1000 * MIB, proc) == []


def test_signals_that_are_ignored_stay_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with contextlib.ExitStack() as stack:
            received = stack.enter_context(shrink._held_back())
            signal.raise_signal(signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)
