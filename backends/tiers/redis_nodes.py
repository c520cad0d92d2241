"""Commands to the servers of a Redis or Valkey: pipelined by node, repeated, bounded in time.

`Nodes.run` takes commands that each concern one key. It sends each node the commands of its slots in one go,
to all nodes at a time, and asks each at the end how many replicas have what it was told
(`WAIT`, on the same connection, as Redis wants it). What did not succeed because a node died, a slot moved or
too few replicas answered is sent again, to whom the cluster then names, until the time is up. So **every
command must bear being done twice**, and none may depend on another of the same call. `Nodes.begin` does the
first half of it, so that whoever has something else to do need not wait.

The `redis` package knows the topology, connects, authenticates, and does TLS; its own cluster pipeline cannot
`WAIT`, retries by counting instead of by the clock, and so is not used. Connections are pooled, made when
they are needed, and never shared with a forked child (the package looks at the process id).

Not for what is stored: `redis_tier`. Threading: any thread.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from tmem.backends import _native
from tmem.backends.tiers.redis_exchange import (
    FAILURES,
    Command,
    Demand,
    Exchange,
    Open,
    Traffic,
    exchange_all,
    refused,
    talk,
)
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.backends.tiers.redis_wire import Reply, Taken, Word
from tmem.errors import TierDownError, TierError

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.02, 0.25


class Nodes:
    """The servers at `address`. Connects when it is first used."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self.seconds = address.timeout_seconds
        """How long to try again what did not succeed."""
        self._attempt_seconds = min(5.0, max(self.seconds / 4, min(self.seconds, 0.25)))
        self._lock = threading.Lock()
        self._cluster: RedisCluster | None = None
        self._tries = 0  # to connect to the cluster that have ended
        self._refusal = ""  # what the last one ended with, if it failed
        self._unreached: dict[str, float] = {}  # nodes that could not be connected to, and when that was
        self._attached: dict[str, int] = {}  # how many replicas primaries had last
        self._strangers: dict[str, redis.ConnectionPool] = {}  # nodes that ASK named and have no slots yet
        self._single: redis.ConnectionPool | None = None
        if not address.cluster:
            self._single = self._pool(*address.servers[0])

    def run(
        self,
        commands: Sequence[Command],
        *,
        replicated: bool = False,
        anywhere: bool = False,
        taken: Taken | None = None,
    ) -> list[Reply]:
        """Do the commands and return the answer of each, in order: of a value what `taken` makes of it.

        `replicated`: they count only once as many replicas as are demanded have them. `anywhere`: they read
        what is written once, so what a replica has is as good where the primary does not answer; nobody then
        waits for an election, nor for a node that takes the cluster for down. TierFullError if a server has
        no memory for one of them, TierDownError if time is up or a server refuses: some of them may have
        been done, or be done yet.
        """
        return self.begin(commands, Traffic(), replicated=replicated, anywhere=anywhere, taken=taken).end()

    def begin(
        self,
        commands: Sequence[Command],
        traffic: Traffic,
        *,
        replicated: bool = False,
        anywhere: bool = False,
        taken: Taken | None = None,
    ) -> "Running":
        """Send the commands as far as that goes at once; the rest of `run` is `Running.end`.

        What else goes on in `traffic`, which is the caller's thread's own, goes on meanwhile.
        """
        return Running(self, commands, traffic, replicated, anywhere, taken)

    def once(self, commands: Sequence[Command]) -> tuple[list[Reply], str]:
        """Try each command a single time, connecting to no cluster; the answers, and what the trouble was.

        None for one that did not succeed. Takes as long as one answer of each node may take.
        """
        replies: list[Reply] = [None] * len(commands)
        if self.address.cluster and self._cluster is None:
            return replies, "not connected"
        troubles: list[str] = []
        try:
            self._attempt([Open(place, one) for place, one in enumerate(commands)], replies, False, troubles)
        except TierError as error:
            troubles.append(str(error))
        return replies, "; ".join(troubles)

    def each(self, *words: Word) -> dict[str, Reply]:
        """Send every primary one command that concerns no key; the answers by address. TierDownError."""
        return {name: self.ask(name, *words) for name in self.primaries()}

    def ask(self, name: str, *words: Word) -> Reply:
        """Send the node called `name` (HOST:PORT) one command that concerns no key. TierDownError."""
        pool = self._pools().get(name)
        if pool is None:
            raise TierDownError(f"{name} has left {self.address}")
        try:
            try:
                return talk(pool, words)
            except RedisConnectionError:
                # Also of a connection that somebody between us has forgotten; others may be no better.
                pool.disconnect(inuse_connections=False)
                return talk(pool, words)
        except FAILURES as error:
            self.refresh()
            raise refused(name, error) from None

    def primaries(self) -> list[str]:
        """Return HOST:PORT of every primary. TierDownError if nobody can tell."""
        cluster = self._connected()
        if cluster is None:
            host, port = self.address.servers[0]
            return [f"{host}:{port}"]
        nodes: list[ClusterNode] = cluster.get_primaries()  # type: ignore[no-untyped-call]
        return [node.name for node in nodes]

    def all(self) -> list[str]:
        """Return HOST:PORT of every primary and replica that is up. TierDownError if nobody can tell."""
        return list(self._pools())

    def demanded_of(self, name: str) -> int:
        """Return how many replicas the primary `name` must have to be written to. TierDownError."""
        demand = self._demand(name, None)
        if demand is None:
            return 0
        return demand.listed if demand.attached else demand.replicas

    def _demand(self, name: str, nodes: Sequence[ClusterNode] | None) -> Demand | None:
        """Return which replicas must have what the primary `name` is told: `nodes` are it and its replicas.

        All that the cluster lists, and that the primary has, or one of them that has not got a batch might be
        promoted.
        """
        if self.address.replicas is not None:
            return Demand(self.address.replicas) if self.address.replicas else None
        cluster = self._connected()
        if cluster is None:
            return Demand(1)
        if nodes is None:
            slots = list(cluster.nodes_manager.slots_cache.values())
            nodes = next((nodes for nodes in slots if nodes[0].name == name), ())
        listed = max(1, len(nodes) - 1)
        return Demand(max(listed, self._attached.get(name, 0)), listed, attached=True)

    def owner(self, key: bytes) -> str:
        """Return which node has a key, by what is known now; "" if nobody has. TierDownError."""
        try:
            return self._nodes_of()(key)[0]
        except (LookupError, RedisClusterException):
            return ""

    def refresh(self) -> None:
        """Ask the cluster who has which slots now; if nobody answers, begin with the URL's servers again."""
        cluster = self._cluster
        if cluster is None:
            return
        try:
            cluster.nodes_manager.initialize()
        except FAILURES:
            with self._lock:
                if self._cluster is cluster:
                    self._cluster = None
            with contextlib.suppress(*FAILURES):
                cluster.close()

    def close(self) -> None:
        """Close every connection."""
        for pool in [self._single, *self._strangers.values()]:
            if pool is not None:
                pool.disconnect()
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            with contextlib.suppress(*FAILURES):
                cluster.close()

    def _attempt(
        self, wanted: list[Open], replies: list[Reply], replicated: bool, troubles: list[str]
    ) -> list[Open]:
        """Try every command once; return those that must be tried again, and say why in `troubles`."""
        exchanges, left = self.exchanges(wanted, replicated, troubles, None)
        exchange_all(exchanges, replies)
        return left + self.left_of(exchanges, troubles)

    def exchanges(
        self, wanted: list[Open], replicated: bool, troubles: list[str], taken: Taken | None
    ) -> tuple[list[Exchange], list[Open]]:
        """Return what to say to whom, and what nobody can be told now."""
        groups: dict[str, list[Open]] = {}
        demands: dict[str, Demand | None] = {}
        try:
            pools = self._pools()
            nodes_of = self._nodes_of()
            for one in wanted:
                name, nodes = nodes_of(one.command.key)
                if one.asked is not None:
                    name, nodes = one.asked, None
                groups.setdefault(name, []).append(one)
                if replicated and name not in demands:  # by what says whose it is now
                    demands[name] = self._demand(name, nodes)
        except (*FAILURES, TierError) as error:
            troubles.append(str(error))
            return [], wanted
        except KeyError as error:
            troubles.append(f"no server has slot {error}")
            return [], wanted
        exchanges = [
            Exchange(
                name,
                pools.get(name) or self._stranger(name, group),
                group,
                demands.get(name),
                self._attempt_seconds,
                taken,
            )
            for name, group in groups.items()
        ]
        return self._sorted(exchanges), []

    def _sorted(self, exchanges: list[Exchange]) -> list[Exchange]:
        """Return them so that none is passed over again and again for those that cannot be connected to, not
        even one that was so itself: who was tried in vain most recently comes last."""
        return sorted(exchanges, key=lambda exchange: self._unreached.get(exchange.name, 0.0))

    def _learn(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            if exchange.reached is False:
                self._unreached[exchange.name] = time.monotonic()
            elif exchange.reached:
                self._unreached.pop(exchange.name, None)
            if exchange.attached is not None:
                self._attached[exchange.name] = exchange.attached

    def left_of(self, exchanges: Sequence[Exchange], troubles: list[str]) -> list[Open]:
        """Return what these exchanges have left to be tried again."""
        self._learn(exchanges)
        left = []
        for exchange in exchanges:
            if exchange.refusal is not None:
                raise exchange.refusal
            left += exchange.left
            if exchange.left:
                if self._single is not None and exchange.trouble.startswith("Moved"):
                    raise TierDownError(
                        f"{exchange.name} is a node of a cluster: use redis+cluster://{exchange.name}"
                    )
                troubles.append(f"{exchange.name}: {exchange.trouble}")
        return left

    def ask_replicas(
        self, wanted: list[Open], replies: list[Reply], troubles: list[str], taken: Taken | None
    ) -> list[Open]:
        """Ask for each command every replica that there is of its slot; return those without an answer, and
        say in `troubles` if a replica lets nobody ask."""
        cluster = self._cluster
        if cluster is None:
            return wanted
        pools = _pools_of(cluster)
        slots = cluster.nodes_manager.slots_cache
        left = wanted
        for rank in range(1, max(map(len, slots.values()), default=0)):
            groups: dict[str, list[Open]] = {}
            others = []
            for one in left:
                nodes = slots.get(_native.resp_slot(one.command.key), ())
                if one.asked is None and rank < len(nodes):
                    groups.setdefault(nodes[rank].name, []).append(one)
                else:
                    others.append(one)
            exchanges = self._sorted(
                [
                    Exchange(name, pools.get(name), group, None, self._attempt_seconds, taken, replica=True)
                    for name, group in groups.items()
                ]
            )
            exchange_all(exchanges, replies)
            self._learn(exchanges)
            troubles += [str(exchange.refusal) for exchange in exchanges if exchange.refusal is not None]
            left = [*others, *(one for exchange in exchanges for one in exchange.left)]
        return left

    def _nodes_of(self) -> Callable[[bytes], tuple[str, Sequence[ClusterNode] | None]]:
        """Return which node has a key by what is known now, and it with its replicas; KeyError for none."""
        cluster = self._connected()
        if cluster is None:
            (only,) = self.primaries()
            return lambda _key: (only, None)
        slots = cluster.nodes_manager.slots_cache

        def nodes_of(key: bytes) -> tuple[str, Sequence[ClusterNode] | None]:
            nodes = slots[_native.resp_slot(key)]
            return nodes[0].name, nodes

        return nodes_of

    def _stranger(self, name: str, group: Sequence[Open]) -> redis.ConnectionPool | None:
        """Return how to reach a node that the cluster does not list, for no slot is whole there yet."""
        if name not in self._strangers and any(one.asked for one in group):
            host, _, port = name.rpartition(":")
            self._strangers[name] = self._pool(host, int(port))
        return self._strangers.get(name)

    def _pool(self, host: str, port: int) -> redis.ConnectionPool:
        kind = redis.SSLConnection if self.address.tls else redis.Connection
        return redis.ConnectionPool(kind, host=host, port=port, db=self.address.database, **self._keywords())

    def _pools(self) -> dict[str, redis.ConnectionPool]:
        cluster = self._connected()
        if cluster is None:
            assert self._single is not None
            return {self.primaries()[0]: self._single}
        return _pools_of(cluster)

    def _connected(self) -> RedisCluster | None:
        """Return the cluster, None for a single server. TierDownError if no node of it answers."""
        if not self.address.cluster:
            return None
        before = self._tries
        with self._lock:
            if self._cluster is None:
                if self._tries != before and self._refusal:
                    raise TierDownError(self._refusal)  # somebody has tried while we waited: not each in turn
                self._refusal = ""
                try:
                    self._cluster = RedisCluster(
                        startup_nodes=[
                            ClusterNode(host, port)  # type: ignore[no-untyped-call]
                            for host, port in self.address.servers
                        ],
                        require_full_coverage=False,
                        ssl=self.address.tls,
                        **self._keywords(),
                    )
                except FAILURES as error:
                    refusal = refused(self.address, error)
                    self._refusal = str(refusal)
                    raise refusal from None
                finally:
                    self._tries += 1
            return self._cluster

    def _keywords(self) -> dict[str, Any]:
        address = self.address
        keywords: dict[str, Any] = {
            "socket_timeout": self._attempt_seconds,
            "socket_connect_timeout": self._attempt_seconds,
            "retry": Retry(NoBackoff(), 0),  # here, by the clock
            "protocol": 2,
        }
        if address.password_file is not None:
            keywords["credential_provider"] = PasswordFile(address.user, address.password_file)
        elif address.password is not None:
            keywords |= {"username": address.user, "password": address.password}
        if address.tls:
            keywords |= {
                "ssl_ca_certs": None if address.tls_ca is None else str(address.tls_ca),
                "ssl_certfile": None if address.tls_cert is None else str(address.tls_cert),
                "ssl_keyfile": None if address.tls_key is None else str(address.tls_key),
                "ssl_check_hostname": address.tls_hostname,
            }
        return keywords


class Running:
    """Commands that were begun (`Nodes.begin`), of one thread. Either `end` or `drop` comes, once."""

    def __init__(
        self,
        nodes: Nodes,
        commands: Sequence[Command],
        traffic: Traffic,
        replicated: bool,
        anywhere: bool,
        taken: Taken | None,
    ) -> None:
        self._nodes = nodes
        self._traffic = traffic
        self._replicated = replicated
        self._anywhere = anywhere
        self._taken = taken
        self._replies: list[Reply] = [None] * len(commands)
        self._left = [Open(place, command) for place, command in enumerate(commands)]
        self._exchanges: list[Exchange] = []
        self._troubles: list[str] = []
        self._deadline = time.monotonic() + nodes.seconds
        self._attempt()

    def end(self) -> list[Reply]:
        """Wait for the answers, and try again what did not succeed; the rest of `Nodes.run`."""
        nodes, pause = self._nodes, _FIRST_PAUSE_SECONDS
        try:
            while self._unanswered():
                if time.monotonic() + pause > self._deadline:
                    raise TierDownError(
                        f"{nodes.address} does not answer, tried for {nodes.seconds:g} s: "
                        f"{self._troubles[-1]}"
                    )
                time.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
                nodes.refresh()
                self._attempt()
            return self._replies
        finally:
            self.drop()

    def drop(self) -> None:
        """Wait for nothing any more: connections with answers to come are closed."""
        self._traffic.abandon(self._exchanges)

    def _attempt(self) -> None:
        self._troubles = []
        self._exchanges, self._left = self._nodes.exchanges(
            self._left, self._replicated, self._troubles, self._taken
        )
        try:
            self._traffic.begin(self._exchanges, self._replies)
        except BaseException:
            self.drop()
            raise

    def _unanswered(self) -> bool:
        """Wait for this attempt's end; whether something must be tried again."""
        self._traffic.finish(self._exchanges)
        self._left += self._nodes.left_of(self._exchanges, self._troubles)
        if self._left and self._anywhere:
            self._left = self._nodes.ask_replicas(self._left, self._replies, self._troubles, self._taken)
        return bool(self._left)


def _pools_of(cluster: RedisCluster) -> dict[str, redis.ConnectionPool]:
    nodes: list[ClusterNode] = cluster.get_nodes()  # type: ignore[no-untyped-call]
    return {node.name: node.redis_connection.connection_pool for node in nodes if node.redis_connection}


class PasswordFile(CredentialProvider):
    """Reads the password at each connect, so that it can be changed."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return what AUTH takes."""
        try:
            password = self._path.read_text().rstrip("\r\n")
        except OSError as error:
            raise redis.AuthenticationError(f"cannot read {self._path}: {error.strerror}") from None
        except ValueError:  # it is being written
            raise redis.AuthenticationError(
                f"{self._path} is no UTF-8 text: write the password there"
            ) from None
        return (password,) if self._user is None else (self._user, password)
