"""Redis servers of the tests' own: one, or a cluster of three primaries and three replicas on loopback.

Made by hand (CLUSTER MEET, ADDSLOTSRANGE, REPLICATE) in about a second, where redis-cli takes five and more.
Nothing is kept on disk. Servers are ended by their process ids.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import redis

from ...waiting import wait_until

NODE_TIMEOUT_MS = 1000
"""After which a cluster takes a silent primary for failed."""


class Server:
    """One redis-server in `directory`."""

    def __init__(self, directory: Path, *options: str, config: Path | None = None, tls: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._command = [
            "redis-server", *([str(config)] if config else []), "--bind", "127.0.0.1",
            "--dir", str(directory), "--save", "", "--appendonly", "no",
            "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1",
            *(("--port", "0", "--tls-port") if tls else ("--port",)), str(self.port), *options,
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
        with redis.Redis(port=self.port, socket_timeout=5, protocol=2) as client:
            return client.execute_command(*words)

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
        with redis.Redis(port=self.port, socket_timeout=5, protocol=2) as client:
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

    def kill(self) -> None:
        """End it at once, whatever it is doing; once is enough."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Cluster:
    """Three primaries, each with a replica."""

    def __init__(self, directory: Path, primaries: int = 3, replicas: int = 1) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
        self.servers: list[Server] = []
        self._bus_port = 0  # of the first
        try:
            for n in range(primaries * (1 + replicas)):
                bus_port = free_port()
                self._bus_port = self._bus_port or bus_port
                self.servers.append(Server(directory / str(n), *options, "--cluster-port", str(bus_port)))
            self._join(primaries, replicas)
        except BaseException:
            self.end()
            raise

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(server.address for server in self.servers[:2])

    def primaries(self) -> list[Server]:
        """The servers that are primaries now."""
        return [s for s in self.servers if s.process and s.info("replication")["role"] == "master"]

    def settled(self) -> bool:
        """Whether every slot is served and every primary has its replica."""
        with contextlib.suppress(redis.RedisError, OSError):
            running = [server for server in self.servers if server.process is not None]
            return all(_is_settled(server) for server in running)
        return False

    def mend(self) -> None:
        """Bring every server back that a test has ended, and remove what is stored."""
        for server in self.servers:
            if server.process is None:
                server.start()
            else:
                server.signal(signal.SIGCONT)
        wait_until(lambda: all(server.answers() for server in self.servers))
        for server in self.servers:
            _end_moves(server)
        wait_until(self.settled)
        for server in self.primaries():
            server.ask("FLUSHALL")

    def end(self) -> None:
        for server in self.servers:
            server.kill()

    def _join(self, primaries: int, replicas: int) -> None:
        wait_until(lambda: all(server.answers() for server in self.servers))
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
    with redis.Redis(port=server.port, protocol=2) as client:
        facts = client.execute_command("CLUSTER INFO")
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


def _is_settled(server: Server) -> bool:
    replication = server.info("replication")
    if replication["role"] == "master":
        state = replication["connected_slaves"] == 1 and replication["slave0"]["state"] == "online"  # type: ignore[index]
    else:
        state = replication["master_link_status"] == "up"
    with redis.Redis(port=server.port, protocol=2) as client:
        return bool(state) and client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"


@contextlib.contextmanager
def single(directory: Path, *options: str, config: Path | None = None, tls: bool = False) -> Iterator[Server]:
    """One server for the length of a `with`."""
    server = Server(directory, *options, config=config, tls=tls)
    try:
        wait_until(server.listens)
        yield server
    finally:
        server.kill()
