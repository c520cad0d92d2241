"""The bytes of commands and answers on one connection, which never blocks: RESP 2.

The `redis` package connects, shakes hands, authenticates, and does TLS; while an exchange lasts its socket is
ours. The package reads 64 KiB at a time and copies each byte of a value three times before it is there, which
was most of what a fetch took (docs/benchmarks/tiers.md). Here what comes is read into one buffer, a value is
handed on where it lies, and what an error means is the package's word again.

Not for what answers mean, nor for who is asked: `redis_exchange`. Threading: a wire belongs to one thread.
"""

import re
import ssl
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from redis.exceptions import ConnectionError, InvalidResponse

Word = bytes | str | int | float
Reply = Any
"""What Redis answers: bytes, a number, None, an exception; a list of these where the package reads it."""


Taken = Callable[[bytes, int, int], Reply]
"""Makes an answer of a value: of what was read, from where to where it is the value. Copies what it wants."""


def whole(read: bytes, start: int, end: int) -> bytes:
    """Take all of a value."""
    return read[start:end]


Parts = list[bytes]

SENT_BYTES = 128 << 10
"""How much is put together for one call of the kernel: what follows is, while servers read that."""
_SENT_PARTS = 900
"""The kernel takes 1024."""
_COPIED_BYTES = 1024
"""Words of fewer bytes are put together, longer ones are sent from where they lie."""

_READ_BYTES = 256 << 10
"""How much is read at a time at most."""
_LIKELY_BYTES = 33 << 10
"""Room for one answer that is most likely enough, and more is made if it is not."""
_LARGEST_BYTES = 16 << 20
"""A value that is longer than anybody stores is no value."""
_LONGEST_LINE = 64 << 10

_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,17}")
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def encoded(commands: Iterable[tuple[Word, ...]]) -> Iterator[Parts]:
    """Yield what to send for the commands, in pieces, as much as goes into one call of the kernel."""
    parts: Parts = []
    size_bytes = 0
    for words in commands:
        head = b"*%d\r\n" % len(words)
        for word in words:
            raw = word if isinstance(word, bytes) else str(word).encode()
            if len(raw) < _COPIED_BYTES:
                head += b"$%d\r\n%b\r\n" % (len(raw), raw)
            else:
                parts += (b"%b$%d\r\n" % (head, len(raw)), raw)
                size_bytes += len(raw)
                head = b"\r\n"
        parts.append(head)
        size_bytes += len(head)
        if size_bytes >= SENT_BYTES or len(parts) >= _SENT_PARTS:
            yield parts
            parts, size_bytes = [], 0
    if parts:
        yield parts


class Inbox:
    """Cuts what comes in into answers, wherever it was cut before. `error` makes one of the server's text."""

    def __init__(self, error: Callable[[str], Exception], taken: Taken = whole) -> None:
        self._error = error
        self._taken = taken
        self._kept: list[bytes] = []  # the beginning of an answer
        self._kept_bytes = 0
        self._whole_bytes = 0  # how long that answer is; 0: its first line is not there yet
        self._unseen_bytes = 0  # of the chunk

    def __len__(self) -> int:
        return self._kept_bytes + self._unseen_bytes

    def answers(self, chunk: bytes) -> Iterator[Reply]:
        """Yield the answers that are whole with this chunk. InvalidResponse of what is none."""
        start = 0
        if self._kept:
            if not self._whole_bytes:
                chunk = b"".join((*self._kept, chunk))
            else:
                start = self._whole_bytes - self._kept_bytes
                if start > len(chunk):
                    self._keep(chunk)
                    return
                whole = b"".join((*self._kept, chunk[:start]))
                self._unseen_bytes = len(chunk) - start
            self._kept.clear()
            self._kept_bytes = self._whole_bytes = 0
            if start:
                yield self._cut(whole, 0)[0]
        while start < len(chunk):
            answer, end = self._cut(chunk, start)
            if end > len(chunk) or not end:
                self._whole_bytes, self._unseen_bytes = max(end - start, 0), 0
                self._keep(chunk[start:])
                return
            start, self._unseen_bytes = end, len(chunk) - end
            yield answer

    def _keep(self, chunk: bytes) -> None:
        self._kept.append(chunk)
        self._kept_bytes += len(chunk)
        if not self._whole_bytes and self._kept_bytes > _LONGEST_LINE:
            raise InvalidResponse("an answer without an end")

    def _cut(self, chunk: bytes, start: int) -> tuple[Reply, int]:
        """Return the answer that begins at `start`, and where it ends. If that is beyond the chunk, or 0
        because nobody can tell yet, it is none."""
        line_end = chunk.find(b"\r\n", start)
        kind = chunk[start]
        if line_end < 0 and kind in _KINDS:
            return None, 0
        line, end = chunk[start + 1 : line_end], line_end + 2
        if kind == _VALUE:
            if line == b"-1":
                return None, end
            length = _number(line)
            if not 0 <= length <= _LARGEST_BYTES:
                raise InvalidResponse(f"a value of {length} bytes")
            first, end = end, end + length + 2
            if end > len(chunk):
                return None, end
            if chunk[end - 2 : end] != b"\r\n":
                raise InvalidResponse("a value that does not end")
            return self._taken(chunk, first, end - 2), end
        if kind == _INTEGER:
            return _number(line), end
        if kind not in (_STATUS, _ERROR) or b"\n" in line or b"\r" in line:
            raise InvalidResponse(f"{chunk[start : start + 20]!r} is no answer")
        return line if kind == _STATUS else self._error(line.decode("utf-8", "replace")), end


_KINDS = b"$:+-"
_VALUE, _INTEGER, _STATUS, _ERROR = _KINDS


def _number(line: bytes) -> int:
    if _NUMBER.fullmatch(line) is None:
        raise InvalidResponse(f"{line[:20]!r} is no number")
    return int(line)


class Wire:
    """`connection`, which is connected and idle, with these commands to send and so many answers to come.

    Once begun it must come to its end, or the connection be closed.
    """

    def __init__(
        self, connection: Any, commands: Iterable[tuple[Word, ...]], answers: int, taken: Taken
    ) -> None:
        self._socket: Any = connection._sock
        self._tls = isinstance(self._socket, ssl.SSLSocket)
        self._timeout_s = self._socket.gettimeout()
        self._socket.settimeout(0)
        self._chunks = encoded(commands)
        self._rest = memoryview(b"")  # of a chunk of which the kernel took less
        self._inbox = Inbox(connection._parser.parse_error, taken)
        self._read_bytes = min(_LIKELY_BYTES * answers, _READ_BYTES)
        self.sending = True
        """Something is left to be sent."""

    def fileno(self) -> int:
        """Return what to poll."""
        number: int = self._socket.fileno()
        return number

    def send(self) -> bool:
        """Send a chunk, or what the kernel takes of it; False if it takes none now. OSError."""
        try:
            if self._rest:
                self._rest = self._rest[self._socket.send(self._rest) :]
                return True
            parts = next(self._chunks, None)
            if parts is None:
                self.sending = False
                return False
            sent = 0
            try:
                if not self._tls:
                    sent = self._socket.sendmsg(parts)  # from where they lie
            finally:
                if self._tls or sent < sum(map(len, parts)):
                    self._rest = memoryview(b"".join(parts))[sent:]
        except _BLOCKED:
            return False
        return True

    def receive(self) -> Iterator[Reply]:
        """Yield the answers that are there, as `Inbox.answers`. ConnectionError, InvalidResponse, OSError."""
        while True:
            try:
                chunk = self._socket.recv(self._read_bytes)
            except _BLOCKED:
                return
            if not chunk:
                raise ConnectionError("Connection closed by server.")
            yield from self._inbox.answers(chunk)
            if len(chunk) < self._read_bytes and not self._tls:
                return  # what comes now poll will tell, but not what TLS has decrypted already

    def end(self) -> None:
        """Give the connection back as it was. InvalidResponse if anything is left to be sent or answered."""
        if self.sending or len(self._inbox):
            raise InvalidResponse("more answers than questions")
        self._socket.settimeout(self._timeout_s)
