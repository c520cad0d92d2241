"""The bytes of commands and answers on one connection, which never blocks: RESP 2.

The `redis` package connects, shakes hands, authenticates, and does TLS; while an exchange lasts its socket is
ours. The package reads 64 KiB at a time and copies each byte of a value three times before it is there, which
was most of what a fetch took (docs/benchmarks/tiers.md). Here what comes is read into one buffer, a value is
handed on where it lies, and what an error means is the package's word again.

Not for what answers mean, nor for who is asked: `redis_exchange`. Threading: a wire belongs to one thread.
"""

import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError, InvalidResponse

from tmem.backends import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer

Word = bytes | memoryview | str | int | float
"""Of a command; a memoryview is one of bytes, sent from where they lie, so they stay until all was sent."""
Reply = Any
"""What Redis answers: bytes, a number, None, an exception; a list of these where the package reads it."""

Taken = Callable[["Buffer", int, int], Reply]
"""Makes an answer of a value: of what was read, from where to where it is the value. Copies what it wants."""

SENT_BYTES = 128 << 10
"""How much is put together for one call of the kernel: what follows is, while servers read that."""
_COPIED_BYTES = 1024
"""Words of fewer bytes are put together, longer ones are sent from where they lie."""

_READ_BYTES = 256 << 10
"""How much is read at a time at most."""
_LIKELY_BYTES = 33 << 10
"""Room for one value, that is most likely enough, and more is made if it is not."""
_LARGEST_BYTES = 16 << 20
"""A value that is longer than anybody stores is no value."""
_LONGEST_LINE = 64 << 10

_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,17}")
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def encoded(commands: Sequence[tuple[Word, ...] | bytes | memoryview]) -> list[list[bytes | memoryview]]:
    """Return what to send for the commands, of which any may be what is sent of it already: in pieces, as
    much as goes into one call of the kernel."""
    return _native.resp_encode(list(commands), SENT_BYTES, _COPIED_BYTES)


class Inbox:
    """Cuts what comes in into `most` answers, wherever it was cut before.

    What is read goes to `room`. The core cuts what is whole; `error` makes one of a server's text, and
    `taken` an answer of a value, or it is all of it.
    """

    def __init__(self, error: Callable[[str], Exception], most: int, taken: Taken | None = None) -> None:
        self._error = error
        self._most = most
        self._taken = taken
        self._buffer = bytearray(_LIKELY_BYTES)
        self._start = self._end = 0  # of what was read and belongs to no answer yet
        self._filled = False  # the last read took all the room there was
        self._whole_bytes = 0  # how long the answer that begins there is; 0: its first line is not there yet

    def __len__(self) -> int:
        return self._end - self._start

    def room(self) -> memoryview:
        """Return where to put what is read next: more, once all of it was needed."""
        size_bytes = max(self._whole_bytes, _READ_BYTES if self._filled else 0, self._end + 1)
        if size_bytes > len(self._buffer):
            grown = bytearray(size_bytes)
            grown[: self._end] = memoryview(self._buffer)[: self._end]
            self._buffer = grown
        return memoryview(self._buffer)[self._end :]

    def answers(self, read_bytes: int) -> Iterator[list[Reply]]:
        """Yield the answers that are whole with so many bytes more. InvalidResponse of what is none."""
        self._end += read_bytes
        self._filled = self._end == len(self._buffer)
        if len(self) < self._whole_bytes:
            return
        self._whole_bytes = 0
        while self._most and self._start < self._end:
            found, self._start = _native.resp_answers(
                self._buffer, self._start, self._end, self._most, self._taken
            )
            self._most -= len(found)
            if found:
                yield found
            elif (answer := self._odd()) is not None:
                self._most -= 1
                yield [answer]
            else:
                break
        rest = len(self)
        self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest

    def _odd(self) -> Exception | None:
        """Return the error that comes next, None of an answer that is not whole."""
        start = self._start
        kind, line_end = self._buffer[start], self._buffer.find(b"\r\n", start, self._end)
        if line_end < 0 and kind in _KINDS:
            if len(self) > _LONGEST_LINE:
                raise InvalidResponse("an answer without an end")
            return None
        line, end = bytes(self._buffer[start + 1 : line_end]), line_end + 2
        if kind == _VALUE:
            length = int(line) if _NUMBER.fullmatch(line) else -1
            if not 0 <= length <= _LARGEST_BYTES:
                raise InvalidResponse(f"a value of {line[:20]!r} bytes")
            self._whole_bytes = end + length + 2 - start
            if self._whole_bytes <= len(self):
                raise InvalidResponse("a value that does not end")
            return None
        if kind != _ERROR or b"\n" in line or b"\r" in line:
            raise InvalidResponse(f"{bytes(self._buffer[start : start + 20])!r} is no answer")
        self._start = end
        return self._error(line.decode("utf-8", "replace"))


_KINDS = b"$:+-"
_VALUE, _ERROR = b"$-"


def _unsent(parts: Sequence["Buffer"], sent: int) -> Sequence["Buffer"]:
    """Return the parts without their first `sent` bytes, from where they lie."""
    for at, part in enumerate(parts):
        size_bytes = len(memoryview(part))
        if sent < size_bytes:
            return (memoryview(part)[sent:], *parts[at + 1 :])
        sent -= size_bytes
    return ()


class Wire:
    """`connection`, which is connected and idle, with these commands to send, each of which has one answer.

    Once begun it must come to its end, or the connection be closed.
    """

    def __init__(
        self, connection: Any, commands: Sequence[tuple[Word, ...] | bytes | memoryview], taken: Taken | None
    ) -> None:
        self._socket: Any = connection._sock
        self._tls = isinstance(self._socket, ssl.SSLSocket)
        self._timeout_s = self._socket.gettimeout()
        self._socket.settimeout(0)
        self._chunks = iter(encoded(commands))
        self._parts: Sequence[Buffer] = ()  # of a chunk that the kernel has not taken yet
        self._inbox = Inbox(connection._parser.parse_error, len(commands), taken)
        self.sending = True
        """Something is left to be sent."""

    def fileno(self) -> int:
        """Return what to poll."""
        number: int = self._socket.fileno()
        return number

    def send(self) -> bool:
        """Send a chunk, or what the kernel takes of it; False if it takes none now. OSError."""
        if not self._parts:
            self._parts = next(self._chunks, ())
            if self._tls and self._parts:
                self._parts = (b"".join(self._parts),)
        if not self._parts:
            self.sending = False
            return False
        try:
            sent = self._socket.send(self._parts[0]) if self._tls else self._socket.sendmsg(self._parts)
        except _BLOCKED:
            return False
        self._parts = _unsent(self._parts, sent)
        return True

    def receive(self) -> Iterator[list[Reply]]:
        """Yield the answers that are there, as `Inbox.answers`. ConnectionError, InvalidResponse, OSError."""
        while True:
            room = self._inbox.room()
            try:
                read_bytes = self._socket.recv_into(room)
            except _BLOCKED:
                return
            if not read_bytes:
                raise ConnectionError("Connection closed by server.")
            yield from self._inbox.answers(read_bytes)
            if read_bytes < len(room) and not self._tls:
                return  # what comes now poll will tell, but not what TLS has decrypted already

    def end(self) -> None:
        """Give the connection back as it was. InvalidResponse if anything is left to be sent or answered."""
        if self.sending or len(self._inbox):
            raise InvalidResponse("more answers than questions")
        self._socket.settimeout(self._timeout_s)
