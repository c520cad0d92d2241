"""Asks whether the metrics of a segment are served, as Prometheus would.

For ``tmem start`` and ``tmem doctor``, without prometheus_client; not for serving: `exporter`. Any thread.
"""

import json
from contextlib import closing, suppress

from tmem.backends import processes
from tmem.backends.paths import SegmentPaths
from tmem.types import parse_host_port

NAME = "metrics"
"""The manager's service that serves them."""

_TIMEOUT_S = 2.0


def address_of(paths: SegmentPaths) -> str | None:
    """Return where the manager has them served; None if nobody asked for it."""
    try:
        argv = json.loads(paths.record("service", NAME).read_text())["argv"]
    except (OSError, ValueError, KeyError):
        return None
    return str(argv[-1])


def answers(paths: SegmentPaths, address: str) -> bool:
    """Say whether this segment's metrics are to be had at `address`."""
    import http.client  # here: the manager needs the name above only, and locks what it has imported

    host, port = parse_host_port(address)
    with (
        suppress(OSError, http.client.HTTPException),
        closing(http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)) as connection,
    ):
        connection.request("GET", "/metrics")
        return f'segment="{paths.name}"'.encode() in connection.getresponse().read()
    return False


def last_words(paths: SegmentPaths) -> str:
    """Return what the process that serves them said last; empty if nothing."""
    output = paths.record("service", NAME).with_suffix(".log")
    return processes.last_line(output).partition("tmem: ")[2]
