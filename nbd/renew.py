"""Replaces the processes of a swap device by new ones while it is in use: how an upgrade reaches it.

All pages are in the segment, so a server may be killed at any moment; what its client has not been told is
done, the client sends again. Of a device that is attached by the kernel's nbd driver first the one server,
then the keeper, then the other server: one that is ready is there at every moment. Other devices have one
server, and whether their clients connect again is theirs to know. Blocking; needs the manager.
"""

import time
from collections.abc import Callable

from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import AttachError
from tmem.nbd import export, family, keeper, lifecycle, server, services
from tmem.nbd.export import Export

TIMEOUT_S = 30.0


def renew(paths: SegmentPaths, client: str, force: bool, show: Callable[[str], None]) -> None:
    """Replace the servers of the client's device, and its keeper; `show` gets a line for each.

    Raises `AttachError` if that would cut somebody off: a device that is attached by nbdfuse, or, without
    `force`, one whose clients are connected and must connect again by themselves.
    """
    with lifecycle.exclusive(paths, client):
        made = export.load(paths, client)
        if made.attachment is not None and made.attachment.kind == "nbdfuse":
            raise AttachError(
                f"{client} is attached by nbdfuse, which would not find a new server: when its pages have "
                f"room elsewhere 'tmem swap remove {client}', and add it again"
            )
        if made.attachment is not None:
            _replace(paths, made, "standby", show)
            _replace(paths, made, "keeper", show)
        elif (connected := server.connections(paths, made)) and not force:
            raise AttachError(
                f"{connected} clients are connected to {client}: if they connect again by themselves, "
                "restart with --force"
            )
        _replace(paths, made, "swap", show)


def _replace(paths: SegmentPaths, made: Export, role: services.Service, show: Callable[[str], None]) -> None:
    name = services.service_name(role, made.client)
    before = family.service_process(paths, name)
    services.restart(paths, made, role)
    _wait(lambda: _other(before, family.service_process(paths, name)), f"{name} starts again")
    if role != "keeper":
        services.wait_server(paths, made, role)
    if made.attachment is not None:
        _wait(lambda: keeper.ready(paths, made), f"the keeper of {made.client} has a spare connection")
    show(f"{name}: another {'keeper' if role == 'keeper' else 'server'}")


def _other(before: Process | None, now: Process | None) -> bool:
    return now is not None and now != before


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AttachError(f"not within {TIMEOUT_S:.0f} s: {what}; see the logs in the state directory")
        time.sleep(0.02)
