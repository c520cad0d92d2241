"""Bring what a swap device of this machine holds back into RAM, and use the device again, empty.

Swap takes slots for cheap: a page that was swapped out once and never needed again stays as long as its
process, and which slots are free the kernel tells late, or without discard never. So pages gather in the
segment. After swapoff everything on the device but its header (the first page) is stale and is flushed from
the pool, and the device is used again as it was before.

A signal that would end the process stops swapoff, and takes effect once the device is in use: with what is
still on it, or empty. Killed outright, this leaves a device that may not be in use, and a mark that says so;
the next `shrink` completes that, and so does the manager if it was its own. Not for devices that other
machines swap to: their kernels have to do it. Blocking; in the main thread, or signals do not wait.
"""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, TmemError
from tmem.nbd import export, lifecycle, server, swap
from tmem.nbd.export import Export, SwapUse
from tmem.types import OID_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` has done: the bytes that the kernel took back, the pages that the pool had and has."""

    returned_bytes: int
    pages_before: int
    pages: int


def shrink(
    paths: SegmentPaths,
    client: str,
    to_bytes: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda left_bytes: None,
) -> Shrunk:
    """Bring the pages of the device of `client` back and drop what is stale; nothing if they are within
    `to_bytes`.

    All or nothing: swapoff knows no half. `progress` gets the bytes that are still to come back. Raises
    `AttachError` if RAM does not suffice (unless `force`), if the device is not swap of this machine, and if
    it fails; the device is in use then, or the message says how to go on.
    """
    with lifecycle.exclusive(paths, client), lifecycle.attached(paths) as store:
        made = export.load(paths, client)
        device = _device_of(made)
        pool = _pool_of(store, client)
        before = pool.statistics()["pages"]
        entry = swap.entry(device)
        used_bytes = 0 if entry is None else entry.used_bytes
        if entry is not None and to_bytes is not None and before * PAGE_SIZE <= to_bytes:
            return Shrunk(0, before, before)
        _check(paths, made, pool, used_bytes, force)
        use = made.use
        if use is None:
            if entry is None:
                raise AttachError(
                    f"{device} is not in use as swap: complete it with 'tmem swap add {client} --attach' "
                    "and the options of before"
                )
            use = SwapUse(entry.priority if entry.priority >= 0 else None)
        _empty(paths, made, pool, device, use, progress)
        return Shrunk(used_bytes, before, pool.statistics()["pages"])


def _device_of(made: Export) -> str:
    if made.attachment is None or made.attachment.device is None:
        raise AttachError(
            f"{made.client} is not swap of this machine: where it is, run 'swapoff DEVICE && "
            "swapon --discard DEVICE', with DEVICE as it is called there"
        )
    return made.attachment.device


def _pool_of(store: "_native.Segment", client: str) -> "_native.Pool":
    for pool in store.client(client, create=False).pools():
        if pool.persistent:
            return pool
    raise AttachError(f"{client} has no persistent pool: remove it with 'tmem swap remove {client}'")


def _check(paths: SegmentPaths, made: Export, pool: "_native.Pool", used_bytes: int, force: bool) -> None:
    """Raise `AttachError` if somebody else may have pages on the device, or the pages have no room in RAM."""
    if pool.client.phase != "none":
        raise AttachError(f"{made.client} is being handed over: wait until that has ended")
    connected = server.connections(paths, made)
    if connected > 1:  # ours
        raise AttachError(
            f"{connected - 1} other clients are connected to {made.client}, which may have pages there: "
            "let them disconnect first"
        )
    if not force:
        lifecycle.require_room(made.client, used_bytes)


def _empty(
    paths: SegmentPaths,
    made: Export,
    pool: "_native.Pool",
    device: str,
    use: SwapUse,
    progress: Callable[[int], None],
) -> None:
    """Stop using the device, drop its pages and use it again; whatever happens, it is in use at the end."""
    mark = export.emptying(paths, made.client)
    with _held_back() as received:

        def watch(left_bytes: int) -> None:
            progress(left_bytes)
            if received:
                raise AttachError(f"interrupted: {device} stays in use")

        with contextlib.suppress(OSError):  # a state directory that is full has no room for it
            mark.touch(0o600)
        try:
            swap.off(device, watch)
        finally:
            # Also if it was interrupted too late, or another swapoff was quicker.
            if not swap.is_active(device):
                _use_again(paths, made, pool, device, use)
            mark.unlink(missing_ok=True)


def _use_again(paths: SegmentPaths, made: Export, pool: "_native.Pool", device: str, use: SwapUse) -> None:
    """Flush every page but the swap header, and swapon as `use` says."""
    try:
        with _nobodys(device):
            pool.flush(bytes(OID_SIZE), 1, made.size_bytes // PAGE_SIZE - 1)
        with _blocked():  # children too, which Ctrl-C reaches as well
            try:
                swap.on(device, use.priority, use.discard, header=False)
            except AttachError:  # a header that is not there, or not what it should be
                swap.on(device, use.priority, use.discard)
    except TmemError as error:
        if swap.is_active(device):  # another hand was quicker: what is there now is live
            return
        prefix = f"tmem --name {paths.name}"
        raise AttachError(
            f"{device} is empty, but not in use as swap any more ({error}): try '{prefix} shrink "
            f"{made.client}' again, or take it away with '{prefix} swap remove {made.client}'"
        ) from None


@contextlib.contextmanager
def _held_back() -> Iterator[list[int]]:
    """Only note signals that would end the process, in the list; the first takes effect at the end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def _nobodys(device: str) -> Iterator[None]:
    """Keep everybody else from using the device: a page that the kernel swapped out now would be flushed."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        by_others = error.errno == errno.EBUSY
        raise AttachError("somebody else uses it" if by_others else str(error.strerror)) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
