"""The processes of a swap device that the manager keeps running: server, standby, keeper.

Their services are called ROLE-CLIENT. A device has its server; one that is attached here by the kernel's nbd
driver also a second server and the keeper, which leads the kernel from one to the other. Blocking; any
thread.
"""

import os
import select
import signal
import time
from typing import Literal

from tmem.backends import guarded, processes, service
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, ServiceError
from tmem.nbd import keeper, server
from tmem.nbd.export import Export
from tmem.nbd.server import Role

START_TIMEOUT_S = 60.0
"""A server needs a third of a second; a machine that boots, or has no memory left, gives it much less."""
STOP_TIMEOUT_S = 60.0
_HOPELESS_STARTS = 3
Service = Role | Literal["keeper"]
_ENVIRONMENT = ("PATH", "PYTHONPATH", "TMEM_RUNTIME_DIR")


def start_server(paths: SegmentPaths, made: Export, role: Role = "swap") -> None:
    """Let the manager run a server of `made`, and wait until it answers.

    `AttachError` with what the server said once it has died several times, `ServiceError` without a manager.
    """
    _ask(paths, made, role, "supervise")
    wait_server(paths, made, role)


def wait_server(paths: SegmentPaths, made: Export, role: Role = "swap") -> None:
    """Wait until a server of `made` answers; `AttachError` if it does not or dies again and again."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.wait_ready(server.as_served(paths, made, role), timeout_s=0.5)
        except AttachError as error:
            if (
                time.monotonic() < deadline
                and _starts(paths, service_name(role, made.client)) < _HOPELESS_STARTS
            ):
                continue
            remedy = "" if made.tcp is None else ". Give another --tcp if it cannot be had"
            raise AttachError(
                f"{error}; the server said: {_said(paths, role, made.client)}{remedy}"
            ) from None
        return


def start_keeper(paths: SegmentPaths, made: Export) -> None:
    """Let the manager run the keeper of `made`, which is attached; wait until it has a spare connection."""
    _ask(paths, made, "keeper", "supervise")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not keeper.ready(paths, made):
        if time.monotonic() > deadline:
            said = _said(paths, "keeper", made.client)
            raise AttachError(f"the keeper of {made.client} does not get ready; it said: {said}")
        time.sleep(0.02)


def stop(paths: SegmentPaths, client: str, role: Service) -> None:
    """Let the manager stop a service of the device, if there is one. ServiceError if it does not end."""
    if paths.record("service", service_name(role, client)).exists():
        service.request(
            paths, {"op": "unsupervise", "name": service_name(role, client), "timeout_s": STOP_TIMEOUT_S}
        )


def stop_server(paths: SegmentPaths, client: str, role: Role = "swap") -> None:
    """Stop a server through the manager, or by ourselves if it is not the manager's."""
    stop(paths, client, role)
    process = server.running(paths, client, role)
    # Never SIGKILL: requests under way are pages that a kernel waits for.
    if process is not None and not _ended(process, STOP_TIMEOUT_S):
        raise AttachError(
            f"the server of {client} (process {process.pid}) does not stop: disconnect its clients"
        )


def restart(paths: SegmentPaths, made: Export, role: Service) -> None:
    """Let the manager kill a service of `made` and start the installed version in its place at once."""
    _ask(paths, made, role, "restart")


def exists(paths: SegmentPaths, client: str, role: Service) -> bool:
    """Say whether the manager keeps this service of the device."""
    return paths.record("service", service_name(role, client)).exists()


def service_name(role: Service, client: str) -> str:
    """Return what the manager calls it."""
    return f"{role}-{client}"


def _ask(paths: SegmentPaths, made: Export, role: Service, operation: str) -> None:
    """Ask the manager for an operation that starts a service of `made`."""
    if role == "keeper":
        argv = guarded.command(keeper.command(paths, made.client), made.realtime)
    else:
        argv = server.command(paths, made.client, role)
    message: dict[str, object] = {
        "op": operation,
        "name": service_name(role, made.client),
        "argv": argv,
        "env": {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None},
        "client": made.client,
    }
    service.request(paths, message)


def _said(paths: SegmentPaths, role: Service, client: str) -> str:
    return (
        processes.last_line(paths.record("service", service_name(role, client)).with_suffix(".log"))
        or "nothing"
    )


def _starts(paths: SegmentPaths, name: str) -> int:
    """Return how often the manager has started the service called `name`."""
    services = service.request(paths, {"op": "services"}).get("services")
    if not isinstance(services, list):
        raise ServiceError("the manager does not list its services: are both of the same version?")
    return next((int(entry["starts"]) for entry in services if entry["name"] == name), 0)


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
