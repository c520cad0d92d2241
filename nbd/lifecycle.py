"""A swap device from its first to its last moment: pool, record, servers, attachment, in this order and back.

Every step may be repeated after a failure. What `add` has made when it fails is taken away again; `remove`
goes on where it stopped. One command at a time per client (a lock file). Blocking; the caller may be the
command line or any program. The server itself is kept by the manager.
"""

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import clients, segment, tiering
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, PoolError, TmemError
from tmem.nbd import attach, export, guards, room, server, services, swap
from tmem.nbd.export import Export, SwapUse
from tmem.nbd.guards import Guard
from tmem.types import PAGE_SIZE, format_size, size_within

if TYPE_CHECKING:
    from tmem.backends import _native

RAW_PAGE_BYTES = PAGE_SIZE + 64
"""Memory of a page that does not compress: with its block's header, in the core's steps of 64 bytes."""
_DISCONNECT_TIMEOUT_S = 2.0
_LOCK_INTERVAL_S = 0.05
_REMOVE_WAIT_S = 60.0
"""How long `remove` waits for a command that works on the device: the manager may be bringing pages back by
itself (`repatriate`), and a shutdown must not fail for that."""


@dataclasses.dataclass(frozen=True)
class SwapOptions:
    """How an attached device is used: priority (None: the kernel's choice), discard, and against the
    guards."""

    priority: int | None = None
    discard: bool = True
    force: bool = False


def default_socket(paths: SegmentPaths, client: str) -> str:
    """Return the socket of a server that was given no address."""
    return str(paths.state / f"swap-{client}.sock")


def add(
    paths: SegmentPaths,
    wanted: Export,
    local: SwapOptions | None = None,
    show: Callable[[Sequence[Guard]], None] = lambda guards: None,
) -> Export:
    """Make the swap device `wanted`; return it once its server answers, with `local` also attached and in
    use.

    `show` gets the guards of a local device before they are judged. The same device again only completes what
    is missing. Raises `TmemError`; then nothing is left that was not there before.
    """
    server.check_python()
    with exclusive(paths, wanted.client), attached(paths) as store, contextlib.ExitStack() as undo:
        made = _recorded(paths, wanted)
        if made is None:
            if wanted.unix is not None:
                server.check_socket(Path(wanted.unix))
            undo.callback(forget, paths, wanted.client)
            made = wanted
            made.save(paths)
        if _make_pool(store, wanted.client):
            undo.callback(_drop_pool, store, wanted)
        if wanted.reserve:
            _reserve(paths, store, wanted, undo)
        if server.running(paths, wanted.client) is None:
            undo.callback(services.stop_server, paths, wanted.client)
            services.start_server(paths, made)
        else:
            services.wait_server(paths, made)
        if local is not None:
            made = _attach(paths, made, local, show, undo)
        undo.pop_all()
    return made


def remove(
    paths: SegmentPaths,
    client: str,
    progress: Callable[[int], None] = lambda left_bytes: None,
    force: bool = False,
) -> None:
    """Take the swap device of `client` away: swapoff, detach, stop the server, drop the pool, forget it.

    `progress` gets the bytes that swapoff has still to bring back. Safe to repeat after a failure. Raises
    `TmemError`, also while somebody else is connected to the server, and, without `force`, where RAM or the
    limit of a control group does not suffice for what comes back: the kernel would kill processes.
    """
    with exclusive(paths, client, _REMOVE_WAIT_S):
        made = export.load(paths, client)
        if made.attachment is not None and made.attachment.device is not None:
            used = swap.entry(made.attachment.device)
            if not force and used is not None:
                require_room(client, used.used_bytes)
            swap.off(made.attachment.device, progress)
        services.stop(paths, client, "keeper")
        made = attach.detach(paths, made)
        services.stop_server(paths, client, "standby")
        _check_unused(paths, made)
        services.stop_server(paths, client)
        if paths.segment.exists():
            with attached(paths) as store:
                _drop_pool(store, made)
                _end_tier(paths, store, client)
        forget(paths, client)


def _recorded(paths: SegmentPaths, wanted: Export) -> Export | None:
    """Return the record of the same device; TmemError if it is another one."""
    if not export.exists(paths, wanted.client):
        return None
    found = export.load(paths, wanted.client)
    if found.replace_attachment(None) != wanted.replace_attachment(None):
        raise TmemError(
            f"there is a swap device {wanted.client} already ({format_size(found.size_bytes)}, {found.uri}): "
            f"remove it first with tmem swap remove {wanted.client}"
        )
    return found


def _make_pool(store: "_native.Segment", client: str) -> bool:
    """Give the client its persistent pool unless it has one; whether it was made now."""
    owner = store.client(client)
    if any(pool.persistent for pool in owner.pools()):
        return False
    owner.new_pool(persistent=True)
    return True


def _reserve(
    paths: SegmentPaths, store: "_native.Segment", wanted: Export, undo: contextlib.ExitStack
) -> None:
    """Promise the client the memory of the whole device, uncompressed; TmemError if the segment lacks it."""
    owner = store.client(wanted.client)
    before, floor = owner.floor_bytes, wanted.size_bytes // PAGE_SIZE * RAW_PAGE_BYTES
    if before >= floor:
        return
    try:
        owner.floor_bytes = floor
    except PoolError:
        most = size_within(owner.most_floor_bytes // RAW_PAGE_BYTES * PAGE_SIZE)
        raise TmemError(
            f"{format_size(wanted.size_bytes)} cannot be reserved: segment {paths.name} has "
            f"{format_size(store.limits[1])}, and can promise a device of {most} now: make it no larger, "
            f"leave --reserve out, {clients.more_to_promise(store, owner)}"
        ) from None
    undo.callback(setattr, owner, "floor_bytes", before)


def _drop_pool(store: "_native.Segment", made: Export) -> None:
    """Drop the client's persistent pool, and the client unless other pools or settings of it remain."""
    with contextlib.suppress(PoolError):
        owner = store.client(made.client, create=False)
        for pool in owner.pools():
            if pool.persistent:
                pool.destroy()
        if made.reserve:
            owner.floor_bytes = 0
        clients.end_if_unused(owner)


def _end_tier(paths: SegmentPaths, store: "_native.Segment", client: str) -> None:
    """Take the tier of a client that stays for its settings; that of one that ended the manager removes."""
    with contextlib.suppress(PoolError):
        tiering.withdraw(paths, store, store.client(client, create=False))


def require_room(client: str, used_bytes: int) -> None:
    """Raise `AttachError` if RAM or the limit of a control group does not suffice for `used_bytes` of
    swapped-out pages once they come back."""
    if used_bytes and (reasons := room.lacking(used_bytes)):
        raise AttachError(
            f"{format_size(used_bytes)} of {client} cannot come back: {'; '.join(reasons)}. "
            "Free memory or raise the limits first, or insist with --force"
        )


def _check_unused(paths: SegmentPaths, made: Export) -> None:
    """Raise `AttachError` if clients stay connected: their pages would be dropped, and nbdkit waits for
    them."""
    deadline = time.monotonic() + _DISCONNECT_TIMEOUT_S
    while connected := server.connections(paths, made):
        if time.monotonic() > deadline:
            raise AttachError(
                f"{connected} clients are connected to {made.client}: let them swapoff and disconnect first"
            )
        time.sleep(0.05)


def _attach(
    paths: SegmentPaths,
    made: Export,
    local: SwapOptions,
    show: Callable[[Sequence[Guard]], None],
    undo: contextlib.ExitStack,
) -> Export:
    if attach.kernel_driver():
        if not services.exists(paths, made.client, "standby"):
            undo.callback(services.stop_server, paths, made.client, "standby")
        services.start_server(paths, made, "standby")
    found = guards.inspect(paths, made)
    show(found)
    guards.require(found, local.force)
    if made.attachment is None or made.attachment.device is None:
        undo.callback(lambda: attach.detach(paths, export.load(paths, made.client)))
    made = attach.attach(paths, made)
    assert made.attachment is not None
    assert made.attachment.device is not None
    if made.attachment.kind == "nbd":
        if not services.exists(paths, made.client, "keeper"):
            undo.callback(services.stop, paths, made.client, "keeper")
        services.start_keeper(paths, made)
    if not swap.is_active(made.attachment.device):
        swap.on(made.attachment.device, local.priority, local.discard)
        made = dataclasses.replace(made, use=SwapUse(local.priority, local.discard))
        made.save(paths)
        export.emptying(paths, made.client).unlink(missing_ok=True)
    return made


def forget(paths: SegmentPaths, client: str) -> None:
    """Remove the record last: as long as it is there, the rest can be found."""
    for path in (
        server.report_path(paths, client),
        server.report_path(paths, client, "standby"),
        Path(default_socket(paths, client)),
        attach.log_path(paths, client),
        export.emptying(paths, client),
        paths.record("swap", client),
    ):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def attached(paths: SegmentPaths) -> Iterator["_native.Segment"]:
    """Attach the segment for as long as the context lasts."""
    store = segment.attach(paths.name)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def exclusive(paths: SegmentPaths, client: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of the client's device; `TmemError` if another command has it for `wait_s` from now."""
    deadline_s = time.monotonic() + wait_s
    path = paths.state / f"swap-{client}.lock"
    while (descriptor := _locked(paths, path)) is None:
        if time.monotonic() >= deadline_s:
            raise TmemError(f"another command works on swap device {client}: wait until it has ended")
        time.sleep(_LOCK_INTERVAL_S)
    try:
        yield
    finally:
        if not export.exists(paths, client):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(paths: SegmentPaths, path: Path) -> int | None:
    """Open and lock the file of a device; None if another command has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise TmemError(
            f"segment {paths.name!r} belongs to another user: run this as that user or as root"
        ) from None
    except FileNotFoundError:
        segment.attach(paths.name).close()  # says what is wrong with it, mostly that there is none
        raise TmemError(
            f"{paths.state} is gone: 'tmem --name {paths.name} start -d' makes it again"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
