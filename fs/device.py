"""The FUSE device: mount it, and settle with the kernel what libfuse cannot ask for.

libfuse takes ``/dev/fd/N`` as a mount point that is mounted already. N is first one end of a socket pair:
the kernel's INIT request is handed through it, pyfuse3 answers, the answer is amended and given to the
kernel, and then N is made the device itself (dup2), so that afterwards nothing stands between pyfuse3 and
the kernel; or, with a native reader (`reading`), the pair stays and the reader is in between. Amended: mmap
with MAP_SHARED on direct_io files (ENODEV without it), that the umask is ours to apply, since a default
access control list takes its place, that names of one directory may be asked for side by side, that files may
be passed through (`backing`), and that requests come over io_uring (`uring`).

Request and answer are kept. New code that takes over a device whose connection is open (`restart`) hands
the same request to its own libfuse: if that answers as the old one did, it will understand what the kernel
goes on sending. Not for anything after INIT.
"""

import errno
import logging
import os
import shutil
import socket
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3
import trio

from tmem.errors import AttachError
from tmem.fs import syscalls, uring
from tmem.fs.options import MountOptions
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends._native import Rings

log = logging.getLogger(__name__)

_SO_SNDBUFFORCE = 32  # socket(7); Python has no name for it
_CHANNEL_BYTES = 32 << 20
"""For some 30,000 requests under way, or 250 to list directories. Nothing is allocated before it is used."""
_LEAST_CHANNEL_BYTES = 160 << 10
"""Twice the largest message (`MOST_MESSAGE` in backends/native/reader_passing.h)."""
_INIT_OPCODE = 26
_IN_HEADER, _OUT_HEADER = 40, 16
_IN_FLAGS, _IN_FLAGS2 = _IN_HEADER + 12, _IN_HEADER + 16
_OUT_FLAGS, _OUT_FLAGS2 = _OUT_HEADER + 12, _OUT_HEADER + 32
_INIT_EXT = 1 << 30
_DONT_MASK = 1 << 6
_PARALLEL_DIROPS = 1 << 18
_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)
_PASSTHROUGH = 1 << (37 - 32)
_OVER_IO_URING = 1 << (41 - 32)
_MAX_PAGES = 1 << 22
_OUT_MAX_WRITE, _OUT_MAX_PAGES = _OUT_HEADER + 20, _OUT_HEADER + 28
_USUAL_PAGES = 32
_OUT_MAX_STACK_DEPTH = _OUT_FLAGS2 + 4
_STACK_DEPTH = 1
"""How many file systems lie on top of each other with this one on top: the lower may not be such a one. With
2, the most, overlayfs could not be put on top of the mount."""
_INIT_SECONDS = 10
_NAMES = {
    syscalls.MS_RDONLY: "ro",
    syscalls.MS_NOEXEC: "noexec",
    syscalls.MS_NOATIME: "noatime",
    syscalls.MS_SYNCHRONOUS: "sync",
}


@dataclass
class Device:
    """A mounted device: `descriptor` is /dev/fuse, `session` what pyfuse3 reads, `channel` its other end.

    Once connected without a reader, `session` is /dev/fuse, and there is no `descriptor`.
    """

    descriptor: int
    session: int
    channel: socket.socket
    direct_mmap: bool = False
    """Whether files with direct_io can be mapped shared; known after `negotiate`."""
    request: bytes = b""
    """The kernel's INIT request, once it was read."""
    reply: bytes = b""
    """What it was answered with."""
    read_natively: bool = False
    """Whether a native reader is to stand between pyfuse3 and the kernel."""

    wants_passthrough: bool = False
    """Whether files are to be passed through, if the kernel can."""
    passthrough: bool = False
    """Whether files can be passed through; known after `negotiate`."""

    wants_rings: bool = False
    """Whether requests are to come over io_uring, if the kernel lets them."""
    rings: "Rings | None" = None
    """What they then come by, to be served at once; known after `negotiate`."""
    ring_descriptors: tuple[int, ...] = ()

    @property
    def fuse(self) -> int:
        """The descriptor of /dev/fuse."""
        return self.descriptor if self.descriptor >= 0 else self.session

    def make_room(self) -> bool:
        """Let many requests be under way between a native reader and pyfuse3; False if not even one may be.

        Without CAP_NET_ADMIN as many as the kernel allows everybody: 100 by default, or one listing.
        """
        room = _CHANNEL_BYTES
        session = socket.socket(fileno=os.dup(self.session))
        with session:
            for end in (self.channel, session):
                try:
                    end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _CHANNEL_BYTES)
                except OSError:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
                room = min(room, end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        return room >= _LEAST_CHANNEL_BYTES

    def abandon(self) -> None:
        """Have all ends lead nowhere, from any thread, while others still use them.

        Their numbers stay taken: what a thread is about to write to one would go to whatever was opened
        meanwhile, a lower file perhaps. The kernel ends the mount's connection as after `close`.
        """
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        rings, self.ring_descriptors = self.ring_descriptors, ()  # they keep the connection open, too
        for descriptor in (self.descriptor, self.session, self.channel.fileno(), *rings):
            if descriptor >= 0:
                os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)

    def close(self) -> None:
        """Close all ends. The kernel then ends the mount's connection."""
        self.ring_descriptors = ()  # the reader has closed them
        for descriptor in (self.descriptor, self.session):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.session = -1
        self.channel.close()


def mount(lower: str, mountpoint: str, options: MountOptions) -> Device:
    """Mount `lower` on `mountpoint`. AttachError says what to do."""
    try:
        descriptor = _mount_as_root if os.geteuid() == 0 else _mount_as_user
        opened = descriptor(lower, mountpoint, options)
    except OSError as error:
        remedy = "see the kernel's log ('dmesg')"
        if error.errno == errno.EPERM:
            remedy = "root may not mount here: give the container CAP_SYS_ADMIN, or mount outside of it"
        raise AttachError(f"cannot mount on {mountpoint}: {error.strerror}; {remedy}") from None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Device(opened, theirs.detach(), ours)


def taken_over(descriptor: int, request: bytes, reply: bytes) -> Device:
    """Return a device whose connection is open: `descriptor` is /dev/fuse, `reply` answered `request`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wants_passthrough = bool(_flags(reply, _OUT_FLAGS, _OUT_FLAGS2)[1] & _PASSTHROUGH)
    return Device(
        descriptor,
        theirs.detach(),
        ours,
        request=request,
        reply=reply,
        wants_passthrough=wants_passthrough,
    )


async def negotiate(device: Device) -> None:
    """Let pyfuse3 (initialised on `device.session`) and the kernel agree, and connect them for good."""
    device.request = await trio.to_thread.run_sync(os.read, device.descriptor, 1 << 21)
    if struct.unpack_from("=I", device.request, 4)[0] != _INIT_OPCODE:
        raise AttachError("the kernel did not start the FUSE protocol: is another program using this mount?")
    await agree(device)
    _connect(device)
    os.write(device.fuse, device.reply)


async def take_over(device: Device) -> None:
    """Let pyfuse3 (initialised on `device.session`) go on where other code has left the connection."""
    await agree_as_before(device)
    _connect(device)


async def agree_as_before(device: Device) -> None:
    """Have pyfuse3 answer `device.request`. AttachError if not with `device.reply`, which the kernel has."""
    before = device.reply
    await agree(device)
    if device.reply != before:
        raise AttachError("its libfuse speaks otherwise to the kernel: unmount and mount again")


async def agree(device: Device) -> None:
    """Have pyfuse3 answer `device.request`; what the kernel is to be told is then `device.reply`.

    If there is one already, side by side is asked for only what was by it: older code did not.
    """
    reply = bytearray()
    device.channel.send(device.request)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main, 1, 1)
        with trio.fail_after(_INIT_SECONDS):
            await trio.lowlevel.wait_readable(device.channel.fileno())
        reply += device.channel.recv(4096)
        nursery.cancel_scope.cancel()
    offered, more = _flags(device.request, _IN_FLAGS, _IN_FLAGS2)
    if offered & _INIT_EXT and len(reply) >= _OUT_MAX_STACK_DEPTH + 4:
        if more & _DIRECT_IO_ALLOW_MMAP:
            _set_bits(reply, _OUT_FLAGS, _INIT_EXT)
            _set_bits(reply, _OUT_FLAGS2, _DIRECT_IO_ALLOW_MMAP)
            device.direct_mmap = True
        if more & _PASSTHROUGH and device.wants_passthrough:
            _set_bits(reply, _OUT_FLAGS, _INIT_EXT)
            _set_bits(reply, _OUT_FLAGS2, _PASSTHROUGH)
            struct.pack_into("=I", reply, _OUT_MAX_STACK_DEPTH, _STACK_DEPTH)
            device.passthrough = True
    if offered & _DONT_MASK:
        _set_bits(reply, _OUT_FLAGS, _DONT_MASK)
    parallel = not device.reply or _flags(device.reply, _OUT_FLAGS, _OUT_FLAGS2)[0] & _PARALLEL_DIROPS
    if offered & _PARALLEL_DIROPS and parallel:  # or of a directory one name at a time is asked for
        _set_bits(reply, _OUT_FLAGS, _PARALLEL_DIROPS)
    if device.wants_rings:
        _ask_for_rings(device, more if offered & _INIT_EXT else 0, reply)
    device.reply = bytes(reply)


def _ask_for_rings(device: Device, offered: int, reply: bytearray) -> None:
    """Have requests come over io_uring; where they cannot, say why, and do without."""
    rings: Rings | str = uring.lacking()
    if not rings and not (offered & _OVER_IO_URING and len(reply) >= _OUT_FLAGS2 + 4):
        rings = "this kernel does not offer it"
    if not rings:
        rings = uring.make(_payload_bytes(reply))
    if isinstance(rings, str):
        log.warning("requests do not come over io_uring: %s", rings)
        return
    device.rings, device.ring_descriptors = rings, tuple(rings.descriptors)
    _set_bits(reply, _OUT_FLAGS, _INIT_EXT)
    _set_bits(reply, _OUT_FLAGS2, _OVER_IO_URING)


def _payload_bytes(reply: bytes | bytearray) -> int:
    """Return what the largest request or reply carries, as the kernel reckons it."""
    most_written: int = struct.unpack_from("=I", reply, _OUT_MAX_WRITE)[0]
    pages: int = struct.unpack_from("=H", reply, _OUT_MAX_PAGES)[0]
    if not struct.unpack_from("=I", reply, _OUT_FLAGS)[0] & _MAX_PAGES:
        pages = _USUAL_PAGES
    return max(2 * PAGE_SIZE, most_written, pages * PAGE_SIZE)


def _connect(device: Device) -> None:
    os.set_blocking(device.descriptor, not device.read_natively)  # the reader polls
    if device.read_natively:
        return
    os.dup2(device.descriptor, device.session, inheritable=False)
    os.close(device.descriptor)
    device.descriptor = -1
    device.channel.close()


def _flags(message: bytes, first: int, second: int) -> tuple[int, int]:
    """Return both words of flags, 0 where the message is too short for them."""
    words = [
        struct.unpack_from("=I", message, at)[0] if len(message) >= at + 4 else 0 for at in (first, second)
    ]
    return words[0], words[1]


def _set_bits(reply: bytearray, offset: int, bits: int) -> None:
    struct.pack_into("=I", reply, offset, struct.unpack_from("=I", reply, offset)[0] | bits)


def _mount_as_root(lower: str, mountpoint: str, options: MountOptions) -> int:
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AttachError(f"cannot open /dev/fuse: {error.strerror}; load the kernel's fuse module") from None
    try:
        data = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,default_permissions"
        if options.allow_other:
            data += ",allow_other"
        syscalls.mount(lower, mountpoint, "fuse.tmem", options.flags, data)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _mount_as_user(lower: str, mountpoint: str, options: MountOptions) -> int:
    program = shutil.which("fusermount3")
    if program is None:
        raise AttachError("cannot mount as a user without fusermount3: install fuse3, or run this as root")
    words = [
        "default_permissions",
        "subtype=tmem",
        "fsname=" + lower.replace("\\", "\\\\").replace(",", "\\,"),
    ]
    words += [name for flag, name in _NAMES.items() if options.flags & flag]
    if options.allow_other:
        words.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = subprocess.run(
            [program, "-o", ",".join(words), "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        if result.returncode:
            raise AttachError(
                f"cannot mount on {mountpoint}: {result.stderr.strip() or 'fusermount3 failed'}"
            )
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise AttachError("fusermount3 gave no device: is it setuid root?")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
