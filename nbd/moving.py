"""A swap device whose client is handed over: its server ends here, and begins there.

The pages move by `tmem.backends.handoff`; here are the server and the record. Clients of the device see their
connection break and reconnect. Not for a device that is attached to this machine: nbdfuse does not reconnect.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, HandoffError, TmemError
from tmem.nbd import export, lifecycle, services
from tmem.nbd.export import Export


@contextmanager
def device_of(paths: SegmentPaths, client: str, there: SegmentPaths | None) -> Iterator[Export | None]:
    """Yield the swap device of `client`, None if it has none, while no other command works on it.

    Raises `AttachError` if it is attached to this machine, and `ServiceError` unless the managers run that
    `leave` and `arrive` will need.
    """
    if not export.exists(paths, client):
        yield None
        return
    with lifecycle.exclusive(paths, client):
        device = export.load(paths, client)
        if device.attachment is not None:
            raise AttachError(
                f"{client} is attached to this machine as {device.attachment.device or 'a block device'}, "
                f"which would not survive the move: take it away with 'tmem --name {paths.name} swap remove "
                f"{client}', and make it anew in the other segment"
            )
        if paths.record("service", f"swap-{client}").exists():
            service.request(paths, {"op": "ping"})
        if there is not None:
            service.request(there, {"op": "ping"})
        yield device


def leave(paths: SegmentPaths, device: Export) -> None:
    """Take away what serves `device` here; its client has gone already."""
    # The record first: a server that a service file starts again must not take the socket from the new one.
    paths.record("swap", device.client).unlink(missing_ok=True)
    services.stop_server(paths, device.client)
    lifecycle.forget(paths, device.client)


def arrive(paths: SegmentPaths | None, device: Export) -> str:
    """Serve `device` in the segment of `paths`; return its URI. None: return what is to be done elsewhere.

    Raises `HandoffError` that says the same if the server does not start.
    """
    if paths is None:
        return f"its device is served there by: tmem swap add {_arguments(device)}"
    try:
        return lifecycle.add(paths, device).uri
    except TmemError as error:
        raise HandoffError(
            f"{device.client} lives in segment {paths.name!r} now, but is not served there: {error}; then "
            f"run 'tmem --name {paths.name} swap add {_arguments(device)}'"
        ) from error


def _arguments(device: Export) -> str:
    words = [device.client, "--size", str(device.size_bytes)]
    if device.unix is not None:
        words += ["--unix", device.unix]
    if device.tcp is not None:
        host, port = device.tcp
        words += ["--tcp", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    if device.tls_psk is not None:
        words += ["--tls-psk", device.tls_psk]
    if device.reserve:
        words.append("--reserve")
    if device.realtime:
        words.append("--realtime")
    return " ".join(words)
