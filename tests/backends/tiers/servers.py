"""Redis servers of the tests' own: one, or a cluster of three primaries and three replicas on loopback.

Made by hand (CLUSTER MEET, ADDSLOTSRANGE, REPLICATE) in about a second, where redis-cli takes five and more.
Nothing is kept on disk. Servers are ended by their process ids. TMEM_REDIS_SERVER=/PATH/TO/valkey-server has
another server's binary than redis-server stand all tests.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from ...waiting import wait_until

NODE_TIMEOUT_MS = 1000
"""After which a cluster takes a silent primary for failed."""
BINARY = os.environ.get("TMEM_REDIS_SERVER", "redis-server")


@dataclass(frozen=True)
class Tls:
    """What a server that speaks TLS shows: NAME.pem and NAME.key beside the ca.pem that signed them."""

    directory: Path
    name: str = "cert"

    @property
    def options(self) -> tuple[str, ...]:
        """Of the server."""
        return (
            "--tls-cert-file", f"{self.directory}/{self.name}.pem",
            "--tls-key-file", f"{self.directory}/{self.name}.key",
            "--tls-ca-cert-file", f"{self.directory}/ca.pem",
            "--tls-cluster", "yes", "--tls-replication", "yes",
        )  # fmt: skip

    @property
    def keywords(self) -> dict[str, Any]:
        """For who asks one of ours."""
        return {
            "ssl": True,
            "ssl_ca_certs": f"{self.directory}/ca.pem",
            "ssl_certfile": f"{self.directory}/cert.pem",
            "ssl_keyfile": f"{self.directory}/cert.key",
            "ssl_check_hostname": False,
        }


class Server:
    """One server in `directory`."""

    def __init__(
        self, directory: Path, *options: str, config: Path | None = None, tls: Tls | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._secure: redis.Redis | None = None
        if tls is not None:
            self._secure = redis.Redis(port=self.port, socket_timeout=5, protocol=2, **tls.keywords)
        self._command = [
            BINARY, *([str(config)] if config else []), "--bind", "127.0.0.1",
            "--dir", str(directory), "--save", "", "--appendonly", "no",
            "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1",
            *(("--port", "0", "--tls-port", str(self.port), *tls.options) if tls
              else ("--port", str(self.port))), *options,
        ]  # fmt: skip
        self._log = directory / "log"
        self._dump = directory / "dump.rdb"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Run it, empty: also without what it was sent as a replica, which it keeps in a file."""
        self._dump.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(self, *words: str | int | bytes) -> object:
        """Send one command over a connection of its own; the answer."""
        with self.client() as client:
            answer: object = client.execute_command(*words)  # type: ignore[no-untyped-call]
            return answer

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """The package's own client; over TLS one for the server's life, for it takes long to connect."""
        if self._secure is None:
            with redis.Redis(port=self.port, socket_timeout=5, protocol=2) as client:
                yield client
        else:
            yield self._secure

    def listens(self) -> bool:
        """Whether it is there, whoever may talk to it."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return False

    def answers(self) -> bool:
        """Whether it answers us."""
        with contextlib.suppress(redis.RedisError, OSError):
            return bool(self.ask("PING"))
        return False

    def info(self, section: str) -> dict[str, object]:
        with self.client() as client:
            facts: dict[str, object] = client.info(section)
            return facts

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP it for as long as the context lasts."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def kill(self) -> None:
        """End it at once, whatever it is doing; once is enough."""
        if self._secure is not None:
            self._secure.close()  # it connects again once it is asked again
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Cluster:
    """Three primaries, each with a replica, if not asked for others."""

    def __init__(
        self,
        directory: Path,
        primaries: int = 3,
        replicas: int = 1,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
        self.servers: list[Server] = []
        try:
            while not self._begun(directory, primaries * (1 + replicas)):
                self.end()  # somebody else was quicker to take a port
            self._join(primaries, replicas)
        except BaseException:
            self.end()
            raise

    def _begun(self, directory: Path, count: int) -> bool:
        bus_ports = [free_port() for _ in range(count)]
        self._bus_port = bus_ports[0]
        self.servers = [
            Server(directory / str(n), *self._options, "--cluster-port", str(port), tls=self._tls)
            for n, port in enumerate(bus_ports)
        ]
        wait_until(lambda: all(server.has_ended() or server.answers() for server in self.servers))
        return not any(server.has_ended() for server in self.servers)

    @property
    def url(self) -> str:
        """Of two of its nodes."""
        scheme = "redis" if self._tls is None else "rediss"
        return f"{scheme}+cluster://" + ",".join(server.address for server in self.servers[:2])

    def primaries(self) -> list[Server]:
        """The servers that are primaries now."""
        return [s for s in self.servers if s.process and s.info("replication")["role"] == "master"]

    def replicas(self, primary: Server) -> list[Server]:
        """The servers that have what is written to `primary`."""
        there = [s for s in self.servers if s.process and s.info("replication")["role"] == "slave"]
        return [s for s in there if s.info("replication")["master_port"] == primary.port]

    def settled(self) -> bool:
        """Whether every slot is served, by primaries with a replica each at least; nobody is left over.

        All of them say so: after a failover some do not know of it yet.
        """
        with contextlib.suppress(redis.RedisError, OSError):
            running = [server for server in self.servers if server.process is not None]
            counts = [_replicas_of(server) for server in running]
            served = [count for count in counts if count is not None]
            if min(served) <= 0 or sum(served) != len(counts) - len(served):
                return False
            ports = {server.port for server, count in zip(running, counts, strict=True) if count is not None}
            return all({port for _, _, port in _slots_known_to(server)} == ports for server in running)
        return False

    def owner(self, slot: int) -> Server:
        """The primary that has the slot."""
        primaries = self.primaries()
        for server in primaries:
            for start, end, port in _slots_known_to(server):
                if start <= slot <= end:
                    return next(one for one in primaries if one.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def moved(self, slot: int, target: Server) -> None:
        """Give a slot with all that is in it to another primary, as redis-cli does."""
        moving = Move(self, slot, target)
        while moving.keys():
            moving.some(10)
        moving.end()

    @contextlib.contextmanager
    def joined(self, directory: Path) -> Iterator[Server]:
        """One more primary, without slots, for the length of a `with`; it must have none at the end."""
        bus = ("--cluster-port", str(free_port()))
        server = Server(directory, *self._options, *bus, tls=self._tls)
        try:
            wait_until(server.answers)
            server.ask("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self._bus_port)
            count = len(self.servers) + 1
            wait_until(lambda: all(_knows(one, count) for one in [server, *self.servers]), what="it has met")
            wait_until(lambda: "cluster_state:ok" in text(server.ask("CLUSTER", "INFO")))
            self.servers.append(server)
            yield server
        finally:
            self.servers.remove(server)
            name = text(server.ask("CLUSTER", "MYID"))
            server.kill()
            for one in self.servers:
                one.ask("CLUSTER", "FORGET", name)

    def revive(self) -> None:
        """Bring every server back that a test has ended or stopped."""
        for server in self.servers:
            if server.process is None:
                server.start()
            else:
                server.signal(signal.SIGCONT)
        wait_until(lambda: all(server.answers() for server in self.servers))
        for server in self.primaries():  # Valkey's tell their replicas
            _end_moves(server)
        wait_until(self._is_in_order, what="every server is there again")

    def _is_in_order(self) -> bool:
        """Whether all is settled. Until then who follows a replica, or has no slots, gets a primary."""
        if self.settled():
            return True
        with contextlib.suppress(redis.RedisError, OSError):
            served = {port: text(name) for _, _, (_, port, name, *_), *_ in self._slots()}
            roles = {server.port: server.info("replication") for server in self.servers}
            fewest = min(served, key=lambda port: int(str(roles[port]["connected_slaves"])))
            for server in self.servers:
                role, port = roles[server.port], server.port
                above = role.get("master_port")
                if role["role"] == "master" and port not in served:
                    server.ask("CLUSTER", "REPLICATE", served[fewest])
                elif role["role"] == "slave" and above not in served and above in roles:
                    primary = roles[above].get("master_port")
                    server.ask("CLUSTER", "REPLICATE", served.get(primary, served[fewest]))
        return False

    def _slots(self) -> list[Any]:
        slots = self.servers[0].ask("CLUSTER", "SLOTS")
        assert isinstance(slots, list)
        return slots

    def mend(self) -> None:
        """Bring every server back, and remove what is stored."""
        self.revive()
        for server in self.primaries():
            server.ask("FLUSHALL")

    def end(self) -> None:
        for server in self.servers:
            server.kill()

    def _join(self, primaries: int, replicas: int) -> None:
        first = self.servers[0]
        names = []
        for n, server in enumerate(self.servers):
            if n < primaries:
                slots = (16384 * n // primaries, 16384 * (n + 1) // primaries - 1)
                server.ask("CLUSTER", "ADDSLOTSRANGE", *slots)
                server.ask("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            if server is not first:
                server.ask("CLUSTER", "MEET", "127.0.0.1", first.port, self._bus_port)
            names.append(server.ask("CLUSTER", "MYID"))
        count = len(self.servers)
        wait_until(lambda: all(_knows(server, count) for server in self.servers), what="the cluster has met")
        for n in range(primaries, count):
            name = names[n % primaries]
            assert isinstance(name, bytes | str)
            self.servers[n].ask("CLUSTER", "REPLICATE", name)
        wait_until(self.settled, what="the cluster is complete")


def free_port() -> int:
    """Return a port that nobody listens at."""
    while True:
        port = random.randrange(20_000, 32_000)  # below those that connections are given
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _knows(server: Server, count: int) -> bool:
    with server.client() as client:
        facts = client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
        text = facts if isinstance(facts, dict) else {}
        return int(text.get("cluster_known_nodes", 0)) >= count


def _end_moves(server: Server) -> None:
    """Have it forget that slots are on their way to it: else it does not hear of another owner of them, and
    once the one that it knows of has died it takes the cluster for down for ever."""
    nodes = text(server.ask("CLUSTER", "NODES"))
    for slot in re.findall(r"\[(\d+)-[<>]-", nodes):
        server.ask("CLUSTER", "SETSLOT", slot, "STABLE")


def text(answer: object) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def _replicas_of(server: Server) -> int | None:
    """Return how many replicas it has, None if it is one; -1 if anything is not as it will be."""
    replication = server.info("replication")
    with server.client() as client:
        facts = client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
        if facts["cluster_state"] != "ok":
            return -1
    if replication["role"] != "master":
        return None if replication["master_link_status"] == "up" else -1
    count = int(str(replication["connected_slaves"]))
    online = all(replication[f"slave{n}"]["state"] == "online" for n in range(count))  # type: ignore[index]
    return count if online else -1


def _slots_known_to(server: Server) -> list[tuple[int, int, int]]:
    """Return the first and the last of each run of slots, and its primary's port, as far as it knows."""
    said = server.ask("CLUSTER", "SLOTS")
    return [(start, end, port) for start, end, (_, port, *_), *_ in said]  # type: ignore[attr-defined]


class Move:
    """A slot on its way to `target`, step by step."""

    def __init__(self, cluster: Cluster, slot: int, target: Server) -> None:
        self._slot, self._target = slot, target
        self._others = [one for one in cluster.primaries() if one is not target]
        self.source = source = cluster.owner(slot)
        self._name = text(target.ask("CLUSTER", "MYID"))
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", text(source.ask("CLUSTER", "MYID")))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self._name)

    def keys(self) -> list[bytes]:
        """Return some of the keys that are still at the source."""
        found = self.source.ask("CLUSTER", "GETKEYSINSLOT", self._slot, 100)
        assert isinstance(found, list)
        return found

    def some(self, most: int) -> None:
        """Move so many keys."""
        for key in self.keys()[:most]:
            self.source.ask("MIGRATE", "127.0.0.1", self._target.port, key, 0, 2000)

    def end(self) -> None:
        """Tell everybody whose it is now."""
        self._target.ask("CLUSTER", "SETSLOT", self._slot, "NODE", self._name)
        for server in (self.source, *self._others):
            with contextlib.suppress(redis.ResponseError):  # who had no other slot is a replica by now
                server.ask("CLUSTER", "SETSLOT", self._slot, "NODE", self._name)


@contextlib.contextmanager
def single(
    directory: Path, *options: str, config: Path | None = None, tls: Tls | None = None
) -> Iterator[Server]:
    """One server for the length of a `with`."""
    server = Server(directory, *options, config=config, tls=tls)
    try:
        wait_until(server.listens)
        yield server
    finally:
        server.kill()
