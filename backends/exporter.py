"""Serves the statistics of one segment to Prometheus over HTTP, as a process of its own.

The manager starts it and keeps it running, and is not disturbed by it: a scrape allocates memory, and what
holds Python's lock while it waits for a page keeps every thread of its process waiting, which must not be the
process that looks after those who serve swap. So it also gives up what it has inherited from the manager
(real time, being spared by the OOM killer). It ends with its segment. Everything is bounded: at most
`MOST_CLIENTS` connections, each for `DEADLINE_S`; all else is refused or cut off.

Threading: the main thread listens; a thread for each connection speaks HTTP; one thread, and no other, looks
into the segment.
"""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.registry import Collector

from tmem.backends import guarded, segment
from tmem.backends.exposition import SegmentCollector
from tmem.backends.paths import SegmentPaths
from tmem.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from tmem.backends._native import Segment

MOST_CLIENTS = 8
DEADLINE_S = 5.0
_LOOK_S = 0.25


def text(paths: SegmentPaths, *others: Collector) -> str:
    """Return what one scrape would; `others` are collected, too."""
    with closing(segment.attach(paths.name)) as opened:
        registry = CollectorRegistry(auto_describe=False)
        for one in (SegmentCollector(paths, opened), *others):
            registry.register(one)
        return generate_latest(registry).decode()


def serve(paths: SegmentPaths, host: str, port: int, *others: Collector) -> None:
    """Serve until the segment is destroyed, with what `others` collect. `ServiceError`: nobody can listen."""
    guarded.drop_guards()
    with closing(segment.attach(paths.name)) as opened, ThreadPoolExecutor(1, "collector") as collector:
        registry = CollectorRegistry(auto_describe=False)
        for one in (SegmentCollector(paths, opened), *others):
            registry.register(_OneThread(one, collector))
        with _listen(host, port, opened) as server:
            server.set_app(make_wsgi_app(registry))
            server.serve_forever(_LOOK_S)


def _listen(host: str, port: int, opened: "Segment") -> "_Server":
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return _Server(family, (str(address[0]), port), opened)
    except OSError as error:
        raise ServiceError(
            f"metrics cannot be served on {host}:{port}: {error.strerror or error}; "
            "choose another address for --metrics, or end what listens there"
        ) from None


class _OneThread(Collector):
    """A collector whose work is done by the one thread that is known to the segment."""

    def __init__(self, inner: Collector, collector: ThreadPoolExecutor) -> None:
        self._inner, self._collector = inner, collector

    def collect(self) -> "Iterator[Metric]":
        return iter(self._collector.submit(lambda: list(self._inner.collect())).result(DEADLINE_S))


class _Handler(WSGIRequestHandler):
    """Logs nothing: every scrape would be a line."""

    timeout = DEADLINE_S

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a bound on connections and on how long each may last."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CLIENTS

    def __init__(self, family: int, address: tuple[str, int], opened: "Segment") -> None:
        self.address_family = family  # before the socket is made
        self._opened = opened
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as the base class would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "tmem", self.server_address[1]
        self.setup_environ()

    def verify_request(self, request: "socket.socket | tuple[bytes, socket.socket]", address: object) -> bool:
        """Take a connection only if there are not too many."""
        if not isinstance(request, socket.socket) or len(self._deadlines) >= MOST_CLIENTS:
            return False
        self._deadlines[request] = time.monotonic() + DEADLINE_S
        return True

    def shutdown_request(self, request: "socket.socket | tuple[bytes, socket.socket]") -> None:
        """Forget a connection that is done."""
        if isinstance(request, socket.socket):
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off who takes too long, whatever they send; end with the segment. Several times a second."""
        if not self._opened.alive:
            # Threads that still talk to somebody need not be waited for.
            os._exit(0)
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if now > deadline:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread wakes, and forgets it

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that left is nothing to tell of, nor is one that was cut off."""
