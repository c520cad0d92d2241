"""One node, one connection, one pipeline: what is sent, what comes back, and what that means.

An `Exchange` is used once. All answers are read, or the connection is closed: one that goes back to its pool
with an answer in it would give it to somebody else. Not for choosing nodes or trying again: `redis_nodes`.
Threading: one thread; the pools are for any.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from tmem.errors import TierDownError, TierError, TierFullError

Word = bytes | str | int | float
Pieces = tuple[bytes | memoryview, ...]
"""A word that lies in pieces, which must stay as they are until the command is done."""
Reply = Any
"""What Redis answers: bytes, a number, None, or a list of these."""

_PASSING = (MovedError, AskError, TryAgainError, ClusterDownError, ReadOnlyError, BusyLoadingError)
"""What a cluster answers while it changes."""

FAILURES = (RedisError, RedisClusterException, OSError, IndexError)
"""Everything that the `redis` package raises when servers do not do what they should. IndexError is what it
makes of a node that knows of no slots, as one that was reset."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command about one key."""

    key: bytes
    words: tuple[Word | Pieces, ...]


@dataclass(eq=False, slots=True)
class Open:
    """A command that has not succeeded yet; `place` is where its answer belongs."""

    place: int
    command: Command
    asked: str | None = None
    """The node to which ASK sends it, for its next attempt alone."""


class Exchange:
    """Commands to the node called `name`, of which `demanded` replicas must have them in the end.

    Afterwards `left` holds those that must be tried again and `trouble` says why; `refusal` is what trying
    again would not help against. With `replica` the node is asked as one, for what it has: that it has
    nothing proves nothing, and neither does what it refuses.
    """

    def __init__(
        self,
        name: str,
        pool: redis.ConnectionPool | None,
        group: Sequence[Open],
        demanded: int,
        seconds: float,
        replica: bool = False,
    ) -> None:
        self.name = name
        self.left: list[Open] = []
        self.trouble = "is not there"
        self.refusal: TierError | None = None
        self._pool = pool
        self._group = group
        self._demanded = demanded
        self._replica = replica
        # Less than the socket waits: servers look at the clock ten times a second.
        self._wait_ms = max(int(min(seconds * 0.8, seconds - 0.15) * 1000), 1)
        self._connection: Any = None

    def __len__(self) -> int:
        return len(self._group)

    def send(self) -> None:
        """Send everything; reads nothing."""
        if self._pool is None:
            return
        commands: list[tuple[Word | Pieces, ...]] = []
        if self._replica:
            commands.append(("READONLY",))
        for one in self._group:
            if one.asked is not None:
                commands.append(("ASKING",))
            commands.append(one.command.words)
        if self._replica:  # whoever has the connection next asks a primary
            commands.append(("READWRITE",))
        if self._demanded:
            commands.append(("WAIT", self._demanded, self._wait_ms))
        try:
            self._connection = self._pool.get_connection()
            self._connection.send_packed_command(_encoded(commands))
        except FAILURES as error:
            self._broken(error)

    def receive(self, replies: list[Reply]) -> None:
        """Read every answer into its place."""
        if self._connection is None:
            self.left = list(self._group)
            self._release()
            return
        done = 0
        try:
            if self._replica:
                self._connection.read_response()
            for one in self._group:
                if one.asked is not None:
                    self._connection.read_response()
                    one.asked = None
                try:
                    replies[one.place] = self._connection.read_response()
                except ResponseError as error:
                    self._judge(one, error)
                else:
                    if self._replica and replies[one.place] is None:
                        self.left.append(one)
                done += 1
            if self._replica:
                self._connection.read_response()
            if self._demanded:
                acknowledged = int(self._connection.read_response())
                if acknowledged < self._demanded and self.refusal is None:
                    self.trouble = f"only {acknowledged} of the {self._demanded} replicas demanded have it"
                    self.left = list(self._group)  # they count together
        except FAILURES as error:
            self._broken(error)
            for one in self._group[done:]:
                one.asked = None
            self.left = list(self._group) if self._demanded else [*self.left, *self._group[done:]]
        finally:
            self._release()

    def _judge(self, one: Open, error: ResponseError) -> None:
        self.trouble = describe(error)
        if self._replica:
            self.left.append(one)
        elif isinstance(error, OutOfMemoryError):
            self.refusal = TierFullError(f"{self.name} is full: raise its maxmemory or add servers")
        elif isinstance(error, AskError) and not isinstance(error, MovedError):
            one.asked = f"{error.host}:{error.port}"
            self.left.append(one)
        elif isinstance(error, _PASSING) or str(error).startswith("NOREPLICAS"):
            self.left.append(one)
        elif self.refusal is None:
            self.refusal = TierDownError(f"{self.name} refuses {one.command.words[0]!s}: {describe(error)}")

    def _broken(self, error: Exception) -> None:
        self.trouble = describe(error)
        if isinstance(error, AuthenticationError | AuthorizationError):
            self.refusal = TierDownError(f"{self.name} does not let us in: {describe(error)}")
        if self._connection is not None:
            self._connection.disconnect()
            self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._pool is not None:
            self._pool.release(connection)


_SENT_BYTES = 256 << 10
"""How much is put together for one call of the kernel: what follows is, while servers read that."""


def _encoded(commands: Iterable[tuple[Word | Pieces, ...]]) -> Iterator[bytes]:
    """Yield what to send for the commands. Bytes are copied once, where the package does it twice."""
    parts: list[bytes | memoryview] = []
    size_bytes = 0
    for words in commands:
        parts.append(b"*%d\r\n" % len(words))
        for word in words:
            if isinstance(word, tuple):
                length = sum(map(len, word))
                parts += (b"$%d\r\n" % length, *word, b"\r\n")
                size_bytes += length
            else:
                raw = word if isinstance(word, bytes) else str(word).encode()
                parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
                size_bytes += len(raw)
        if size_bytes >= _SENT_BYTES:
            yield b"".join(parts)
            parts.clear()
            size_bytes = 0
    yield b"".join(parts)


_ALONE = 32
"""Fewer commands are sent and answered before threads are started."""


def exchange_all(exchanges: Sequence[Exchange], replies: list[Reply]) -> None:
    """Do them all, side by side: none of the nodes waits for another one."""
    if sum(map(len, exchanges)) < _ALONE:
        for exchange in exchanges:
            exchange.send()
        for exchange in exchanges:  # every one, or connections would go back with answers in them
            exchange.receive(replies)
        return
    errors: list[BaseException] = []

    def do(exchange: Exchange) -> None:
        try:
            exchange.send()
            exchange.receive(replies)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=do, args=(exchange,), daemon=True) for exchange in exchanges[1:]]
    started = []
    for thread, exchange in zip(threads, exchanges[1:], strict=True):
        try:
            thread.start()
            started.append(thread)
        except RuntimeError:  # there is no memory for one
            do(exchange)
    do(exchanges[0])
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


def talk(pool: redis.ConnectionPool, words: Sequence[Word]) -> Reply:
    """Send one command and return its answer. RedisError, OSError."""
    connection: Any = pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_command(*words))
        return connection.read_response()
    except ResponseError:
        raise
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def refused(name: object, error: Exception) -> TierDownError:
    """Return what to raise for an `error` that is not tried again."""
    return TierDownError(f"{name} does not answer: {describe(error)}")


def describe(error: Exception) -> str:
    """Return one line about `error`."""
    kind = type(error).__name__.removesuffix("Error")
    return f"{kind}: {' '.join(str(error).split())}"
