"""Empties the swap devices of this machine gently, where memory is in plenty: in small steps that can stop.

First the pages of programs are read into RAM (`swapin`), where they hold memory that the kernel can have back
at once. When no more than `LEFT_BYTES` of them are missing, `shrink` empties the device: swapoff, which now
takes moments, what is stale dropped, swapon. Before each step it looks whether somebody waits for memory, the
kernel swaps out, or too little is available, and then stops: what was read is the kernel's to drop, and the
device is in use as before. A swapoff is ended for want of memory too, as far as the kernel lets it: between
two processes.

A device that is not in use is left alone: somebody may have wanted that. But one that a `shrink` or a pass
has left so because it was killed is used again first. For the manager (`tmem.backends.repatriator`), which
runs it as a process, and for people. Blocking; in the main thread.
"""

import time
from dataclasses import dataclass

from tmem.backends import pressure
from tmem.backends.paths import SegmentPaths
from tmem.backends.repatriating import LEAST_BYTES, objection
from tmem.backends.repatriator import sample
from tmem.errors import AttachError
from tmem.nbd import export, lifecycle, room, shrink, swap, swapin
from tmem.nbd.export import Export
from tmem.types import PAGE_SIZE, format_size

LEFT_BYTES = 32 << 20
"""So much swapoff may have to read."""
_LAPS = 2
"""How often to go through the processes: pages that were swapped out meanwhile come in the second."""
_ENDS_S = 2.0
"""How long a swapoff whose command was killed may take to notice."""
_GROUPS_S = 2.0
"""How often to look whether control groups have room, which takes milliseconds."""
_STALLS_S = 1.0
"""Over how long to judge how much of it somebody waits for memory: a single wait is none."""


@dataclass
class Repatriated:
    """What came of a pass: bytes that programs had on the devices and that came back, pages that pools no
    longer keep, those read in first, and why it stopped (or ``""``)."""

    returned_bytes: int = 0
    dropped_pages: int = 0
    read_pages: int = 0
    stopped: str = ""


def repatriate(
    paths: SegmentPaths,
    client: str | None = None,
    left_bytes: int = LEFT_BYTES,
    only_complete: bool = False,
) -> Repatriated:
    """Empty the devices of this machine, or that of `client`, as far as that disturbs nobody.

    `left_bytes` is how much swapoff may have to read. With `only_complete` it does no more than use
    those again that were left unused.
    Raises `TmemError` if `client` has none, or the kernel fails.
    """
    done = Repatriated()
    for made in export.load_all(paths) if client is None else [export.load(paths, client)]:
        device = None if made.attachment is None else made.attachment.device
        if device is not None and export.emptying(paths, made.client).exists():
            _complete(paths, made, device, done, wait_s=_ENDS_S if only_complete else 0.0)
        if only_complete:
            continue
        if device is None or swap.entry(device) is None:
            if client is not None:
                raise AttachError(f"{client} is not in use as swap of this machine: see 'tmem list {client}'")
            continue
        if pages_of(paths, made.client) * PAGE_SIZE >= LEAST_BYTES:
            _one(paths, made, device, left_bytes, done)
        if done.stopped:
            break
    return done


def pages_of(paths: SegmentPaths, client: str) -> int:
    """Return how many pages the pool of a client keeps."""
    with lifecycle.attached(paths) as store:
        return sum(
            pool.statistics()["pages"]
            for pool in store.client(client, create=False).pools()
            if pool.persistent
        )


def _complete(paths: SegmentPaths, made: Export, device: str, done: Repatriated, wait_s: float) -> None:
    """Use the device again if one that was killed has left it unused; its swapoff may still be ending."""
    until_s = time.monotonic() + wait_s
    while swap.is_active(device):
        if time.monotonic() >= until_s:
            if wait_s:
                export.emptying(paths, made.client).unlink(missing_ok=True)
            return
        time.sleep(0.05)
    shrunk = shrink.shrink(paths, made.client)
    done.dropped_pages += max(shrunk.pages_before - shrunk.pages, 0)


def _one(paths: SegmentPaths, made: Export, device: str, left_bytes: int, done: Repatriated) -> None:
    watch = _Watch(device)
    for _ in range(_LAPS):
        if watch.missing_bytes() <= left_bytes or not watch():
            break
        done.read_pages += swapin.bring_in(watch)
    if not watch():
        done.stopped = watch.why
        return
    if (left := watch.missing_bytes()) > left_bytes:
        done.stopped = (
            f"{format_size(left)} on {device} are of no process that could be asked (files on a tmpfs): "
            f"'tmem --name {paths.name} shrink {made.client}' brings them back"
        )
        return
    before = swap.entry(device)
    try:
        shrunk = shrink.shrink(paths, made.client, progress=watch.swapoff)
    except _NeededError:
        now = swap.entry(device)
        done.returned_bytes += max(before.used_bytes - now.used_bytes, 0) if before and now else 0
        done.stopped = watch.why
        return
    done.returned_bytes += shrunk.returned_bytes
    done.dropped_pages += max(shrunk.pages_before - shrunk.pages, 0)


class _NeededError(Exception):
    """Ends a swapoff."""


class _Watch:
    """Says whether a pass may go on; once it may not, `why` says what was in the way."""

    def __init__(self, device: str) -> None:
        self.why = ""
        self._device = device
        self._stalls = pressure.Stalls([pressure.MACHINE])
        self._stalled, self._stalls_s = self._stalls.share(time.monotonic()), time.monotonic()
        self._began = sample(0, 0.0)
        self._groups_s = float("-inf")

    def missing_bytes(self) -> int:
        """Return how much of the device is not in RAM as well, or less: never more than is swapped out."""
        entry = swap.entry(self._device)
        return 0 if entry is None else min(entry.used_bytes, sample(0, 0.0).missing_bytes)

    def __call__(self) -> bool:
        """Look, and answer for a step of reading; once it says no it says no."""
        if (now_s := time.monotonic()) - self._stalls_s >= _STALLS_S:
            self._stalled, self._stalls_s = self._stalls.share(now_s), now_s
        self._judge(self._stalled)
        if not self.why and now_s - self._groups_s >= _GROUPS_S:
            self._groups_s = now_s
            entry = swap.entry(self._device)
            # The kernel kills in a group that has no room for its pages.
            self.why = next(iter(room.lacking(0 if entry is None else entry.used_bytes)), "")
        return not self.why

    def swapoff(self, left_bytes: int) -> None:
        """Raise if a swapoff is to end: it waits for memory all the time itself, so only what is available
        and swapped out counts."""
        if left_bytes:
            self._judge(0.0)
            if self.why:
                raise _NeededError

    def _judge(self, stalled: float) -> None:
        self.why = self.why or objection(sample(0, stalled), self._began)
