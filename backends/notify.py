"""Tell the service manager that started this process (systemd, ``Type=notify``) that it is ready.

The protocol is one datagram, sd_notify(3). Without NOTIFY_SOCKET in the environment nobody wants to know.
Not for children: they do not inherit the address, since systemd would take their word for ours. Any thread,
before others look at the environment.
"""

import contextlib
import os
import socket


def ready() -> None:
    """Say once that this process answers now. Nothing happens if nobody listens."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # an address of Linux's own, without a file
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.sendto(b"READY=1", address)
