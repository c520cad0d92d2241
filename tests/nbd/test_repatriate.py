"""Swapped-out pages come back by themselves, gently: real swap, read in by steps that stop for anybody."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

from tmem.backends import meminfo, service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.nbd import lifecycle, repatriate, swap, swapin

from ..groups import set_limit
from .conftest import Server, eventually, needs_root
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


@contextlib.contextmanager
def added(tmem: Tmem, *start: str) -> Iterator[str]:
    """A swap device of this machine, in use, without discard: so what is stale stays until it is dropped."""
    needs_root()
    assert tmem("start", "-d", *start).returncode == 0
    made = tmem(
        "swap", "add", "local", "--size", "56M", "--attach", "--force", "--priority", "32767", "--no-discard"
    )
    assert made.returncode == 0, made.stderr
    device = made.stdout.splitlines()[0]
    try:
        yield device
    finally:
        swap.off(device)


@pytest.fixture
def device(swapping: None, tmem: Tmem) -> Iterator[str]:
    with added(tmem) as made:
        yield made


@pytest.fixture
def hog(device: str, control_group: Callable[..., Path]) -> Iterator[Hog]:
    """A hog with more than 12 MiB on the device."""
    with filled(control_group(SMALL_GROUP_BYTES), HOG_BYTES) as made:
        assert used_bytes(device) > 12 * MIB
        yield made


def until_done(paths: SegmentPaths) -> repatriate.Repatriated:
    """Bring all but a MiB in by reading, and then the rest, however often others are in the way."""
    done = repatriate.Repatriated(stopped="not begun")
    read = 0

    def goes_through() -> bool:
        nonlocal done, read
        done = repatriate.repatriate(paths, "local", MIB)
        read += done.read_pages
        return not done.stopped

    eventually(goes_through, "a pass goes through")
    done.read_pages = read
    return done


def test_everything_comes_back_in_steps_once_its_group_has_room(
    paths: SegmentPaths, device: str, hog: Hog, segment: "_native.Segment"
) -> None:
    before = used_bytes(device)

    def refused() -> bool:
        return f"the control group {hog.group} would need" in repatriate.repatriate(paths, "local").stopped

    eventually(refused, "the group is named")
    assert used_bytes(device) > before - STRAY_BYTES

    set_limit(hog.group, LARGE_GROUP_BYTES)
    done = until_done(paths)
    assert done.read_pages > 2500  # nearly all of it by reading, not by swapoff
    assert done.dropped_pages > 2500
    assert pages(segment) < STRAY_PAGES
    entry = swap.entry(device)
    assert entry is not None
    assert entry.used_bytes < STRAY_BYTES
    assert entry.priority == 32767
    assert hog.bad_pages() == 0


def test_what_nobody_has_any_more_needs_no_reading(
    paths: SegmentPaths, device: str, hog: Hog, segment: "_native.Segment"
) -> None:
    hog.process.kill()
    hog.process.wait()
    eventually(lambda: is_freed(device, hog), "the kernel has freed the slots")
    assert pages(segment) > 3000
    until_done(paths)
    assert pages(segment) < STRAY_PAGES


def test_it_stops_at_the_step_after_somebody_needs_memory(
    device: str, hog: Hog, control_group: Callable[..., Path]
) -> None:
    """What it has read the kernel may drop again without writing: the slots stay."""
    set_limit(hog.group, LARGE_GROUP_BYTES)
    steps = 0

    def go_on() -> bool:
        nonlocal steps
        steps += 1
        return steps <= 3

    slept: list[float] = []
    before = used_bytes(device)
    assert 0 < swapin.bring_in(go_on, sleep=slept.append) <= 3 * swapin.BATCH_PAGES
    assert sum(slept) >= 3 * swapin.BATCH_PAGES / swapin.PAGES_PER_S * 0.9
    assert used_bytes(device) > before - 3 * swapin.BATCH_PAGES * 4096

    # And to the end: what is read is in RAM, and keeps its slot.
    wanted = meminfo.read().swap_cached_bytes + 4 * MIB
    swapin.bring_in(lambda: True, sleep=lambda s: None)
    eventually(lambda: meminfo.read().swap_cached_bytes > wanted, "it is in the swap cache")
    assert used_bytes(device) > 12 * MIB

    # A swapoff ends, too.
    watch = repatriate._Watch(device)
    watch.swapoff(MIB)
    with filled(control_group(8 * MIB), 12 * MIB), pytest.raises(repatriate._NeededError):
        watch.swapoff(MIB)  # the kernel has swapped out since
    assert "swaps out" in watch.why
    watch.swapoff(0)  # it is through: nothing to end any more
    assert swap.is_active(device)
    assert hog.bad_pages() == 0


def test_a_device_that_somebody_swapped_off_stays_so(tmem: Tmem, device: str) -> None:
    swap.off(device)
    assert tmem("shrink", "--gently").returncode == 0
    assert not swap.is_active(device)
    refused = tmem("shrink", "local", "--gently")
    assert refused.returncode == 1
    assert "local is not in use as swap of this machine" in refused.stderr


# Shrinks a device, and is killed outright once the swapoff is over, or amid it.
KILLED = """
import os, signal, sys
from tmem.backends.paths import SegmentPaths
from tmem.nbd import shrink, swap
when, device = sys.argv[1:]
swap._PROGRESS_INTERVAL_S = 0.001
first = swap.entry(device).used_bytes
def progress(left_bytes):
    if not swap.is_active(device) if when == "late" else left_bytes < first:
        os.kill(os.getpid(), signal.SIGKILL)
shrink.shrink(SegmentPaths.of("default"), "local", progress=progress)
"""


def test_a_device_that_a_pass_left_unused_when_it_was_killed_is_used_again(
    tmem: Tmem, device: str, paths: SegmentPaths
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, "late", device], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not swap.is_active(device)
    assert tmem("shrink", "--gently", "--json", "--complete").returncode == 0
    entry = swap.entry(device)
    assert entry is not None
    assert entry.priority == 32767

    # And no more than once: what is off after that somebody has wanted.
    swap.off(device)
    assert tmem("shrink", "--gently", "--json", "--complete").returncode == 0
    assert tmem("shrink", "--gently").returncode == 0
    assert not swap.is_active(device)


def test_a_swapoff_whose_command_was_killed_ends(
    device: str, hog: Hog, control_group: Callable[..., Path]
) -> None:
    """It would go on alone, and leave a device that nobody uses. The kernel ends it between two processes."""

    def swapoffs() -> list[str]:
        command = ["pgrep", "-xf", f"swapoff {device}"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

    with filled(control_group(SMALL_GROUP_BYTES), HOG_BYTES) as other:
        for one in (hog, other):
            set_limit(one.group, LARGE_GROUP_BYTES)
        killed = subprocess.run([sys.executable, "-c", KILLED, "amid", device], check=False)
        assert killed.returncode == -signal.SIGKILL
        eventually(lambda: not swapoffs(), "swapoff has ended")
        assert swap.is_active(device)
        assert used_bytes(device) > STRAY_BYTES
        assert other.bad_pages() == hog.bad_pages() == 0


def test_devices_of_guests_are_theirs(tmem: Tmem, swap_server: Server, paths: SegmentPaths) -> None:
    assert repatriate.repatriate(paths) == repatriate.Repatriated()
    with pytest.raises(AttachError, match="not in use as swap of this machine"):
        repatriate.repatriate(paths, "guest1")
    done = tmem("shrink", "--gently", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["cpu_ns"] > 0
    assert said["stopped"] == ""


def test_the_manager_does_it_when_memory_was_in_plenty(
    swapping: None,
    tmem: Tmem,
    paths: SegmentPaths,
    segment: "_native.Segment",
    control_group: Callable[..., Path],
) -> None:
    def manager() -> dict[str, int]:
        statistics = service.ping(paths)[1]["statistics"]
        assert isinstance(statistics, dict)
        return statistics

    with (
        added(tmem, "--repatriate", "1s") as device,
        filled(control_group(SMALL_GROUP_BYTES), HOG_BYTES) as hog,
    ):
        assert manager()["repatriation_idle_ns"] == 10**9
        set_limit(hog.group, LARGE_GROUP_BYTES)
        eventually(lambda: manager()["repatriations"] > 0, "a pass went through")
        eventually(lambda: pages(segment) < STRAY_PAGES, "the pool is empty")
        assert swap.is_active(device)
        assert manager()["repatriated_pages"] > 2500
        assert manager()["repatriating_ns"] > 0
        assert hog.bad_pages() == 0
        other = tmem("start", "-d", "--repatriate", "2h")
        assert other.returncode == 1
        assert "another --repatriate" in other.stderr


def test_it_goes_after_all_others(swapping: None, tmem: Tmem, paths: SegmentPaths) -> None:
    """Also when a manager under SCHED_RR starts it."""
    script = (
        "import os, sys; from tmem.cli.main import main; import atexit;"
        "os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1));"
        "atexit.register(lambda: print(os.sched_getscheduler(0), os.nice(0), flush=True));"
        "sys.argv = ['tmem', 'shrink', '--gently']; main()"
    )
    needs_root()
    assert tmem("start", "-d").returncode == 0
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr:
        pytest.skip("no realtime scheduling here")
    assert done.stdout.splitlines()[-1] == f"{os.SCHED_OTHER} 19"


def test_removing_a_device_waits_for_a_pass(tmem: Tmem, device: str, paths: SegmentPaths) -> None:
    """A shutdown must not fail because the manager is bringing pages back at that moment."""
    holds, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lifecycle.exclusive(paths, "local"):
            holds.set()
            over.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(60)
    began = time.monotonic()  # before that, or the two may be closer
    threading.Timer(0.5, over.set).start()
    removed = tmem("swap", "remove", "local")
    holder.join()
    assert removed.returncode == 0, removed.stderr
    assert time.monotonic() - began > 0.4
    assert not swap.is_active(device)
