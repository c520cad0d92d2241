"""A client of a swap device that knows what every block must hold, and finds it again elsewhere.

It keeps requests under way, one a block at most. When the connection breaks it connects again, for as long as
it takes, and sends what was not answered once more. A thread of its own.
"""

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tmem.types import PAGE_SIZE

from .conftest import nbd

DEPTH = 12
_DEADLINE_S = 60.0


def content(block: int, version: int) -> bytes:
    """Return what version `version` of a block is; version 0 was never written, others may be zeros too."""
    if version == 0 or version % 9 == 8:  # a trim
        return bytes(PAGE_SIZE)
    head = (block << 32 | version).to_bytes(8, "little")
    if version % 9 < 3:
        return head * (PAGE_SIZE // 8)
    return head + random.Random(block * 1_000_003 + version).randbytes(1600).ljust(PAGE_SIZE - 8, b"\0")


@dataclass
class Request:
    """A request that is not answered yet: a read, or the write or trim that makes a version."""

    block: int
    version: int | None
    buffer: Any = field(default=None)


class Witness:
    """Works on `blocks` blocks of the export at `uri` until it is told to stop."""

    def __init__(self, uri: str, blocks: int, seed: int) -> None:
        self._uri = uri
        self._blocks = blocks
        self._rng = random.Random(seed)
        self._versions = [0] * blocks
        self._busy: set[int] = set()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.answered = 0
        """Requests answered so far."""
        self.connections = 0
        """How often it has connected."""
        self.sent_again = 0
        """Requests that were sent once more."""
        self.longest_s = 0.0
        """The longest time without an answer."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Let it answer what is under way, verify everything, and end. Raises what it found."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            waiting: list[Request] = []
            while not self._stop.is_set() or waiting:
                waiting = self._work(self._connect(), waiting)
            handle = self._connect()
            for block, version in enumerate(self._versions):
                assert handle.pread(PAGE_SIZE, block * PAGE_SIZE) == content(block, version), f"block {block}"
            handle.shutdown()
        except BaseException as error:
            self._error = error

    def _connect(self) -> Any:
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(self._uri)
            except nbd.Error:
                assert time.monotonic() < deadline, "nobody serves the device any more"
                time.sleep(0.002)
                continue
            self.connections += 1
            return handle

    def _work(self, handle: Any, waiting: list[Request]) -> list[Request]:
        """Send `waiting` and then requests of our own until the end; what was not answered when it broke."""
        under_way: dict[int, Request] = {}
        last = time.monotonic()
        try:
            while True:
                while waiting:
                    request = waiting[-1]
                    under_way[self._send(handle, request)] = waiting.pop()
                    self.sent_again += 1
                while len(under_way) < DEPTH and not self._stop.is_set():
                    request = self._new()
                    under_way[self._send(handle, request)] = request
                if not under_way:
                    handle.shutdown()
                    return []
                handle.poll(1000)
                for cookie in list(under_way):
                    if handle.aio_command_completed(cookie):
                        self._take(under_way.pop(cookie))
                        self.longest_s = max(self.longest_s, time.monotonic() - last)
                        last = time.monotonic()
        except nbd.Error:
            if not (handle.aio_is_dead() or handle.aio_is_closed()):
                raise  # an answer that is an error, not a connection that broke
            return [*waiting, *under_way.values()]

    def _new(self) -> Request:
        while (block := self._rng.randrange(self._blocks)) in self._busy:
            pass
        self._busy.add(block)
        return Request(block, self._versions[block] + 1 if self._rng.random() < 0.7 else None)

    def _send(self, handle: Any, request: Request) -> int:
        offset = request.block * PAGE_SIZE
        if request.version is None:
            request.buffer = nbd.Buffer(PAGE_SIZE)
            cookie: int = handle.aio_pread(request.buffer, offset)
        elif request.version % 9 == 8:
            cookie = handle.aio_trim(PAGE_SIZE, offset)
        else:
            data = bytearray(content(request.block, request.version))
            request.buffer = nbd.Buffer.from_bytearray(data)
            cookie = handle.aio_pwrite(request.buffer, offset)
        return cookie

    def _take(self, request: Request) -> None:
        if request.version is None:
            wanted = content(request.block, self._versions[request.block])
            assert request.buffer.to_bytearray() == wanted, f"block {request.block}"
        else:
            self._versions[request.block] = request.version
        self._busy.remove(request.block)
        self.answered += 1
