"""One node, one connection, one pipeline: what is sent, what comes back, and what that means.

An `Exchange` is used once. All answers are read, or the connection is closed: one that goes back to its pool
with an answer in it would give it to somebody else. Not for choosing nodes or trying again: `redis_nodes`.
Threading: one thread; the pools are for any.
"""

import re
import select
import time
from collections.abc import Generator, Sequence
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
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tmem.backends.tiers.redis_wire import Reply, Taken, Wire, Word
from tmem.errors import TierDownError, TierError, TierFullError

_PASSING = (MovedError, AskError, TryAgainError, ClusterDownError, ReadOnlyError, BusyLoadingError)
"""What a cluster answers while it changes."""

FAILURES = (RedisError, RedisClusterException, OSError, IndexError)
"""Everything that the `redis` package raises when servers do not do what they should. IndexError is what it
makes of a node that knows of no slots, as one that was reset."""


@dataclass(slots=True)
class Command:
    """One command about one key; or several about keys of one slot, `sent`, whose answers nobody wants."""

    key: bytes
    words: tuple[Word, ...]
    """Of several the verb, for who reads what went wrong."""
    sent: Sequence[bytes | memoryview] = ()
    """Each of them as it is sent; what memoryviews show must stay until the command is over."""


@dataclass(eq=False, slots=True)
class Open:
    """A command that has not succeeded yet; `place` is where its answer belongs."""

    place: int
    command: Command
    asked: str | None = None
    """The node to which ASK sends it, for its next attempt alone."""


@dataclass(frozen=True)
class Demand:
    """How many replicas must have what a primary is told."""

    replicas: int
    """So many are waited for."""
    listed: int = 0
    """So many the cluster lists."""
    attached: bool = False
    """All that the primary itself has count as well, for any may be elected: the cluster may not list them
    yet, or not have when we asked it last. The primary is asked in the same breath."""


class Exchange:
    """Commands to the node called `name`, whose replicas must have them in the end as `demand` says.

    Afterwards `left` holds those that must be tried again and `trouble` says why; `refusal` is what trying
    again would not help against. With `replica` the node is asked as one, for what it has: that it has
    nothing proves nothing, and neither does what it refuses.
    """

    def __init__(
        self,
        name: str,
        pool: redis.ConnectionPool | None,
        group: Sequence[Open],
        demand: "Demand | None",
        seconds: float,
        taken: Taken | None = None,
        replica: bool = False,
    ) -> None:
        self.name = name
        self.left: list[Open] = []
        self.trouble = "is not there"
        self.refusal: TierError | None = None
        self._pool = pool
        self._group = group
        self._demand = demand
        self.attached: int | None = None
        """How many replicas the node has, if that was asked for."""
        self.seconds = seconds
        """How long the node may be silent."""
        self.reached: bool | None = None
        """Whether it could be connected to; None before that was tried."""
        self._taken = taken
        self._replica = replica
        # Less than we wait: servers look at the clock ten times a second.
        self._wait_ms = max(int(min(seconds * 0.8, seconds - 0.15) * 1000), 1)
        self._connection: Any = None
        self._wire: Wire | None = None
        self._done = 0
        self._outdated = False  # the connection leads to who was the primary once
        self.until_s = 0.0
        """When to give up, if nothing comes or goes."""

    @property
    def wire(self) -> Wire | None:
        """What to wait for; None before it begins and once it is over."""
        return self._wire

    def begin(self, replies: list[Reply]) -> None:
        """Connect, which may take as long as the node may be silent; answers will go into their places."""
        commands: list[tuple[Word, ...] | bytes | memoryview] = []
        if self._replica:
            commands.append(("READONLY",))
        for one in self._group:
            if one.asked is None:
                commands.extend(one.command.sent or (one.command.words,))
                continue
            for each in one.command.sent or (one.command.words,):
                commands += (("ASKING",), each)
        if self._replica:  # whoever has the connection next asks a primary
            commands.append(("READWRITE",))
        if self._demand is not None:
            if self._demand.attached:
                commands.append(("INFO", "replication"))
            commands.append(("WAIT", self._demand.replicas, self._wait_ms))
        try:
            if self._pool is not None:
                self._connection = self._pool.get_connection()
                self._wire = Wire(self._connection, commands, self._taken)
        except FAILURES as error:
            self._broken(error)
        self.reached = self._wire is not None
        if self._wire is None:
            for one in self._group:
                one.asked = None  # who sent it there may say otherwise by now
            self.left = list(self._group)
            return
        self._meaning = self._understand(replies)
        next(self._meaning)
        self.be_patient()

    def pass_over(self) -> None:
        """Leave all of it to another attempt."""
        self.trouble = "was not asked, for others took too long to connect to"
        self.left = list(self._group)

    def be_patient(self) -> None:
        """Let the node be silent for its time from now on."""
        self.until_s = time.monotonic() + self.seconds

    def send(self) -> bool:
        """Send some of it; whether anything was."""
        assert self._wire is not None
        try:
            sent = self._wire.send()
        except FAILURES as error:
            self._failed(error)
            return False
        if sent:
            self.be_patient()
        return sent

    def receive(self) -> None:
        """Read what is there."""
        assert self._wire is not None
        self.be_patient()
        try:
            for answers in self._wire.receive():
                for answer in answers:
                    self._meaning.send(answer)
        except StopIteration:
            self._end()
        except FAILURES as error:
            self._failed(error)

    def expire(self) -> None:
        """It has been silent for too long, if it is not over."""
        if self._wire is not None:
            self._failed(RedisTimeoutError("Timeout reading from socket"))

    def lose(self) -> None:
        """Its connection was closed by somebody else."""
        self._failed(RedisConnectionError("Connection closed by us, for its node is no more"))

    def abandon(self) -> None:
        """Close the connection, whatever is under way."""
        if self._wire is not None:
            self._connection.disconnect()
            self._release()

    def _understand(self, replies: list[Reply]) -> Generator[None, Reply, None]:
        """Take one answer after the other; ends with the last."""
        if self._replica:
            _certain((yield))
        for one in self._group:
            if one.command.sent:
                yield from self._understand_several(one)
                self._done += 1
                continue
            if one.asked is not None:
                _certain((yield))
                one.asked = None
            answer = yield
            if not isinstance(answer, Exception):
                replies[one.place] = answer
                if self._replica and answer is None:
                    self.left.append(one)
            elif isinstance(answer, ResponseError):
                self._judge(one, answer)
            else:
                raise answer
            self._done += 1
        if self._replica:
            _certain((yield))
        if self._demand is not None:
            demanded = self._demand.replicas
            if self._demand.attached:
                self.attached = online_replicas(facts(_certain((yield))))
                demanded = max(self._demand.listed, self.attached)
            acknowledged = int(_certain((yield)))
            if acknowledged < demanded and self.refusal is None:
                self.trouble = f"only {acknowledged} of the {demanded} replicas demanded have it"
                self.left = list(self._group)  # they count together

    def _understand_several(self, one: Open) -> Generator[None, Reply, None]:
        """Take the answers to the commands of `one`. Only those that failed are tried again: of a slot that
        moves, what has been stored on one side must not be on the other as well."""
        command, asked = one.command, one.asked
        one.asked = None
        for sent in command.sent:
            if asked is not None:
                _certain((yield))
            answer = yield
            if isinstance(answer, ResponseError):
                self._judge(Open(one.place, Command(command.key, command.words, (sent,))), answer)
            else:
                _certain(answer)

    def _end(self) -> None:
        assert self._wire is not None
        try:
            self._wire.end()
        except FAILURES:  # what was asked for is there, but who knows what else
            self._outdated = True
        if self._outdated:
            self._connection.disconnect()
        self._release()

    def _failed(self, error: Exception) -> None:
        self._broken(error)
        rest = self._group[self._done :]
        for one in rest:
            one.asked = None
        self.left = list(self._group) if self._demand is not None else [*self.left, *rest]

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
            self._outdated |= isinstance(error, ReadOnlyError)  # its name may be another's by now
            self.left.append(one)
        elif self.refusal is None:
            self.refusal = TierDownError(f"{self.name} refuses {one.command.words[0]!s}: {describe(error)}")

    def _broken(self, error: Exception) -> None:
        self.trouble = describe(error)
        if isinstance(error, AuthenticationError | AuthorizationError):
            self.refusal = TierDownError(f"{self.name} does not let us in: {describe(error)}")
        elif isinstance(error, NoPermissionError):  # for what accompanies commands
            self.refusal = TierDownError(f"{self.name} refuses: {describe(error)}")
        if self._connection is not None:
            self._connection.disconnect()
            self._release()

    def _release(self) -> None:
        connection, self._connection, self._wire = self._connection, None, None
        if connection is not None and self._pool is not None:
            self._pool.release(connection)


def _certain(answer: Reply) -> Reply:
    """Return an answer that must be none of the server's complaints."""
    if isinstance(answer, Exception):
        raise answer
    return answer


class Traffic:
    """Exchanges that go on side by side: while one thing is waited for, everything else goes on, too.

    One thread does them all: with one a node the CPU time of a batch was half as much again
    (docs/benchmarks/tiers.md). It belongs to that thread.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._of: dict[int, Exchange] = {}  # by descriptor: those that are not over
        self._asked: dict[int, int] = {}  # what the poll was told of each

    def begin(self, exchanges: Sequence[Exchange], replies: list[Reply]) -> None:
        """Begin them, and send what the kernel takes. None of the nodes waits for another once connected.

        To connect to all of them may take as long as one may be silent; then those that are left are passed
        over, so put those last that were not reached the last time.
        """
        spent_s = 0.0
        for exchange in exchanges:
            if spent_s >= exchange.seconds:
                exchange.pass_over()
                continue
            began_s = time.monotonic()
            exchange.begin(replies)
            spent_s += time.monotonic() - began_s
            if exchange.wire is not None:
                number = exchange.wire.fileno()
                # Whoever asks the cluster anew closes connections of nodes that are gone, also those in use.
                if (closed := self._of.get(number)) is not None and closed.wire is not None:
                    closed.lose()
                self._of[number] = exchange
                exchange.send()  # it has something to do while the next one is begun
        self._send()

    def finish(self, exchanges: Sequence[Exchange]) -> None:
        """Go on with all until these are over.

        Silent is who has sent nothing by a look after its time was up: while its answer came we may have had
        no CPU, or been busy with those of others.
        """
        for exchange in self._of.values():
            exchange.be_patient()  # nobody has looked at it meanwhile
        while any(exchange.wire is not None for exchange in exchanges):
            self._send()
            for number, exchange in list(self._of.items()):
                if exchange.wire is None:
                    self._forget(number)
                    continue
                wanted = select.POLLIN | (select.POLLOUT if exchange.wire.sending else 0)
                if self._asked.get(number) != wanted:
                    self._poll.register(number, wanted)
                    self._asked[number] = wanted
            if not self._of:
                continue
            now = time.monotonic()
            until_s = min(exchange.until_s for exchange in self._of.values())
            ready = dict(self._poll.poll(max(until_s - now, 0) * 1000 + 1))
            for number, exchange in list(self._of.items()):
                event = ready.get(number, 0)
                if event & ~select.POLLOUT:
                    exchange.receive()
                elif now >= exchange.until_s and not (event and exchange.send()):
                    exchange.expire()
                if exchange.wire is None:
                    self._forget(number)

    def abandon(self, exchanges: Sequence[Exchange]) -> None:
        """Close the connections of those that are not over."""
        for exchange in exchanges:
            exchange.abandon()
        for number, exchange in list(self._of.items()):
            if exchange.wire is None:
                self._forget(number)

    def _forget(self, number: int) -> None:
        del self._of[number]
        if self._asked.pop(number, 0):
            self._poll.unregister(number)

    def _send(self) -> None:
        while sending := [one for one in self._of.values() if one.wire is not None and one.wire.sending]:
            if not sum(one.send() for one in sending):  # a chunk to each, so that all have something to do
                break


def exchange_all(exchanges: Sequence[Exchange], replies: list[Reply]) -> None:
    """Do them all, side by side."""
    traffic = Traffic()
    try:
        traffic.begin(exchanges, replies)
        traffic.finish(exchanges)
    finally:
        traffic.abandon(exchanges)  # what was interrupted


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


def facts(text: bytes) -> dict[str, str]:
    """Return the lines of an answer to INFO."""
    lines = text.decode("utf-8", "replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


def online_replicas(replication: dict[str, str]) -> int:
    """Return how many replicas follow, by what INFO says of replication; not those that are being filled."""
    return sum(name.startswith("slave") and ",state=online," in value for name, value in replication.items())


def describe(error: Exception) -> str:
    """Return one line about `error`, and what to do where that is known."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    # The package says of any server that refuses to tell of its cluster that it is none.
    shown = next((one for one in chain if isinstance(one, NoPermissionError)), error)
    kind, text = type(shown).__name__.removesuffix("Error"), " ".join(str(shown).split())
    told = f"{kind}: {' '.join(map(str, chain))}"
    advice = next((f"; {advice}" for pattern, advice in _ADVICE if re.search(pattern, told)), "")
    return f"{kind}: {text.removesuffix('.') if advice else text}{advice}"


_ADVICE = (
    (r"certificate has expired", "renew the server's certificate"),
    (
        r"certificate is not valid for",
        "give the server a certificate for what the URL or the cluster calls it, or say tls_hostname=no",
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "tls_ca= must name who has signed the server's certificate"),
    (r"(?i)alert certificate required", "the server wants a certificate of ours: tls_cert= and tls_key="),
    (r"KEY_VALUES_MISMATCH", "tls_key= must be the key of tls_cert="),
    (r"EOF occurred in violation", "the server may want a certificate of ours: tls_cert= and tls_key="),
    (r"Error 2 connecting", "a file that the URL names for TLS is not there"),
    (
        r"WRONG_VERSION_NUMBER|handshake operation timed out",
        "if its port is not for TLS, use redis, not rediss",
    ),
    (r"closed by server|reset by peer", "if at once, its port may be for TLS: use rediss, not redis"),
    (r"NoPermission", "give the user the rights that docs/redis.md lists"),
    (r"ReadOnly", "name the primary in the tier's URL"),
    (r"Cluster mode is not enabled", "a single server's URL begins with redis:// or rediss://"),
)
"""What of an error's line tells what is wrong, the first that does, and what mends it."""
