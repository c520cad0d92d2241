"""The handshake by plain socket, against a real nbdkit and against servers that are none."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.errors import AttachError
from tmem.nbd import handshake, server
from tmem.nbd.export import Export
from tmem.types import PAGE_SIZE

from .conftest import Server, free_address, nbd


def test_probe_says_what_the_server_has(swap_server: Server) -> None:
    info = handshake.probe(swap_server.export)
    assert info is not None
    assert info.size_bytes == swap_server.export.size_bytes
    assert info.flags & handshake.SEND_TRIM
    assert info.flags & handshake.CAN_MULTI_CONN
    blocks = (info.minimum_block_bytes, info.preferred_block_bytes, info.maximum_block_bytes)
    assert blocks == (1, PAGE_SIZE, 32 << 20)


def test_a_connection_transmits(swap_server: Server) -> None:
    connection, info = handshake.connect(swap_server.export)
    with connection:
        handshake.warm(connection, info)
        data = b"by hand "
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 77, 8, len(data)) + data)
        assert struct.unpack(">IIQ", connection.recv(16, socket.MSG_WAITALL)) == (0x67446698, 0, 77)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))  # disconnect
        assert connection.recv(1) == b""
    with swap_server.client() as client:
        assert client.pread(16, 0) == bytes(8) + data


def test_another_name_is_refused(swap_server: Server) -> None:
    other = Export("other", swap_server.export.size_bytes, unix=swap_server.export.unix)
    with pytest.raises(AttachError, match="the server does not serve other"):
        handshake.probe(other)


def test_tls_is_required(make_server: Callable[..., Server], tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:" + "0123456789abcdef" * 4 + "\n")
    one = make_server(unix=None, tcp=free_address(), tls_psk=str(keys), tls_user="alice")
    assert handshake.probe(one.export) is None
    with pytest.raises(handshake.TlsRequiredError):
        handshake.connect(one.export)
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(one.export.uri)
    handle.pwrite(b"over TLS", 0)
    assert handle.pread(8, 0) == b"over TLS"
    handle.shutdown()


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "does not speak NBD"),
        (b"", "closed the connection"),
        (b"NBDMAGIC", "closed the connection"),
        (struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 0), "does not speak NBD"),
        (
            struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3) + bytes(20),
            "breaks the NBD protocol",
        ),
        (
            struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
            + struct.pack(">QIII", 0x3E889045565A9, 6, 1, 0),
            "did not say how large",
        ),
        (
            struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
            + struct.pack(">QIII", 0x3E889045565A9, 6, 0x80000002, 4)
            + b"no!!",
            "no!!",
        ),
    ],
)
def test_other_servers(tmp_path: Path, greeting: bytes, reason: str) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # it may hang up at once
                connection.sendall(greeting)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            with pytest.raises(AttachError, match=reason):
                handshake.probe(Export("a", 4096, unix=path))
        finally:
            thread.join()


def test_nobody_answers(tmp_path: Path) -> None:
    export = Export("a", 4096, unix=str(tmp_path / "none"))
    with pytest.raises(AttachError, match="no NBD server answers at nbd"):
        server.wait_ready(export, timeout_s=0.1)


def test_the_wrong_size_is_not_ready(swap_server: Server) -> None:
    export = Export("guest1", 4096, unix=swap_server.export.unix)
    with pytest.raises(AttachError, match="serves 16777216 bytes instead of 4096"):
        server.wait_ready(export, timeout_s=0.1)
