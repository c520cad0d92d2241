"""The script that nbdkit's Python plugin runs: one process serves one client's swap device.

It only introduces a native `Device` to nbdkit. Once the server has forked for the last time (`after_fork`),
the names of the hot callbacks (pread, pwrite, zero, trim, extents) are bound to methods of the device, so
that no Python frame runs for a request; everything else here is called once per process or connection.

The server holds its client from its main thread, and ends together with it. When the client has been handed
over to another place, requests that waited for that are never answered: the connection breaks instead, and
whoever reconnects, to the new place, sends them again.

Not for import by anything: it needs nbdkit's module, and nbdkit looks the callbacks up in ``__main__``.
Threading: nbdkit calls the hot callbacks from all its threads at once, the rest before or between them; a
thread of our own watches the client.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import nbdkit

from tmem.backends import _native, guarded, locking, processes, tiering
from tmem.errors import TmemError
from tmem.nbd.export import write_json
from tmem.types import OID_SIZE, PAGE_SIZE

API_VERSION = 2
MAX_REQUEST_BYTES = 32 << 20  # what libnbd and the kernel assume when a server does not say
WATCH_S = 1.0
"""How late a server without requests may notice that its client is gone; with requests it is at once."""

_MODELS = {
    "parallel": nbdkit.THREAD_MODEL_PARALLEL,
    "serialize-requests": nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS,
    "serialize-all-requests": nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS,
}


class _Server:
    """The one object of module state: the parameters, and the device once there is one."""

    def __init__(self) -> None:
        self.parameters = {"model": "parallel", "report": "", "lock": "yes"}
        self.segment: _native.Segment | None = None
        self.device: _native.Device | None = None

    def set(self, key: str, value: str) -> None:
        if key not in ("segment", "client", "size", "model", "report", "lock"):
            _refuse(f"unknown parameter {key}: known are segment, client, size, model, report and lock")
        self.parameters[key] = value

    def complete(self) -> None:
        for key in ("segment", "client", "size"):
            if not self.parameters.get(key):
                _refuse(f"parameter {key}=... is missing")
        size = self.parameters["size"]
        if not size.isascii() or not size.isdigit() or int(size) == 0 or int(size) % PAGE_SIZE:
            _refuse(f"size={size} is not possible: give a multiple of {PAGE_SIZE} bytes")
        if self.parameters["model"] not in _MODELS:
            _refuse(f"model={self.parameters['model']} is unknown: known are {', '.join(_MODELS)}")

    def attach(self) -> _native.Device:
        """Attach the segment, hold the client, and lock the memory of this process, which goes last: locks
        follow the mapping."""
        guarded.outlive_parent()  # the manager may end or die: the servers stay
        path = self.parameters["segment"]
        try:
            self.segment = _native.attach(path)
            client = self.segment.client(self.parameters["client"], create=False)
            pools = [pool for pool in client.pools() if pool.persistent]
            if len(pools) != 1:
                _refuse(
                    f"client {client.name} has {len(pools)} persistent pools instead of one: add it again"
                )
            client.hold()
            self.device = device = _native.Device(
                pools[0],
                bytes(OID_SIZE),
                int(self.parameters["size"]),
                pin_threads=True,
                departed=_end,
            )
        except (TmemError, OSError) as error:
            _refuse(str(error))
        self._lock_and_report(Path(path))
        threading.Thread(target=_watch, args=(self.segment, pools[0]), daemon=True).start()
        return device

    def _lock_and_report(self, path: Path) -> None:
        report = locking.LockReport(0, ("not asked for",))
        if self.parameters["lock"] == "yes":
            report = locking.lock_process(path, locking.swappable(path))
        if self.parameters["report"]:
            document: dict[str, object] = {
                "pid": os.getpid(),
                "start_ticks": processes.start_ticks(os.getpid()),
                "io_flusher": guarded.io_flusher(),
                "locked_bytes": report.locked_bytes,
                "refused": list(report.refused),
            }
            with contextlib.suppress(OSError):  # no room on the tmpfs: to serve matters more
                write_json(Path(self.parameters["report"]), document)


def _refuse(reason: str) -> NoReturn:
    """End the server, which serves nobody yet, with one line instead of nbdkit's copy of a traceback."""
    print(f"tmem: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _watch(segment: _native.Segment, pool: _native.Pool) -> None:
    """End the server when its client is gone, also if nobody asks it for anything; and open its tier before a
    request needs it."""
    reads_tier = False
    while pool.alive:
        with contextlib.suppress(TmemError):
            if not pool.client.tiered:
                reads_tier = False
            elif not reads_tier:
                reads_tier = tiering.attach(segment, pool.client)
        time.sleep(WATCH_S)
    _end()


def _end() -> NoReturn:
    """End the server at once, with no reply to anybody."""
    print("tmem: the client is gone, and the server with it", file=sys.stderr, flush=True)
    os._exit(0)


_server = _Server()


def config(key: str, value: str) -> None:
    """Take one ``key=value`` of the command line."""
    _server.set(key, value)


def config_complete() -> None:
    """Refuse parameters that do not make sense."""
    _server.complete()


def thread_model() -> int:
    """Let requests run in parallel, unless the command line says otherwise."""
    return int(_MODELS[_server.parameters["model"]])


def after_fork() -> None:
    """Attach the device and put its methods in the place of the callbacks."""
    device = _server.attach()
    names = globals()
    for name in ("pread", "pwrite", "zero", "trim", "extents"):
        names[name] = getattr(device, name)


def list_exports(readonly: bool, is_tls: bool) -> Iterable[str]:
    """Offer the one export."""
    return [_server.parameters["client"]]


def default_export(readonly: bool, is_tls: bool) -> str:
    """Return the export that a client without a name gets."""
    return _server.parameters["client"]


def open(readonly: bool) -> int:
    """Begin a connection; any name but the client's is refused."""
    name, client = nbdkit.export_name(), _server.parameters["client"]
    if name not in ("", client):
        nbdkit.set_error(2)  # ENOENT
        raise TmemError(f"there is no export {name!r} here: this server has {client!r}, so ask for that")
    return 1


def get_size(h: int) -> int:
    """Return the size of the device in bytes."""
    assert _server.device is not None
    return _server.device.size_bytes


def block_size(h: int) -> tuple[int, int, int]:
    """Any request goes; whole pages spare the read before the write."""
    return 1, PAGE_SIZE, MAX_REQUEST_BYTES


def can_multi_conn(h: int) -> bool:
    """All connections see one store, and what was acknowledged is there for each of them."""
    return True


def can_write(h: int) -> bool:
    """Writes are the point."""
    return True


def can_flush(h: int) -> bool:
    """Accept flushes, or clients warn."""
    return True


def flush(h: int, flags: int) -> None:
    """Do nothing: an acknowledged write already survives the death of every process."""


def can_fua(h: int) -> int:
    """Every write is as good as forced, see `flush`."""
    return int(nbdkit.FUA_NATIVE)


def can_trim(h: int) -> bool:
    """Trimmed pages are flushed from the pool."""
    return True


def can_zero(h: int) -> bool:
    """Zeroing is cheaper than writing zeros."""
    return True


def can_fast_zero(h: int) -> bool:
    """Zeroing whole pages only flushes them."""
    return True


def can_extents(h: int) -> bool:
    """Pages that are not in the pool are holes."""
    return True


def is_rotational(h: int) -> bool:
    """Nothing turns here, so that swapon spreads its clusters."""
    return False


def pread(h: int, buf: memoryview, offset: int, flags: int) -> None:
    """Stand in for the device's method: nbdkit wants the name when it loads the script."""
    raise TmemError("the device is not attached yet")


def pwrite(h: int, buf: memoryview, offset: int, flags: int) -> None:
    """Stand in for the device's method."""
    raise TmemError("the device is not attached yet")


def zero(h: int, count: int, offset: int, flags: int) -> None:
    """Stand in for the device's method."""
    raise TmemError("the device is not attached yet")


def trim(h: int, count: int, offset: int, flags: int) -> None:
    """Stand in for the device's method."""
    raise TmemError("the device is not attached yet")


def extents(h: int, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Stand in for the device's method."""
    raise TmemError("the device is not attached yet")
