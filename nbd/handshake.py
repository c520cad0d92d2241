"""The client's half of NBD's newstyle handshake, by a plain socket and nothing but the standard library.

For two purposes: to see that a server answers (`probe`), and to hand the kernel's driver a socket on which
the transmission phase has begun (`connect`). Not a client: requests beyond the warming reads belong to
libnbd. No TLS: a server that insists on it counts as answering, and its socket cannot be given to the kernel.

Blocking calls with a timeout; a connection belongs to one thread. The protocol's document is
doc/proto.md of the NetworkBlockDevice project.
"""

import socket
import struct
from dataclasses import dataclass

from tmem.errors import AttachError
from tmem.nbd.export import Export

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698

_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_OPT_ABORT, _OPT_INFO, _OPT_GO = 2, 6, 7
_REP_ACK, _REP_INFO = 1, 3
_REP_ERROR, _REP_ERR_TLS_REQUIRED = 1 << 31, (1 << 31) + 5
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_CMD_READ = 0
_MAX_REPLY_BYTES = 1 << 16
_WARM_BYTES = 128 << 10

_ERRORS = {
    1: "it does not know the request",
    2: "it refuses it by policy",
    3: "it finds the request invalid",
    4: "its platform does not support it",
    5: "it requires TLS",
    6: "it has no such export, or cannot open it (its log says why)",
    7: "it is shutting down",
    8: "it requires a block size",
}

SEND_TRIM = 1 << 5
CAN_MULTI_CONN = 1 << 8


@dataclass(frozen=True)
class ExportInfo:
    """What the server says of an export: size, transmission flags, and block sizes in bytes (0: not said)."""

    size_bytes: int
    flags: int
    minimum_block_bytes: int = 0
    preferred_block_bytes: int = 0
    maximum_block_bytes: int = 0


class TlsRequiredError(AttachError):
    """The server answers, but only over TLS."""


def open_socket(export: Export, timeout_s: float) -> socket.socket:
    """Connect to the server of `export`; OSError if nobody listens."""
    if export.tcp is not None:
        connection = socket.create_connection(export.tcp, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    assert export.unix is not None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(export.unix)
    except BaseException:
        connection.close()
        raise
    return connection


def negotiate(connection: socket.socket, name: str, begin: bool) -> ExportInfo:
    """Shake hands for the export `name`; with `begin` transmission has begun afterwards, else the server
    hangs up.

    Raises `AttachError` when the server refuses or does not speak NBD, OSError when the connection fails.
    """
    magic, option_magic, server_flags = struct.unpack(">QQH", _receive(connection, 18))
    if magic != _NBDMAGIC or option_magic != _IHAVEOPT or not server_flags & _FLAG_FIXED_NEWSTYLE:
        raise AttachError("the server does not speak NBD's fixed newstyle protocol: check the address")
    encoded = name.encode()
    option = _OPT_GO if begin else _OPT_INFO
    data = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
    flags = server_flags & (_FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES)
    connection.sendall(struct.pack(">IQII", flags, _IHAVEOPT, option, len(data)) + data)
    size_bytes: int | None = None
    export_flags = 0
    blocks = (0, 0, 0)
    while True:
        reply, payload = _receive_reply(connection, option)
        if reply == _REP_ACK:
            break
        if reply == _REP_ERR_TLS_REQUIRED:
            raise TlsRequiredError("the server requires TLS")
        if reply & _REP_ERROR:
            said = payload.decode("utf-8", "replace").strip() or _ERRORS.get(
                reply & ~_REP_ERROR, f"error {reply:#x}"
            )
            raise AttachError(f"the server does not serve {name}: {said}")
        if reply == _REP_INFO and len(payload) >= 2:
            (kind,) = struct.unpack_from(">H", payload)
            if kind == _INFO_EXPORT and len(payload) == 12:
                size_bytes, export_flags = struct.unpack_from(">QH", payload, 2)
            elif kind == _INFO_BLOCK_SIZE and len(payload) == 14:
                blocks = struct.unpack_from(">III", payload, 2)
    if size_bytes is None:
        raise AttachError(f"the server did not say how large {name} is: it breaks the NBD protocol")
    if not begin:
        connection.sendall(struct.pack(">QII", _IHAVEOPT, _OPT_ABORT, 0))
    return ExportInfo(size_bytes, export_flags, *blocks)


def probe(export: Export, timeout_s: float = 5.0) -> ExportInfo | None:
    """Ask the server for the export; None if it answers but wants TLS first. OSError, AttachError as
    above."""
    with open_socket(export, timeout_s) as connection:
        try:
            return negotiate(connection, export.client, begin=False)
        except TlsRequiredError:
            if export.tls_psk is None:
                raise
            return None


def connect(export: Export, timeout_s: float = 5.0) -> tuple[socket.socket, ExportInfo]:
    """Return a blocking socket on which requests may be sent, and what the server says of the export."""
    connection = open_socket(export, timeout_s)
    try:
        info = negotiate(connection, export.client, begin=True)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection, info


def warm(connection: socket.socket, info: ExportInfo, requests: int = 32) -> None:
    """Send reads of 128 KiB at once, so that each worker of the server has its stack and buffer faulted in.

    AttachError if one fails.
    """
    length = min(_WARM_BYTES, info.size_bytes)
    # At most a window's worth is unanswered, so neither side waits for the other to read.
    request = b"".join(
        struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_READ, n, 0, length) for n in range(requests)
    )
    connection.sendall(request)
    data = memoryview(bytearray(length))  # one for all: a keeper does this when memory may be short
    for _ in range(requests):
        magic, error, _cookie = struct.unpack(">IIQ", _receive(connection, 16))
        if magic != _SIMPLE_REPLY_MAGIC or error:
            raise AttachError(
                f"the server failed a read of its first {length} bytes (error {error}): see its log"
            )
        _receive_into(connection, data)


def _receive_reply(connection: socket.socket, option: int) -> tuple[int, bytes]:
    magic, answered, reply, length = struct.unpack(">QIII", _receive(connection, 20))
    if magic != _REPLY_MAGIC or answered != option or length > _MAX_REPLY_BYTES:
        raise AttachError("the server breaks the NBD protocol: check the address")
    return reply, _receive(connection, length)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray(size)
    _receive_into(connection, memoryview(received))
    return bytes(received)


def _receive_into(connection: socket.socket, wanted: memoryview) -> None:
    while wanted:
        size = connection.recv_into(wanted)
        if not size:
            raise AttachError("the server closed the connection: see its log")
        wanted = wanted[size:]
