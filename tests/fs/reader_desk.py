"""A native reader between a kernel and a libfuse that are ends of sockets here."""

import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.fs.inodes import Inode
from tmem.fs.reading import NOTHING
from tmem.types import PAGE_SIZE

FORGET, GETATTR, OPEN, READ, WRITE, SETXATTR, GETXATTR = 2, 3, 14, 15, 16, 21, 22
OPENDIR, READDIR, CREATE, BATCH_FORGET, READDIRPLUS = 27, 28, 35, 42, 44
LARGEST_MESSAGE = 17 * PAGE_SIZE + 16384
"""What a unix socket takes without a larger piece of kernel memory than 16 KiB."""
MIB = 1 << 20
CACHE_DIR, KEEP_CACHE, DIRECT_IO, PASSTHROUGH = 1 << 3, 1 << 1, 1 << 0, 1 << 7
SO_SNDBUFFORCE = 32
OID = bytes(range(24))
PAGES = 40
FH = 7


@dataclass
class Desk:
    """A reader with its two neighbours: `kernel` sends requests, `libfuse` replies."""

    reader: "_native.Reader"
    pool: "_native.Pool"
    gate: "_native.Gate"
    kernel: socket.socket
    libfuse: socket.socket
    content: bytes
    file: int
    device: socket.socket
    uniques: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))
    listings: "_native.Listings | None" = None

    def request(self, opcode: int, body: bytes = b"", pid: int = 0) -> int:
        """Send a request of the process `pid`, and return its number."""
        unique = next(self.uniques)
        header = struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, 1, 0, 0, pid, 0)
        self.kernel.send(header + body)
        return unique

    def read(self, offset: int, size: int, fh: int = FH) -> int:
        return self.request(READ, struct.pack("=QQIIQII", fh, offset, size, 0, 0, 0, 0))

    def write(self, offset: int, data: bytes) -> int:
        return self.request(WRITE, struct.pack("=QQIIQII", FH, offset, len(data), 0, 0, 0, 0) + data)

    def serve(self) -> int:
        return self.reader.serve(-1, 0)

    def forwarded_message(self) -> bytes:
        """Return the next request that libfuse gets."""
        request = self.libfuse.recv(1 << 21, socket.MSG_DONTWAIT)
        assert struct.unpack_from("=I", request)[0] == len(request) <= LARGEST_MESSAGE
        return request

    def reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        """Have libfuse reply, and pass it on."""
        self.libfuse.send(struct.pack("=IiQ", 16 + len(body), error, unique) + body)
        self.reader.drain()

    def reply_with(self, unique: int, data: bytes, start: int = 0) -> None:
        """Have libfuse reply to a READ as handlers do."""
        buffer = self.reader.take(start + len(data))
        memoryview(buffer)[start : start + len(data)] = data
        self.reply(unique, self.reader.send(buffer, start, len(data)))

    def answer(self) -> tuple[int, int, bytes]:
        """Return number, error and data of the next reply that the kernel gets."""
        return self._parsed(self.kernel.recv(1 << 21))

    def answer_now(self) -> tuple[int, int, bytes]:
        """Return the next reply that the kernel has got. BlockingIOError."""
        return self._parsed(self.kernel.recv(1 << 21, socket.MSG_DONTWAIT))

    @staticmethod
    def _parsed(reply: bytes) -> tuple[int, int, bytes]:
        length, error, unique = struct.unpack_from("=IiQ", reply)
        assert length == len(reply)
        return unique, error, reply[16:]

    def forwarded(self) -> tuple[int, int]:
        """Return opcode and number of the next request that libfuse gets."""
        _, opcode, unique = struct.unpack_from("=IIQ", self.forwarded_message())
        return opcode, unique

    def list_by(self, nodes: "_native.Nodes[Inode]", local: bool = True) -> "_native.Listings":
        """Have directories listed below Python, with these nodes, of a `local` lower."""
        self.reader.open_shortcut()
        self.reader.set_nodes(nodes, local)
        self.listings = _native.Listings(nodes)
        self.reader.set_listings(self.listings)
        return self.listings

    def page(self, fh: int, start: int, size: int = 32768) -> bytes:
        """Return what a READDIRPLUS brings; names may be fetched first."""
        unique = self.request(READDIRPLUS, struct.pack("=QQIIQII", fh, start, size, 0, 0, 0, 0))
        while True:
            assert self.reader.serve(-1, 20) == NOTHING
            with contextlib.suppress(BlockingIOError):
                number, error, body = self.answer_now()
                assert (number, error) == (unique, 0)
                return body

    def page_of(self, place: Path, names: list[bytes], start: int = 0, size: int = 32768) -> bytes:
        """Return the page of some names of a directory from number `start` on."""
        assert self.listings is not None
        fh = 1 << 40
        names = [b"-", *names]  # a listing that begins is one of names that are there
        self.listings.restore(fh, 1, os.open(place, os.O_RDONLY), names)
        page = self.page(fh, 1 + start, size)
        self.listings.close(fh)
        return page

    def silent(self) -> bool:
        """Say whether the kernel has got no reply."""
        with pytest.raises(BlockingIOError):
            self.kernel.recv(1, socket.MSG_DONTWAIT)
        return True


def make(
    tmp_path: Path, helpers: int = 0, room_bytes: int = 32 * MIB, away_ms: int = 0, quick_us: int = 100
) -> Iterator[Desk]:
    segment = _native.create(str(tmp_path / "segment"), 16 << 20)
    pool = segment.client("c").new_pool(persistent=False, exclusive=False)
    content = random.Random(1).randbytes(PAGES * PAGE_SIZE - 1000)
    pool.put(OID, 0, content + bytes(1000))
    (tmp_path / "file").write_bytes(content)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    for end in (kernel, device):  # a device takes every reply, and has every request
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 512 * MIB)
    for end in (ours, libfuse):
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, room_bytes)
    # A reply that has to wait for room waits for ever in a mount.
    libfuse.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("=qq", 0, 1))
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 30, 0))
    gate = _native.Gate()
    ends = (device.fileno(), ours.fileno(), libfuse.fileno())
    reader = _native.Reader(*ends, helpers, away_ms=away_ms, quick_us=quick_us)
    with kernel, device, ours, libfuse:
        reader.set_pool(pool)
        gate.set(OID, len(content), True)
        reader.open(FH, file, gate, True)
        yield Desk(reader, pool, gate, kernel, libfuse, content, file, device)
        reader.close()
    os.close(file)
    segment.close()
