"""A swap device from its first to its last moment: pool, record, server, attachment, in this order and back.

Every step may be repeated after a failure. What `add` has made when it fails is taken away again; `remove`
goes on where it stopped. One command at a time per client (a lock file). Blocking; the caller may be the
command line or any program. The server itself is kept by the manager.
"""

import contextlib
import dataclasses
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import processes, segment, service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, PoolError, TmemError
from tmem.nbd import attach, export, guards, server, swap
from tmem.nbd.export import Export
from tmem.nbd.guards import Guard
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 60.0
_DISCONNECT_TIMEOUT_S = 2.0
_HOPELESS_STARTS = 3


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
    with _exclusive(paths, wanted.client), _attached(paths) as store, contextlib.ExitStack() as undo:
        made = _recorded(paths, wanted)
        if made is None:
            if wanted.reserve:
                check_reserve(paths, store, wanted)
            undo.callback(_forget, paths, wanted.client)
            made = wanted
            made.save(paths)
        if _make_pool(store, wanted.client):
            undo.callback(_drop_pool, store, wanted.client)
        if server.running(paths, wanted.client) is None:
            undo.callback(_stop_server, paths, wanted.client)
            _start_server(paths, made)
        _wait_ready(paths, made)
        if local is not None:
            made = _attach(paths, made, local, show, undo)
        undo.pop_all()
    return made


def remove(
    paths: SegmentPaths, client: str, progress: Callable[[int], None] = lambda left_bytes: None
) -> None:
    """Take the swap device of `client` away: swapoff, detach, stop the server, drop the pool, forget it.

    `progress` gets the bytes that swapoff has still to bring back. Safe to repeat after a failure. Raises
    `TmemError`, also while somebody else is connected to the server.
    """
    with _exclusive(paths, client):
        made = export.load(paths, client)
        if made.attachment is not None and made.attachment.device is not None:
            swap.off(made.attachment.device, progress)
        made = attach.detach(paths, made)
        _check_unused(paths, made)
        _stop_server(paths, client)
        if paths.segment.exists():
            with _attached(paths) as store:
                _drop_pool(store, client)
        _forget(paths, client)


def check_reserve(paths: SegmentPaths, store: "_native.Segment", wanted: Export) -> None:
    """Raise `TmemError` unless the segment can hold the whole device uncompressed, beside what is
    reserved."""
    others = [found for found in export.load_all(paths) if found.reserve and found.client != wanted.client]
    reserved = sum(max(0, found.size_bytes - _held_bytes(store, found.client)) for found in others)
    room = store.freeable_bytes() - reserved
    if room < wanted.size_bytes:
        raise TmemError(
            f"{format_size(wanted.size_bytes)} cannot be reserved: segment {paths.name} has "
            f"{format_size(store.memory_bytes)}, of which {format_size(max(0, room))} can be reserved; "
            "make the device smaller, leave --reserve out, or use a larger segment"
        )


def _held_bytes(store: "_native.Segment", client: str) -> int:
    try:
        return store.client(client, create=False).statistics()["used_bytes"]
    except PoolError:
        return 0


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


def _drop_pool(store: "_native.Segment", client: str) -> None:
    """Drop the client's persistent pool, and the client unless other pools of it remain."""
    with contextlib.suppress(PoolError):
        owner = store.client(client, create=False)
        for pool in owner.pools():
            if pool.persistent:
                pool.destroy()
        if not owner.pools():
            owner.destroy()


def _start_server(paths: SegmentPaths, made: Export) -> None:
    environment = {
        name: value
        for name in ("PATH", "PYTHONPATH", "TMEM_RUNTIME_DIR")
        if (value := os.environ.get(name)) is not None
    }
    argv = server.command(paths, made.client)
    message: dict[str, object] = {
        "op": "supervise",
        "name": f"swap-{made.client}",
        "argv": argv,
        "env": environment,
    }
    service.request(paths, message)


def _wait_ready(paths: SegmentPaths, made: Export) -> None:
    """Wait until the server answers; `AttachError` with what it said once it has died several times."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.wait_ready(made, timeout_s=0.5)
        except AttachError as error:
            if time.monotonic() < deadline and _starts(paths, made.client) < _HOPELESS_STARTS:
                continue
            said = processes.last_line(paths.record("service", f"swap-{made.client}").with_suffix(".log"))
            raise AttachError(f"{error}; the server said: {said or 'nothing'}") from None
        return


def _starts(paths: SegmentPaths, client: str) -> int:
    """Return how often the manager has started the server of `client`."""
    services = service.request(paths, {"op": "services"}).get("services")
    found = (
        [entry for entry in services if entry["name"] == f"swap-{client}"]
        if isinstance(services, list)
        else []
    )
    return int(found[0]["starts"]) if found else 0


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


def _stop_server(paths: SegmentPaths, client: str) -> None:
    """Stop the server through the manager, or by ourselves if it is not the manager's."""
    name = f"swap-{client}"
    if paths.record("service", name).exists():
        service.request(paths, {"op": "unsupervise", "name": name, "timeout_s": STOP_TIMEOUT_S})
    process = server.running(paths, client)
    if process is None:
        return
    # Never SIGKILL: requests under way are pages that a kernel waits for.
    if not _ended(process, STOP_TIMEOUT_S):
        raise AttachError(
            f"the server of {client} (process {process.pid}) does not stop: disconnect its clients"
        )


def _ended(process: processes.Process, timeout_s: float) -> bool:
    """Ask `process` to end (SIGTERM) and wait; whether it has ended within `timeout_s` seconds."""
    descriptor = process.open_pidfd()
    if descriptor is None:
        return True
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)


def _attach(
    paths: SegmentPaths,
    made: Export,
    local: SwapOptions,
    show: Callable[[Sequence[Guard]], None],
    undo: contextlib.ExitStack,
) -> Export:
    found = guards.inspect(paths, made)
    show(found)
    guards.require(found, local.force)
    if made.attachment is None or made.attachment.device is None:
        undo.callback(lambda: attach.detach(paths, export.load(paths, made.client)))
    made = attach.attach(paths, made)
    assert made.attachment is not None
    assert made.attachment.device is not None
    swap.on(made.attachment.device, local.priority, local.discard)
    return made


def _forget(paths: SegmentPaths, client: str) -> None:
    """Remove the record last: as long as it is there, the rest can be found."""
    for path in (
        server.report_path(paths, client),
        Path(default_socket(paths, client)),
        attach.log_path(paths, client),
        paths.record("swap", client),
    ):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _attached(paths: SegmentPaths) -> Iterator["_native.Segment"]:
    store = segment.attach(paths.name)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _exclusive(paths: SegmentPaths, client: str) -> Iterator[None]:
    """Hold the client's lock, or raise `TmemError` at once if another command has it."""
    path = paths.state / f"swap-{client}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise TmemError(
            f"there is no segment {paths.name!r}: create it with 'tmem --name {paths.name} start -d'"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TmemError(
                f"another command works on swap device {client}: wait until it has ended"
            ) from None
        try:
            yield
        finally:
            if not export.exists(paths, client):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
