"""The load of a swap device: up to 16 requests under way, each block in one of them at most, all verified.

It connects again when the connection breaks, for as long as it takes, and sends once more what was not
answered, as the kernel's driver does with its own. Runs in a process of its own, which may be killed: the
next one goes on with what the ledger says.
"""

import collections
import enum
import errno
import importlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tmem.types import PAGE_SIZE

from .board import DEADLINE_S, Board, Clock, State, Wanted, Word, wait
from .ledger import Ledger, runs

# libnbd's bindings. By name, for the checkers take our own folder nbd/ for a package of that name.
nbd: Any = importlib.import_module("nbd")

DEPTH = 16
BATCH = 32
"""Blocks of the largest request, 128 KiB: what the kernel writes at once."""


class Kind(enum.Enum):
    """What a request asks for. SETTLE reads blocks of which a write was answered with an error."""

    READ = enum.auto()
    WRITE = enum.auto()
    TRIM = enum.auto()
    SETTLE = enum.auto()


@dataclass
class Request:
    """A request that is not answered yet; `again` once it was sent before."""

    kind: Kind
    first: int
    count: int
    again: bool = False
    buffer: Any = field(default=None)


class BlockLoad:
    """Works on all blocks of `ledger`, which are those of the export at `uri`.

    `connections` says how many clients the server sees. Answers that are errors are only those in `expected`;
    ENOSPC must leave the old block or the new one, any other error the old one.
    """

    def __init__(
        self,
        uri: str,
        ledger: Ledger,
        board: Board,
        seed: str,
        connections: Callable[[], int] = lambda: 1,
        expected: frozenset[int] = frozenset(),
    ) -> None:
        self._uri = uri
        self._ledger = ledger
        self._board = board
        self._rng = random.Random(seed)
        self._connections = connections
        self._expected = expected
        self._clock = Clock(board)
        self._busy = bytearray(ledger.blocks)
        self._planned: collections.deque[Request] = collections.deque()
        self._filling = 0

    def run(self) -> None:
        """Work until the board says to end."""
        self._rng.seed(f"{self._rng.random()} {self._board[Word.CONNECTIONS]}")  # not the same once more
        unanswered: list[Request] = []
        settled = False
        self._clock.restart()
        while True:
            handle = self._connect()
            try:
                if not settled:
                    self._settle(handle)
                    settled = True
                self._work(handle, unanswered)
                handle.shutdown()
                return
            except nbd.Error:
                if not broken(handle):
                    raise

    def _connect(self) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(self._uri)
            except nbd.Error as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"nobody serves {self._uri} any more: {error}") from None
                time.sleep(0.001)
                continue
            self._board.add(Word.CONNECTIONS)
            return handle

    def _settle(self, handle: Any) -> None:
        """Find out what became of the requests of the load before this one, once nobody works on them."""
        doubtful = self._ledger.doubtful()
        if doubtful:
            wait(lambda: self._connections() <= 1, "the server has done what a killed client had asked for")
        for first, count in runs(doubtful, BATCH):
            self._ledger.settle(first, handle.pread(count * PAGE_SIZE, first * PAGE_SIZE))

    def _work(self, handle: Any, unanswered: list[Request]) -> None:
        """Send `unanswered` and then requests of our own until the board says to end.

        When the connection breaks, `unanswered` is what was under way.
        """
        under_way: dict[int, Request] = {}
        board = self._board
        try:
            while True:
                wanted = board[Word.WANTED]
                if wanted == Wanted.WORK:
                    board[Word.STATE] = State.WORKING
                while len(under_way) < DEPTH and (request := self._next(unanswered, wanted)):
                    # First into the table: what breaks on the way out is under way.
                    under_way[-1] = request
                    under_way[self._send(handle, request)] = under_way.pop(-1)
                if not under_way:
                    self._verify(handle)
                    if wanted == Wanted.END:
                        return
                    self._rest()
                    continue
                handle.poll(1000)
                for cookie in list(under_way):
                    self._collect(handle, cookie, under_way, unanswered)
        except nbd.Error:
            if not broken(handle):
                raise
            for request in under_way.values():
                request.again = True
            unanswered += under_way.values()
            raise

    def _rest(self) -> None:
        board = self._board
        board[Word.STATE] = State.RESTING
        wait(lambda: board[Word.WANTED] != Wanted.REST, "the driver goes on", timeout_s=math.inf)
        self._clock.restart()

    def _next(self, unanswered: list[Request], wanted: int) -> Request | None:
        """Return the next request to send: one to be sent again, one that was planned, or a new one."""
        if unanswered:
            return unanswered.pop()
        if wanted != Wanted.WORK and not self._filling:
            return None
        if self._filling == 0 and self._board[Word.FILLS_WANTED] > self._board[Word.FILLS_DONE]:
            self._plan_fill()
        if self._planned:
            request = self._planned[0]
            if any(self._busy[request.first : request.first + request.count]):
                return None
            self._planned.popleft()
        elif self._filling:
            return None  # the last ones are under way
        else:
            request = self._new()
        for block in range(request.first, request.first + request.count):
            self._busy[block] = 1
        if request.kind in (Kind.WRITE, Kind.TRIM):
            self._ledger.issue(request.first, request.count, zeros=request.kind is Kind.TRIM)
        return request

    def _plan_fill(self) -> None:
        self._board[Word.FILLED] = 0
        starts = range(0, self._ledger.blocks, BATCH)
        for kind in (Kind.TRIM, Kind.WRITE):
            for first in starts:
                self._planned.append(Request(kind, first, min(BATCH, self._ledger.blocks - first)))
        self._filling = len(self._planned)

    def _new(self) -> Request:
        rng = self._rng
        chance = rng.random()
        kind = Kind.READ if chance < 0.35 else Kind.TRIM if chance < 0.42 else Kind.WRITE
        while True:
            count = rng.choice((1, 1, 1, 1, 2, 5, 8, BATCH))
            first = rng.randrange(self._ledger.blocks - count + 1)
            if not any(self._busy[first : first + count]):
                return Request(kind, first, count)

    def _send(self, handle: Any, request: Request) -> int:
        offset, size = request.first * PAGE_SIZE, request.count * PAGE_SIZE
        self._board.add(Word.SENT_AGAIN, int(request.again))
        if request.kind is Kind.TRIM:
            cookie: int = handle.aio_trim(size, offset)
        elif request.kind is Kind.WRITE:
            data = self._ledger.sent(request.first, request.count)
            request.buffer = nbd.Buffer.from_bytearray(bytearray(data))
            cookie = handle.aio_pwrite(request.buffer, offset)
        else:
            request.buffer = nbd.Buffer(size)
            cookie = handle.aio_pread(request.buffer, offset)
        return cookie

    def _collect(
        self, handle: Any, cookie: int, under_way: dict[int, Request], unanswered: list[Request]
    ) -> None:
        """Take the answer to one request, if there is one."""
        request = under_way[cookie]
        try:
            if not handle.aio_command_completed(cookie):
                return
        except nbd.Error as error:
            if broken(handle):
                raise
            if error.errnum not in self._expected:
                raise AssertionError(f"{request} was answered with {error}") from None
            del under_way[cookie]
            self._clock.answered()
            self._fail(request, error.errnum, unanswered)
            return
        del under_way[cookie]
        self._take(request)
        self._clock.answered()
        self._done(request)

    def _take(self, request: Request) -> None:
        if request.kind is Kind.READ:
            self._ledger.verify(request.first, request.buffer.to_bytearray())
        elif request.kind is Kind.SETTLE:
            self._ledger.settle(request.first, request.buffer.to_bytearray())
        else:
            self._ledger.acknowledge(request.first, request.count)

    def _fail(self, request: Request, errnum: int, unanswered: list[Request]) -> None:
        refused = errnum == errno.ENOSPC
        self._board.add(Word.REFUSED if refused else Word.FAILED)
        partly = refused and request.count > 1
        if request.kind is Kind.SETTLE or partly or (request.again and request.kind is not Kind.READ):
            # Some of its blocks may be written; of what was sent again all, by who did not answer.
            unanswered.append(Request(Kind.SETTLE, request.first, request.count))
            return
        if request.kind is not Kind.READ:
            self._ledger.refuse(request.first, request.count)
        self._done(request)

    def _done(self, request: Request) -> None:
        for block in range(request.first, request.first + request.count):
            self._busy[block] = 0
        if self._filling:
            self._board.add(Word.FILLED, request.count if request.kind is Kind.WRITE else 0)
            if not self._planned and not any(self._busy):
                self._filling = 0
                self._board.add(Word.FILLS_DONE)

    def _verify(self, handle: Any) -> None:
        """Read every block; none is under way."""
        for first in range(0, self._ledger.blocks, BATCH):
            count = min(BATCH, self._ledger.blocks - first)
            while True:
                try:
                    data = handle.pread(count * PAGE_SIZE, first * PAGE_SIZE)
                except nbd.Error as error:
                    if broken(handle) or error.errnum not in self._expected:
                        raise
                    continue
                break
            self._ledger.verify(first, data)


def broken(handle: Any) -> bool:
    """Say whether the connection is gone, so that nothing more is answered on it."""
    return bool(handle.aio_is_dead() or handle.aio_is_closed())
