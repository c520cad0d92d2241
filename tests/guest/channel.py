"""The host's end of the line to a guest's agent: commands, their output, their ends.

tool/protocol.h is the other end. One thread reads frames and sorts them to the commands; everybody else waits
on events with a deadline. Any thread may use a channel.
"""

import itertools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cache import GuestError

_HEADER = struct.Struct("<III")
_CHUNK = 32768
_BEGINS_S, _AGAIN_S = 20.0, 0.2
_RUN, _INPUT, _SIGNAL, _PING = 1, 2, 3, 4
_HELLO, _OUTPUT, _ERRORS, _TAKEN, _ENDED, _STARTED, _BUSY, _PONG = range(16, 24)


class GuestTimeout(GuestError):
    """A command in a guest, or the guest itself, did not get there before its deadline."""


@dataclass(frozen=True)
class Result:
    """An ended command: exit status (negative: the signal that ended it) and what it wrote."""

    argv: tuple[str, ...]
    rc: int
    stdout: str
    stderr: str


class Command:
    """A command in a guest, started by `Channel.start`; it may be running, or have ended."""

    def __init__(self, channel: "Channel", number: int, argv: tuple[str, ...]) -> None:
        self.argv = argv
        self._channel = channel
        self._number = number
        self._payload = b"".join(os.fsencode(argument) + b"\0" for argument in argv)
        if len(self._payload) > _CHUNK:
            raise GuestError(f"{self}: {len(self._payload)} bytes are too long: give them as input")
        self._output = bytearray()
        self._errors = bytearray()
        self._changed = threading.Condition()
        self._taken = True
        self._rc: int | None = None
        self._failure: str | None = None
        self._begins_by = time.monotonic() + _BEGINS_S
        self.pid: int | None = None
        """Its process id in the guest, once the agent has said so."""

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as is known here."""
        return self._rc is None and self._failure is None

    @property
    def stdout(self) -> str:
        """What it has written to standard output until now."""
        return bytes(self._output).decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to standard error until now."""
        return bytes(self._errors).decode(errors="replace")

    def wait(self, timeout_s: float) -> Result:
        """Wait until it has ended; `GuestTimeout` if it has not by then (it goes on)."""
        with self._changed:
            self._changed.wait_for(lambda: not self.running, timeout_s)
            if self._failure is not None:
                raise GuestError(f"{self}: {self._failure}")
            if self._rc is None:
                raise GuestTimeout(
                    f"{self} has not ended within {timeout_s:g} s; its last words: {self._tail()}"
                )
            return Result(self.argv, self._rc, self.stdout, self.stderr)

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Wait until it has written `text` to standard output; `GuestError` if it ends without."""
        wanted = text.encode()
        with self._changed:
            self._changed.wait_for(lambda: wanted in self._output or not self.running, timeout_s)
            if wanted not in self._output:
                state = "has not" if self.running else "has ended and not"
                raise GuestTimeout(f"{self} {state} written {text!r}; its last words: {self._tail()}")

    def feed(self, data: bytes, timeout_s: float = 30.0) -> None:
        """Write to its standard input, of which `close_input` is the end."""
        deadline = time.monotonic() + timeout_s
        for start in range(0, len(data), _CHUNK):
            with self._changed:
                remaining = max(0.0, deadline - time.monotonic())
                if not self._changed.wait_for(lambda: self._taken or not self.running, remaining):
                    raise GuestTimeout(f"{self} does not read its input")
                if not self.running:
                    return
                self._taken = False
            self._channel.send(_INPUT, self._number, data[start : start + _CHUNK])

    def close_input(self, timeout_s: float = 30.0) -> None:
        """End its standard input."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken or not self.running, timeout_s)
        self._channel.send(_INPUT, self._number, b"")

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to it and to all that it started in its process group."""
        self._channel.send(_SIGNAL, self._number, bytes([number]))

    def _tail(self) -> str:
        return (self.stdout[-300:] + self.stderr[-300:]).strip() or "none"

    def __str__(self) -> str:
        text = " ".join(self.argv)
        return f"{self._channel.name}: {text if len(text) < 120 else text[:117] + '...'}"

    def take(self, kind: int, data: bytes) -> None:
        """Note what the agent says of this command. For the channel only."""
        with self._changed:
            if kind == _OUTPUT:
                self._output += data
            elif kind == _ERRORS:
                self._errors += data
            elif kind == _TAKEN:
                self._taken = True
            elif kind == _STARTED:
                (self.pid,) = struct.unpack("<i", data)
            elif kind == _BUSY:
                if time.monotonic() < self._begins_by:  # the guest is still making processes for them
                    threading.Timer(_AGAIN_S, self._begin_again).start()
                else:
                    self._failure = "too many commands run in this guest at once"
            elif kind == _ENDED:
                self._rc = os.waitstatus_to_exitcode(struct.unpack("<i", data)[0])
            self._changed.notify_all()

    def begin(self) -> None:
        """Have it run. For the channel only."""
        self._channel.send(_RUN, self._number, self._payload)

    def _begin_again(self) -> None:
        with suppress(GuestError):  # the guest is gone, which all commands are told
            self.begin()

    def fail(self, reason: str) -> None:
        """Note that nothing more can come. For the channel only."""
        with self._changed:
            if self.running:
                self._failure = reason
            self._changed.notify_all()


class Channel:
    """A connection to the agent of the guest `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._numbers = itertools.count(1)
        self._commands: dict[int, Command] = {}
        self._pongs: dict[int, threading.Event] = {}
        self._hello = threading.Event()
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None

    def connect(self, path: Path) -> None:
        """Connect to the socket of the port; OSError while there is none."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        self.use(connection)

    def use(self, connection: socket.socket) -> None:
        """Talk to the agent over `connection`, which belongs to the channel from now on."""
        self._socket = connection
        threading.Thread(target=self._read, name=f"guest {self.name}", daemon=True).start()

    def wait_hello(self, timeout_s: float) -> bool:
        """Wait until the agent has said that it is there; whether it has."""
        return self._hello.wait(timeout_s)

    def start(self, argv: Sequence[str]) -> Command:
        """Start a command with an open standard input."""
        number = next(self._numbers)
        command = Command(self, number, tuple(argv))
        self._commands[number] = command
        command.begin()
        return command

    def ping(self, timeout_s: float) -> bool:
        """Return whether the agent answers in time."""
        number = next(self._numbers)
        answered = self._pongs[number] = threading.Event()
        try:
            self.send(_PING, number, b"")
            return answered.wait(timeout_s)
        except GuestError:
            return False
        finally:
            del self._pongs[number]

    def send(self, kind: int, number: int, data: bytes) -> None:
        """Send one frame; `GuestError` if the guest is gone."""
        if self._socket is None:
            raise GuestError(f"{self.name}: not connected")
        try:
            with self._sending:
                self._socket.sendall(_HEADER.pack(len(data), number, kind) + data)
        except OSError as error:
            raise GuestError(f"{self.name} is gone ({error})") from None

    def close(self) -> None:
        """End the connection; commands that wait fail."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _read(self) -> None:
        assert self._socket is not None
        data = bytearray()
        with suppress(OSError):
            while part := self._socket.recv(1 << 16):
                data += part
                self._sort(data)
        for command in list(self._commands.values()):
            command.fail("the guest is gone")

    def _sort(self, data: bytearray) -> None:
        """Take whole frames off the front of `data`."""
        while len(data) >= _HEADER.size:
            length, number, kind = _HEADER.unpack_from(data)
            end = _HEADER.size + length
            if len(data) < end:
                return
            payload = bytes(data[_HEADER.size : end])
            del data[:end]
            if kind == _HELLO:
                self._hello.set()
            elif kind == _PONG and number in self._pongs:
                self._pongs[number].set()
            elif number in self._commands:
                self._commands[number].take(kind, payload)
