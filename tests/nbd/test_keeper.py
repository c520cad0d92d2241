"""The keeper with real servers, and a driver that behaves as the kernel's does; guests have the real one."""

import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.nbd import handshake, keeper, server
from tmem.nbd.export import Export
from tmem.nbd.keeper import Keeper
from tmem.nbd.server import Role

from ..waiting import DEADLINE_S
from .conftest import Server, eventually

if TYPE_CHECKING:
    from tmem.backends import _native
    from tmem.nbd.netlink import NbdControl

SIZE = 16 << 20


class Driver:
    """Device 3 of the kernel: one connection, replaced only when it is dead, and reports of its death."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reports, self._reporting = socket.socketpair()
        self.reports.setblocking(False)
        self.given = 0
        self.present = True
        self.failed = False

    def events(self) -> "Driver":
        return self

    def fileno(self) -> int:
        return self.reports.fileno()

    def dead(self, index: int) -> bool:
        assert index == 3
        try:
            return bool(self.reports.recv(4096))
        except BlockingIOError:
            return False

    def report(self) -> None:
        self._reporting.send(b"x")

    def reconnect(self, index: int, connection: socket.socket) -> None:
        assert index == 3
        if not self.present:
            raise AttachError("the kernel's nbd driver refused command 3: Invalid argument")
        self.given += 1
        if not self.alive:
            self.connection.close()
            self.connection = connection.dup()
            self.failed = False

    def send_write(self, data: bytes, offset: int) -> None:
        """Send a request to write, and wait for nothing."""
        self.connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, offset, len(data)) + data)

    @property
    def alive(self) -> bool:
        return not self.failed and not keeper._hung_up(self.connection)

    def fail(self) -> None:
        """Give the connection up as the kernel does when it cannot send: who is at its other end may live."""
        self.connection.shutdown(socket.SHUT_RDWR)
        self.failed = True
        self.report()

    def close(self) -> None:
        for one in (self.connection, self.reports, self._reporting):
            one.close()


@pytest.fixture
def servers(make_server: Callable[..., Server], tmp_path: Path) -> Iterator[dict[Role, Server]]:
    first = make_server("guest1", SIZE)
    second = Standby(first.paths, first.export, tmp_path / "standby.log")
    second.start()
    yield {"swap": first, "standby": second}
    second.kill()


class Standby(Server):
    """The second server of a device."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = server.command(self.paths, self.export.client, "standby")
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server.wait_ready(server.as_served(self.paths, self.export, "standby"))


@pytest.fixture
def driver(servers: dict[Role, Server]) -> Iterator[Driver]:
    """Connected to the first server."""
    connection, _ = handshake.connect(servers["swap"].export)
    made = Driver(connection)
    yield made
    made.close()


@pytest.fixture
def kept(servers: dict[Role, Server], driver: Driver) -> Iterator[Keeper]:
    one = servers["swap"]
    with closing(Keeper(one.paths, one.export, 3, cast("NbdControl", driver))) as made:
        yield made


def reads(driver: Driver) -> bool:
    """Say whether the device answers."""
    handshake.warm(driver.connection, handshake.ExportInfo(SIZE, 0), requests=1)
    return True


def count(servers: dict[Role, Server], role: Role) -> int:
    one = servers["swap"]
    return keeper.connections(server.as_served(one.paths, one.export, role))


def test_both_servers_serve_the_same_pages(servers: dict[Role, Server], paths: SegmentPaths) -> None:
    data = random.Random(1).randbytes(4096)
    with servers["swap"].client() as handle:
        handle.pwrite(data, 8192)
    other = Server(paths, server.as_served(paths, servers["swap"].export, "standby"), Path())
    with other.client() as handle:
        assert bytes(handle.pread(4096, 8192)) == data


def test_a_spare_leads_to_the_other_server(servers: dict[Role, Server], kept: Keeper, driver: Driver) -> None:
    kept.find_spare()
    assert kept.used == "swap"
    assert kept.spare is not None
    assert kept.spare.role == "standby"
    assert (count(servers, "swap"), count(servers, "standby")) == (1, 1)
    assert keeper.ready(servers["swap"].paths, servers["swap"].export)


@pytest.mark.parametrize("reported", [True, False], ids=["reported", "report-lost"])
def test_a_dead_server_is_replaced(
    servers: dict[Role, Server], kept: Keeper, driver: Driver, reported: bool
) -> None:
    """And when the first is back, the next spare leads there: to and fro."""
    roles: tuple[Role, Role] = ("swap", "standby")
    for turn in range(4):
        used, other = roles if turn % 2 == 0 else roles[::-1]
        kept.find_spare()
        servers[used].kill()
        if reported:
            driver.report()
        kept.turn()
        assert driver.given == turn + 1
        assert reads(driver)
        assert kept.used == other
        servers[used].start()


def test_what_a_server_has_received_is_not_done_after_newer_writes(
    servers: dict[Role, Server], kept: Keeper, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "SERVER_S", 0.1)
    old, new = (random.Random(seed).randbytes(4096) for seed in (1, 2))
    kept.find_spare()
    process = servers["swap"].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T", "it is stopped")
    driver.send_write(old, 8192)
    driver.fail()
    kept.turn()
    driver.send_write(new, 8192)
    assert driver.connection.recv(16, socket.MSG_WAITALL)[4:8] == bytes(4)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: count(servers, "swap") == 0, "the first server is done with the dead connection")
    one = servers["swap"]
    other = Server(one.paths, server.as_served(one.paths, one.export, "standby"), Path())
    with other.client() as handle:
        assert bytes(handle.pread(4096, 8192)) == new


def test_both_die_and_the_first_to_answer_is_taken(
    servers: dict[Role, Server], kept: Keeper, driver: Driver
) -> None:
    kept.find_spare()
    for one in servers.values():
        one.kill()
    driver.report()
    turning = threading.Thread(target=kept.turn)
    turning.start()
    servers["swap"].start()
    turning.join(DEADLINE_S)
    assert not turning.is_alive()
    assert reads(driver)
    assert kept.used == "swap"


def test_a_spare_whose_server_died_is_replaced(
    servers: dict[Role, Server], kept: Keeper, driver: Driver
) -> None:
    kept.find_spare()
    servers["standby"].kill()
    kept.turn()
    assert driver.given == 0
    kept.find_spare()
    assert kept.spare is None
    servers["standby"].start()
    kept.find_spare()
    assert kept.spare is not None
    servers["swap"].kill()
    driver.report()
    kept.turn()
    assert reads(driver)


def test_a_new_keeper_sees_which_server_is_used(
    servers: dict[Role, Server], kept: Keeper, driver: Driver
) -> None:
    kept.find_spare()
    servers["swap"].kill()
    driver.report()
    kept.turn()
    servers["swap"].start()
    kept.close()
    eventually(lambda: count(servers, "swap") == 0, "the first keeper has no spare")
    one = servers["swap"]
    with closing(Keeper(one.paths, one.export, 3, cast("NbdControl", driver))) as fresh:
        fresh.find_spare()
        assert fresh.used == "standby"
        assert fresh.spare is not None
        assert fresh.spare.role == "swap"


def test_a_device_that_is_taken_away(servers: dict[Role, Server], kept: Keeper, driver: Driver) -> None:
    """The kernel refuses; the keeper says so once, and goes on until it is stopped."""
    driver.present = False
    servers["swap"].kill()
    for _ in range(3):
        kept.turn()
    assert driver.given == 0
    driver.present = True
    servers["swap"].start()

    def goes_on() -> bool:
        kept.turn()
        return driver.given > 0

    eventually(goes_on, "it goes on when it can")
    assert reads(driver)


def test_an_export_that_is_not_attached(paths: SegmentPaths, swap_server: Server) -> None:
    command = keeper.command(paths, "guest1")
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "tmem: guest1 is not attached by the kernel's nbd driver: nothing is to be kept\n"


def test_standby_addresses(paths: SegmentPaths) -> None:
    wanted = Export("guest1", SIZE, tcp=("127.0.0.1", 10809), tls_psk="/keys")
    served = server.as_served(paths, wanted, "standby")
    assert served.unix == str(paths.state / "standby-guest1.sock")
    assert served.tcp is None
    assert server.as_served(paths, wanted, "swap") is wanted


def test_connections_are_counted(segment: "_native.Segment", swap_server: Server) -> None:
    eventually(lambda: keeper.connections(swap_server.export) == 0, "the probe has left")
    with swap_server.client():
        assert keeper.connections(swap_server.export) == 1
    eventually(lambda: keeper.connections(swap_server.export) == 0, "it has left")
