"""Real swap: a hog in a memory control group smaller than itself, on ours and on what one would use instead.

Ours and nbdkit's memory plugin go the same way: nbdkit, then the kernel's nbd driver or nbdfuse and a loop
device, mkswap, swapon. zram, zswap before a swap file, and the swap file are in the kernel. Speed is random
touches a second, every page verified; space is the most that held the pages meanwhile: the anonymous memory
of nbdkit, of ours the whole segment with metadata and reserve as well. What zswap holds the kernel charges to
the group, which therefore may have so much more. Root, and a thread that watches the space.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.bench import zram
from tmem.bench.grounds import (
    DISK,
    FIRST,
    memory_group,
    running,
    swapping_to,
    wait_for_socket,
    workplace,
)
from tmem.bench.nbd import INSTALL, PEERS, peer_arguments
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import OURS, Lacking, Outcome, Sample, Series, comparisons
from tmem.bench.rounds import take_turns
from tmem.errors import TmemError
from tmem.nbd import attach, server
from tmem.nbd.export import Export, load
from tmem.nbd.swap import entries

ZRAM, ZSWAP, FILE = "zram lz4", "zswap", "swap file"
SPEED_TARGETS = {ZRAM: 0.35, "nbdkit memory": 0.9}
SPACE_TARGETS = {"nbdkit memory": 0.5}

_WATCH_S = 0.1
HOG = Path(__file__).with_name("hog.py")
_MANAGER = """
import sys
from pathlib import Path
from tmem.backends import _native, manager
from tmem.backends.paths import SegmentPaths
paths = SegmentPaths("bench", Path(sys.argv[1]))
manager.run(paths, _native.attach(str(paths.segment)))
"""


@dataclass(frozen=True)
class Sizes:
    """The hog, the group that it may not outgrow, and the device."""

    hog: int
    group: int
    device: int


WHOLE = Sizes(384 << 20, 96 << 20, 512 << 20)
QUICK = Sizes(96 << 20, 32 << 20, 160 << 20)

ZSWAP_SHARE = 0.45
"""Of the pages outside the group: what zswap takes for the hog's with LZO, and a little more."""

Device = tuple[str, Callable[[], int]]
"""A block device or file to swap to, and how many bytes hold what is there."""


def resident_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; a mapped segment is counted by its file."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]) << 10


@contextmanager
def ours(stack: ExitStack, sizes: Sizes) -> Iterator[Device]:
    """Attach a device of ours, with a manager, as in real use."""
    directory = stack.enter_context(workplace())
    paths = SegmentPaths("bench", directory)
    paths.state.mkdir(mode=0o700)
    export = Export("bench", sizes.device, unix=str(directory / "server.sock"))
    segment = _native.create(str(paths.segment), sizes.device)
    stack.callback(segment.close)
    segment.client("bench").new_pool(persistent=True)
    log = directory / "log"
    stack.enter_context(running([sys.executable, "-c", _MANAGER, str(directory)], output=log))
    export.save(paths)
    # By the launcher: small stacks, one malloc arena.
    process = stack.enter_context(running(server.command(paths, "bench"), output=log))
    server.wait_ready(export)
    device = _attached(stack, paths, export)
    yield device, lambda: resident_bytes(process.pid) + paths.segment.stat().st_blocks * 512


@contextmanager
def nbdkit(name: str, stack: ExitStack, sizes: Sizes) -> Iterator[Device]:
    """Attach a device of nbdkit's memory plugin."""
    if shutil.which("nbdkit") is None:
        raise TmemError(f"nbdkit is not installed: {INSTALL}")
    directory = stack.enter_context(workplace())
    paths = SegmentPaths("bench", directory)
    paths.state.mkdir(mode=0o700)
    export = Export("bench", sizes.device, unix=str(directory / "server.sock"))
    socket = Path(str(export.unix))
    process = stack.enter_context(running(peer_arguments(name, socket, sizes.device)))
    wait_for_socket(socket, process, name)
    yield _attached(stack, paths, export), lambda: resident_bytes(process.pid)


def _attached(stack: ExitStack, paths: SegmentPaths, export: Export) -> str:
    """Attach until the stack closes; the block device."""
    export.save(paths)
    stack.callback(lambda: attach.detach(paths, load(paths, export.client)))  # what came about of it, too
    attached = attach.attach(paths, export).attachment
    assert attached is not None
    assert attached.device is not None
    return attached.device


@contextmanager
def on_zram(stack: ExitStack, sizes: Sizes) -> Iterator[Device]:
    """Make a zram device with LZ4."""
    directory, node = stack.enter_context(zram.device("lz4", sizes.device))
    yield str(node), lambda: zram.used_bytes(directory)


@contextmanager
def on_file(stack: ExitStack, sizes: Sizes, compressed: bool = False) -> Iterator[Device]:
    """Make a swap file on disk, with zswap before it if `compressed`."""
    if compressed and (reason := zram.zswap_lacks()) is not None:
        raise TmemError(reason)
    file = stack.enter_context(workplace(DISK)) / "swap"
    file.touch(mode=0o600)
    with file.open("r+b") as out:
        os.posix_fallocate(out.fileno(), 0, sizes.device)
    if compressed:
        stack.enter_context(zram.zswap(True))
    yield str(file), lambda: zram.zswap_bytes() if compressed else 0


PLACES: dict[str, Callable[[ExitStack, Sizes], contextlib.AbstractContextManager[Device]]] = {
    OURS: ours,
    ZRAM: on_zram,
    ZSWAP: partial(on_file, compressed=True),
    FILE: on_file,
    **{name: partial(nbdkit, name) for name in PEERS},
}


def turn(name: str, sizes: Sizes, seconds: float) -> Sample:
    """Run the hog once on a fresh device called `name`; touches a second, and the rest."""
    limit = sizes.group + (int((sizes.hog - sizes.group) * ZSWAP_SHARE) if name == ZSWAP else 0)
    with memory_group(limit) as group, ExitStack() as stack:
        stack.enter_context(zram.zswap(False))  # or it would stand before every device
        device, held = stack.enter_context(PLACES[name](stack, sizes))
        with swapping_to(device):
            with _most(held) as most:
                figures = _hog(group, sizes.hog, seconds)
            return Sample(
                figures["touches_per_s"],
                extra={
                    "held_bytes": most[0],
                    "swapped_out_pages": figures["swapped_out_pages"],
                    "swapped_in_pages": figures["swapped_in_pages"],
                    "slowest_touch_s": figures["slowest_touch_s"],
                },
            )


@contextmanager
def _most(held: Callable[[], int]) -> Iterator[list[int]]:
    """Yield a list with the most that `held` came to in the block: when a program ends, its pages go."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            with contextlib.suppress(OSError):
                most[0] = max(most[0], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def _hog(group: Path, size: int, seconds: float) -> dict[str, float]:
    stores = zram.zswap_stores()
    done = subprocess.run(
        [sys.executable, str(HOG), f"--size={size}", f"--seconds={seconds}", f"--cgroup={group}"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the hog failed with status {done.returncode}: {done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    figures["swapped_out_pages"] += zram.zswap_stores() - stores  # the kernel counts these apart
    if not figures["swapped_out_pages"]:
        raise RuntimeError("the hog was not swapped out: is swap disabled for its control group?")
    return figures


def lacking() -> list[Lacking]:
    """Return the peers that cannot be measured here."""
    reasons = {ZRAM: zram.lacks("lz4"), ZSWAP: zram.zswap_lacks()}
    return [Lacking(name, reason) for name, reason in reasons.items() if reason is not None]


def plan(effort: Effort) -> Plan:
    """Say what is needed."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    sizes, without = _sizes(effort), lacking()
    steps = rounds * (len(PLACES) - len(without))
    way = (
        "the kernel's nbd driver"
        if os.geteuid() == 0 and attach.kernel_driver()
        else "nbdfuse and a loop device"
    )
    return Plan(
        memory_bytes=sizes.device + sizes.group + (128 << 20),
        disk_bytes=sizes.device + (16 << 20),
        steps=steps,
        about_s=steps * (seconds + 3 + sizes.hog / (60 << 20)),
        says=f"a program of {sizes.hog >> 20} MiB limited to {sizes.group >> 20} MiB, swapping to devices of "
        f"{sizes.device >> 20} MiB made for it ({way}); zswap is switched off and on meanwhile",
        refused=_refused(),
        lacking=without,
    )


def _refused() -> str | None:
    if os.geteuid() != 0:
        return "swapping needs root: run this as root"
    if first := next((entry for entry in entries() if entry.priority == FIRST), None):
        return f"{first.device} is swapped to first, and would take pages: swapoff {first.device}"
    if shutil.which("nbdkit") is None:
        return f"nbdkit is not installed: {INSTALL}"
    if not attach.kernel_driver() and shutil.which("nbdfuse") is None:
        return "nbdfuse is not installed: apt-get install libnbd-bin || apt-get install nbdfuse"
    try:
        server.check_python()
        with memory_group(16 << 20):
            return None
    except (TmemError, OSError) as error:
        return str(error)


def run(effort: Effort, step: Step) -> Outcome:
    """Measure every device that there can be."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    sizes, without = _sizes(effort), lacking()
    outcome = Outcome()
    names = [name for name in PLACES if name not in {one.what for one in without}]
    ways = {name: partial(turn, name, sizes, seconds) for name in names}
    taken = take_turns(ways, rounds, lambda name: step(f"real swap: {name}"), outcome.lacking)
    speed = [Series("random touches", name, "touches/s", tuple(samples)) for name, samples in taken.items()]
    space = [
        Series("memory that holds the pages", name, "MiB", tuple(_held(sample) for sample in samples))
        for name, samples in taken.items()
    ]
    outcome.series = [*speed, *space]
    outcome.rows = [
        *comparisons(speed, targets=SPEED_TARGETS),
        *comparisons(space, "less", targets=SPACE_TARGETS),
    ]
    outcome.notes = {
        "hog_bytes": sizes.hog,
        "group_bytes": sizes.group,
        "attached_by": "nbd" if attach.kernel_driver() else "nbdfuse and loop",
    }
    if ZSWAP in taken:
        outcome.notes["zswap_compressor"] = zram.zswap_compressor()
    return outcome


def _held(sample: Sample) -> Sample:
    return Sample(sample.extra["held_bytes"] / (1 << 20))


def _sizes(effort: Effort) -> Sizes:
    return QUICK if effort.quick else WHOLE


def _chosen(effort: Effort) -> Effort:
    return effort.of(rounds=(3, 1), seconds=(5.0, 1.5))


PART = Part("swap", "Real swap", plan, run)
