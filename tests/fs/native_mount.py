"""An overlay with a native reader, for tests that are its kernel and its event loop."""

import fcntl
import os
import socket
import struct
import sys
import termios
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.fs.caching import CacheRule
from tmem.fs.device import Device
from tmem.fs.fanotify import Events
from tmem.fs.inodes import Inode
from tmem.fs.openfile import OpenFile
from tmem.fs.options import Cache
from tmem.fs.overlay import Overlay, build
from tmem.fs.policy import Policy
from tmem.fs.precache import Precache
from tmem.fs.reading import ASKED, NOTHING, Reading
from tmem.types import PAGE_SIZE

LOOKUP, FORGET, OPEN, READ, RELEASE = 1, 2, 14, 15, 18
DIRECT_IO, KEEP_CACHE, NO_FLUSH = 1, 2, 1 << 5
CONTENT = bytes(range(256)) * 40  # two pages and a half


@dataclass
class Mount:
    """An overlay with its reader; the test is the kernel, and the event loop."""

    overlay: Overlay
    reading: Reading
    kernel: socket.socket
    lower: Path
    segment: "_native.Segment"
    number: int = 0

    def request(self, opcode: int, node: int, body: bytes, pid: int = os.getpid()) -> int:
        self.number += 1
        header = (40 + len(body), opcode, self.number, node, 0, 5, pid, 0)
        self.kernel.send(struct.pack("=IIQQIIII", *header) + body)
        return self.number

    def answer(self) -> tuple[int, bytes]:
        """Return the error and the argument of the reply to the last request; notices are left out."""
        while True:
            reply = self.kernel.recv(1 << 20)
            _, error, unique = struct.unpack_from("=IiQ", reply)
            if unique:
                assert unique == self.number
                return error, reply[16:]
            self.doubts.append(struct.unpack_from("=Q", reply, 16)[0])

    def __post_init__(self) -> None:
        self.doubts: list[int] = []

    def taken(self) -> bool:
        """Say whether all requests have been read."""
        return not int.from_bytes(fcntl.ioctl(self.kernel, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def served(self) -> bool:
        """Serve one request; say whether it took Python."""
        event = self.reading.serve(-1, 0)
        if event == ASKED:
            self.reading.answer(lambda *arguments: pytest.fail("it waits"))
        assert event in (NOTHING, ASKED)
        return event == ASKED

    def look_up(self, name: str) -> int:
        self.request(LOOKUP, 1, name.encode() + b"\0")
        self.served()
        error, entry = self.answer()
        assert not error
        return int(struct.unpack_from("=Q", entry)[0])

    def open(self, node: int, flags: int = os.O_RDONLY) -> tuple[bool, int, int]:
        """Return whether that took Python, the handle and what is said of it."""
        self.request(OPEN, node, struct.pack("=II", flags, 0))
        asked = self.served()
        error, opened = self.answer()
        assert not error
        handle, said, _ = struct.unpack("=QIi", opened)
        return asked, handle, said

    def refused(self, node: int, flags: int = os.O_RDONLY) -> int:
        """Return the errno of an open that fails."""
        self.request(OPEN, node, struct.pack("=II", flags, 0))
        self.served()
        error, _ = self.answer()
        return -error

    def close(self, node: int, handle: int) -> bool:
        """Close; say whether that took Python."""
        self.request(RELEASE, node, struct.pack("=QIIQ", handle, 0, 0, 0))
        asked = self.served()
        assert self.answer() == (0, b"")
        return asked

    def send_read(self, node: int, handle: int, size: int = 4 * PAGE_SIZE) -> None:
        """Ask for what the file begins with, and serve nothing."""
        self.request(READ, node, struct.pack("=QQIIQII", handle, 0, size, 0, 0, 0, 0))

    def read(self, node: int, handle: int, size: int = 4 * PAGE_SIZE) -> bytes:
        """Read from the beginning, below Python."""
        self.send_read(node, handle, size)
        assert not self.served()
        error, data = self.answer()
        assert not error
        return data

    def use(self, node: int) -> bool:
        """Open and close; say whether that took Python."""
        asked, handle, _ = self.open(node)
        self.close(node, handle)
        return asked

    def inode(self, node: int) -> Inode:
        return self.overlay.table[node]

    def files(self) -> dict[int, OpenFile]:
        return self.overlay._files

    def grant(self) -> None:
        """Have an open granted again, as the next one that Python answers would."""
        self.overlay._grants._next = float("-inf")
        self.overlay._grant()


Maker = Callable[..., Mount]


def make(tmp_path: Path) -> Iterator[Maker]:
    """A function that makes a mount, once; the end of it all after that."""
    made: list[tuple[Mount, tuple[socket.socket, ...]]] = []

    def make(
        policy: Policy | None = None,
        cache: Cache = Cache.AUTO,
        fine_stamps: bool = True,
        watches: bool = False,
    ) -> Mount:
        runtime, lower = tmp_path / "runtime", tmp_path / "lower"
        runtime.mkdir()
        lower.mkdir()
        (lower / "file").write_bytes(CONTENT)
        paths = SegmentPaths("one", runtime)
        segment = _native.create(str(paths.segment), 16 << 20)
        kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        kernel.settimeout(60)
        rule = CacheRule(cache, plenty=lambda: True)
        rule.settle(direct_mmap=True)
        overlay = build(
            os.open(lower, os.O_RDONLY),
            Precache(paths, "c"),
            cached=rule,
            most_cached=rule.most_bytes,
            policy=policy or Policy(),
            fine_stamps=fine_stamps,
        )
        overlay.precache.claim()
        assert overlay.precache.current is not None
        if watches:
            overlay.watch_with(Events.of(overlay.table.root))
            assert overlay.watch is not None
        ends = types.SimpleNamespace(
            descriptor=device.fileno(), channel=ours, session=libfuse.fileno(), passthrough=False, rings=None
        )
        reading = Reading(cast(Device, ends))
        overlay.kernel.connect(device.fileno(), b"")
        overlay.read_by(reading)
        mount = Mount(overlay, reading, kernel, lower, segment)
        made.append((mount, (kernel, device, ours, libfuse)))
        return mount

    yield make
    for mount, sockets in made:
        mount.overlay.read_by(None)
        mount.reading.end()
        mount.overlay.close()
        assert mount.segment.check() == []
        mount.segment.close()
        for one in sockets:
            one.close()
