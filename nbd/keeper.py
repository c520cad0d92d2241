"""Keeps a device connected that this machine swaps to: when its server dies, the kernel gets another at once.

The kernel's nbd driver parks the requests of a device whose connection has died. The keeper, one small
process a device, holds a spare connection to the server that is not in use, past the handshake and warm, and
hands it to the kernel as soon as that reports the death. The manager starts the dead server again meanwhile;
the next spare leads there. A process of its own, and not a task of the manager, because a manager that backs
memory can wait inside the kernel with its address space locked, just when this must not wait.

    spare ready --(connection died)--> given to the kernel --> looking for a spare --> spare ready
         \\--(its server died)--> looking for a spare --/
    looking for a spare --(connection died)--> the first server that answers is given to the kernel

``python -m tmem.nbd.keeper DIRECTORY NAME CLIENT``; by way of `guarded`. Single-threaded. Nothing that
happens between a death and the hand-over needs an import, a file or memory that is not there yet.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tmem.backends import locking
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, TmemError
from tmem.nbd import handshake, server
from tmem.nbd.export import Export, load
from tmem.nbd.netlink import NbdControl
from tmem.nbd.receiver import Receiver
from tmem.nbd.server import Role

LOOK_MS = 20
"""How often a server that does not answer is tried while the kernel waits for one."""
IDLE_MS = 500
"""How often it is otherwise, and how often the kernel's connection is looked for: a report can be lost."""
_RECEIVER_S = 5.0
"""So long the worker that read from a dead connection is awaited; one that waits for the next cannot end."""
SERVER_S = 5.0
"""So long a server that lives may take to be done with the dead connection; then it is killed."""
_HANDSHAKE_S = 5.0
_WARM_READS = 8
"""A server has one thread that answers; a death meanwhile is seen only after them."""
_CONNECTED = "03"  # state of a connected unix socket in /proc/net/unix (SS_CONNECTED)


@dataclass
class Spare:
    """A connection that is ready to be given away, and whose it is."""

    role: Role
    connection: socket.socket


class Keeper:
    """The state of one device: `index` (0 for /dev/nbd0), its servers, and which of them the kernel uses."""

    def __init__(self, paths: SegmentPaths, export: Export, index: int, control: NbdControl) -> None:
        self.servers: dict[Role, Export] = {
            role: server.as_served(paths, export, role) for role in ("swap", "standby")
        }
        self.used: Role = "swap"
        self.spare: Spare | None = None
        self._paths = paths
        self._client = export.client
        self._index = index
        self._control = control
        self._events = control.events()
        self._poll = select.poll()
        self._poll.register(self._events.fileno(), select.POLLIN)
        self._said = ""
        self._receiver = Receiver(index)

    def run(self) -> NoReturn:
        """Keep the device connected until this process is ended."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Find a spare if there is none, wait for something to happen, and act if it was a death."""
        self.find_spare()
        self._receiver.find()
        self._poll.poll(IDLE_MS)
        if self._events.dead(self._index) or not self._kernel_connected():
            self.replace()

    def find_spare(self) -> None:
        """Unless there is a spare, connect to the server that is not in use, if it answers."""
        if self.spare is not None and _hung_up(self.spare.connection):
            self._drop_spare()
        if self.spare is not None:
            return
        counts = {role: connections(served) for role, served in self.servers.items()}
        if counts["swap"] != counts["standby"]:
            self.used = "swap" if counts["swap"] > counts["standby"] else "standby"
        role: Role = "standby" if self.used == "swap" else "swap"
        connection = self._connect(role)
        if connection is not None:
            self.spare = Spare(role, connection)
            self._poll.register(connection.fileno(), select.POLLIN)

    def replace(self) -> None:
        """Give the kernel a connection to a server that answers, however long it takes to find one."""
        if self.spare is not None and _hung_up(self.spare.connection):
            self._drop_spare()
        while (taken := self.spare or self._first_answer()) is None:
            time.sleep(LOOK_MS / 1000)
        self._forget_spare()
        self._await_server(taken.role)
        self._await_receiver()
        said = f"/dev/nbd{self._index} goes on with server {taken.role}"
        with taken.connection:
            try:
                self._control.reconnect(self._index, taken.connection)
                self.used = taken.role
            except AttachError as error:  # it is being taken away, or memory is short: tried again
                said = str(error)
        if said != self._said:
            _say(said)
        self._said = said

    def _await_server(self, taken: Role) -> None:
        """Wait until no server has the dead connection, which a failed send has ended: it may be alive.

        What it has received it would still do, after newer writes by way of the one that is `taken`. One
        that was killed does nothing more, even if the kernel cannot end it.
        """
        deadline, killed = time.monotonic() + SERVER_S, False
        while connections(self.servers[self.used]) > (taken == self.used):
            if time.monotonic() > deadline:
                if killed:
                    return
                process = server.running(self._paths, self._client, self.used)
                if process is not None:
                    _say(f"/dev/nbd{self._index}: server {self.used} does not let go, and is killed")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                deadline, killed = time.monotonic() + SERVER_S, True
            time.sleep(0.001)

    def _await_receiver(self) -> None:
        """Wait until nobody reads from the dead connection, or they would read from the next (`receiver`)."""
        self._receiver.find()
        deadline = time.monotonic() + _RECEIVER_S
        while not self._receiver.ended():
            if time.monotonic() > deadline:
                _say(f"/dev/nbd{self._index}: the reader of the dead connection does not end")
                self._receiver.forget()
                return
            time.sleep(0.001)

    def _first_answer(self) -> Spare | None:
        # The other one first: the one that was in use has just died.
        for role in sorted(self.servers, key=lambda role: role == self.used):
            connection = self._connect(role, warm=False)  # the kernel waits
            if connection is not None:
                return Spare(role, connection)
        return None

    def _connect(self, role: Role, warm: bool = True) -> socket.socket | None:
        """Return a connection to that server, past the handshake, or None if it does not answer."""
        try:
            connection, info = handshake.connect(self.servers[role], _HANDSHAKE_S)
        except (OSError, AttachError):
            return None
        try:
            connection.settimeout(_HANDSHAKE_S)
            if warm:
                handshake.warm(connection, info, _WARM_READS)
            connection.settimeout(None)
        except (OSError, AttachError):
            connection.close()
            return None
        return connection

    def _kernel_connected(self) -> bool:
        """Say whether anybody but us is connected to the servers; the kernel may be late with its report."""
        others = sum(connections(served) for served in self.servers.values())
        return others > (self.spare is not None)

    def close(self) -> None:
        """Close the spare connection; the kernel's stays."""
        self._drop_spare()

    def _drop_spare(self) -> None:
        if self.spare is not None:
            connection = self.spare.connection
            self._forget_spare()
            connection.close()

    def _forget_spare(self) -> None:
        if self.spare is not None:
            self._poll.unregister(self.spare.connection.fileno())
        self.spare = None


def connections(served: Export) -> int:
    """Return how many connections the server on this unix socket has, the kernel's among them."""
    assert served.unix is not None
    path = f" {served.unix}\n"
    count = 0
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - line by line
        for line in lines:
            if line.endswith(path) and line.split(maxsplit=6)[5] == _CONNECTED:
                count += 1
    return count


def ready(paths: SegmentPaths, export: Export) -> bool:
    """Say whether the keeper of an attached device has its spare: both servers have a connection."""
    return all(connections(server.as_served(paths, export, role)) for role in ("swap", "standby"))


def command(paths: SegmentPaths, client: str) -> list[str]:
    """Return the command that keeps the attached device of `client` connected."""
    return [sys.executable, "-m", "tmem.nbd.keeper", str(paths.directory), paths.name, client]


def _hung_up(connection: socket.socket) -> bool:
    """Say whether the server has closed its end; it sends nothing that was not asked for."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _main(argv: list[str]) -> None:
    try:
        directory, name, client = argv
    except ValueError:
        raise SystemExit("usage: python -m tmem.nbd.keeper DIRECTORY NAME CLIENT") from None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    paths = SegmentPaths(name, Path(directory))
    try:
        export = load(paths, client)
        attachment = export.attachment
        if attachment is None or attachment.kind != "nbd" or attachment.device is None:
            raise AttachError(f"{client} is not attached by the kernel's nbd driver: nothing is to be kept")
        keeper = Keeper(paths, export, int(attachment.device.removeprefix("/dev/nbd")), NbdControl())
        keeper.find_spare()  # once before the memory is locked: what it needs is then there
        report = locking.lock_process(paths.segment, lock_segment=False)
        if report.refused:
            _say(f"memory is not locked: {report.refused[0]}")
        keeper.run()
    except (TmemError, OSError) as error:
        raise SystemExit(f"tmem: {error}") from None


if __name__ == "__main__":
    _main(sys.argv[1:])
