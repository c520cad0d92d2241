"""The kernel's nbd driver over generic netlink: connect, reconnect, disconnect, status, and what it reports.

Messages are built and taken apart by pure functions (`pack_message`, `parse_messages`), so that they can be
compared byte for byte with linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h; `NbdControl` sends
them, `NbdEvents` receives. A dead connection parks requests for a day instead of failing them, until the
device gets another (`NbdControl.reconnect`).

A control, and events, belong to one thread. Needs CAP_SYS_ADMIN.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tmem.errors import AttachError

_NETLINK_GENERIC = 16
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_CONTROL_FAMILY = 16
_CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 3, 1, 2
_CTRL_ATTR_MCAST_GROUPS, _CTRL_ATTR_MCAST_GRP_NAME, _CTRL_ATTR_MCAST_GRP_ID = 7, 1, 2
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_EVENT_GROUP = "nbd_mc_group"

CMD_CONNECT, CMD_DISCONNECT, CMD_RECONFIGURE, CMD_LINK_DEAD, CMD_STATUS = 1, 2, 3, 4, 5
ATTR_INDEX, ATTR_SIZE_BYTES, ATTR_BLOCK_SIZE_BYTES, ATTR_TIMEOUT = 1, 2, 3, 4
ATTR_SERVER_FLAGS, ATTR_SOCKETS, ATTR_DEAD_CONN_TIMEOUT, ATTR_DEVICE_LIST = 5, 7, 8, 9
_SOCK_ITEM, _SOCK_FD = 1, 1
_DEVICE_INDEX, _DEVICE_CONNECTED = 1, 2

BLOCK_SIZE_BYTES = 4096
DEAD_CONNECTION_TIMEOUT_S = 86400


@dataclass(frozen=True)
class Message:
    """A message received: netlink type, generic command (0 for errors), errno (0: none) and attributes by
    type."""

    type: int
    command: int
    errno: int
    attributes: dict[int, bytes]


def attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute: header, payload, padding to four bytes."""
    return struct.pack("=HH", len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, attributes: Iterable[bytes]) -> bytes:
    """Return an attribute that contains attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def u32(kind: int, value: int) -> bytes:
    """Return an attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    """Return an attribute of 64 bits."""
    return attribute(kind, struct.pack("=Q", value))


def pack_message(family: int, command: int, sequence: int, attributes: Iterable[bytes]) -> bytes:
    """Return a request that wants an acknowledgement: nlmsghdr, genlmsghdr (version 1), attributes."""
    payload = struct.pack("=BBH", command, 1, 0) + b"".join(attributes)
    return (
        struct.pack("=IHHII", len(payload) + 16, family, _NLM_F_REQUEST | _NLM_F_ACK, sequence, 0) + payload
    )


def connect_attributes(descriptor: int, size_bytes: int, flags: int) -> list[bytes]:
    """Return the attributes of NBD_CMD_CONNECT for the next free device on one connected socket.

    One connection and no timeout: with two, a slow server's connections are taken for dead. `flags` are the
    transmission flags of the handshake.
    """
    return [
        u64(ATTR_SIZE_BYTES, size_bytes),
        u64(ATTR_BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES),
        u64(ATTR_TIMEOUT, 0),
        u64(ATTR_DEAD_CONN_TIMEOUT, DEAD_CONNECTION_TIMEOUT_S),
        u64(ATTR_SERVER_FLAGS, flags),
        nested(ATTR_SOCKETS, [nested(_SOCK_ITEM, [u32(_SOCK_FD, descriptor)])]),
    ]


def reconnect_attributes(index: int, descriptor: int) -> list[bytes]:
    """Return the attributes of NBD_CMD_RECONFIGURE that give device `index` a socket for its dead one.

    Neither size nor block size: changing those would freeze the queue, which waits for the dead connection.
    """
    return [
        u32(ATTR_INDEX, index),
        nested(ATTR_SOCKETS, [nested(_SOCK_ITEM, [u32(_SOCK_FD, descriptor)])]),
    ]


def parse_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of each attribute in `data`; ValueError if it is cut short."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > len(data):
            raise ValueError("a netlink attribute is cut short")
        yield kind & _NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def parse_messages(data: bytes) -> Iterator[Message]:
    """Yield the messages of one datagram; ValueError if it is cut short."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _flags, _sequence, _port = struct.unpack_from("=IHHII", data, offset)
        if length < 16 or offset + length > len(data):
            raise ValueError("a netlink message is cut short")
        body = data[offset + 16 : offset + length]
        if kind == _NLMSG_ERROR:
            (negative,) = struct.unpack_from("=i", body)
            yield Message(kind, 0, -negative, {})
        elif kind > _NLMSG_ERROR and len(body) >= 4:
            yield Message(kind, body[0], 0, dict(parse_attributes(body[4:])))
        offset += (length + 3) & ~3


def parse_status(attributes: dict[int, bytes]) -> dict[int, bool]:
    """Return {index: connected} of the device list in a reply to NBD_CMD_STATUS."""
    devices: dict[int, bool] = {}
    for _, item in parse_attributes(attributes.get(ATTR_DEVICE_LIST, b"")):
        fields = dict(parse_attributes(item))
        (index,) = struct.unpack("=I", fields[_DEVICE_INDEX])
        devices[index] = fields.get(_DEVICE_CONNECTED, b"\0") != b"\0"
    return devices


def parse_group(attributes: dict[int, bytes], name: str) -> int | None:
    """Return the number of the multicast group `name` in a reply to CTRL_CMD_GETFAMILY, None without it."""
    for _, item in parse_attributes(attributes.get(_CTRL_ATTR_MCAST_GROUPS, b"")):
        fields = dict(parse_attributes(item))
        if fields.get(_CTRL_ATTR_MCAST_GRP_NAME, b"").rstrip(b"\0") == name.encode():
            (number,) = struct.unpack("=I", fields[_CTRL_ATTR_MCAST_GRP_ID])
            return int(number)
    return None


class NbdControl:
    """A netlink socket to the kernel's nbd driver; a context manager.

    Raises `AttachError` when the kernel has no such driver, or refuses what is asked.
    """

    def __init__(self) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.bind((0, 0))
            reply = self.family("nbd")
            (self._family,) = struct.unpack("=H", reply[_CTRL_ATTR_FAMILY_ID])
            self._events = parse_group(reply, _EVENT_GROUP)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._socket.close()

    def family(self, name: str) -> dict[int, bytes]:
        """Return the attributes of the generic netlink family `name` (CTRL_CMD_NEWFAMILY)."""
        request = [attribute(_CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")]
        try:
            return self._transact(_CONTROL_FAMILY, _CTRL_CMD_GETFAMILY, request)
        except FileNotFoundError:
            raise AttachError(
                f"the kernel has no {name} driver: load it with modprobe {name}, or attach by nbdfuse"
            ) from None

    def events(self) -> "NbdEvents":
        """Return the driver's reports from now on."""
        if self._events is None:
            raise AttachError(
                "the kernel's nbd driver does not report dead connections: use Linux 4.12 or later"
            )
        return NbdEvents(self._events)

    def connect(self, connection: socket.socket, size_bytes: int, flags: int) -> int:
        """Give the kernel a socket that is past the handshake; the index of the device (0 for /dev/nbd0)."""
        attributes = connect_attributes(connection.fileno(), size_bytes, flags)
        (index,) = struct.unpack("=I", self._request(CMD_CONNECT, attributes)[ATTR_INDEX])
        return int(index)

    def reconnect(self, index: int, connection: socket.socket) -> None:
        """Give device `index` a socket past the handshake in the place of its dead one.

        Without a dead one the kernel does nothing, and says nothing. AttachError if the device is not
        connected.
        """
        self._request(CMD_RECONFIGURE, reconnect_attributes(index, connection.fileno()))

    def disconnect(self, index: int) -> None:
        """Disconnect a device; the kernel closes its sockets. A device that is not connected is left
        alone."""
        self._request(CMD_DISCONNECT, [u32(ATTR_INDEX, index)])

    def status(self, index: int) -> bool:
        """Return whether the device of this index is connected."""
        return parse_status(self._request(CMD_STATUS, [u32(ATTR_INDEX, index)])).get(index, False)

    def _request(self, command: int, attributes: list[bytes]) -> dict[int, bytes]:
        try:
            return self._transact(self._family, command, attributes)
        except OSError as error:
            hint = " (root is needed)" if error.errno == errno.EPERM else ""
            raise AttachError(
                f"the kernel's nbd driver refused command {command}: {error.strerror}{hint}"
            ) from None

    def _transact(self, family: int, command: int, attributes: list[bytes]) -> dict[int, bytes]:
        """Send a request and collect the reply's attributes until it is acknowledged."""
        self._sequence += 1
        self._socket.send(pack_message(family, command, self._sequence, attributes))
        collected: dict[int, bytes] = {}
        while True:
            for message in parse_messages(self._socket.recv(1 << 16)):
                if message.type == _NLMSG_ERROR:
                    if message.errno:
                        raise OSError(message.errno, os.strerror(message.errno))
                    return collected
                collected |= message.attributes


class NbdEvents:
    """The kernel's reports of dead connections; poll `fileno`, then call `dead`."""

    def __init__(self, group: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, readable when there is a report."""
        return self._socket.fileno()

    def dead(self, index: int) -> bool:
        """Take the reports that have come; whether one is, or may have been, of device `index`."""
        found = False
        while True:
            try:
                data = self._socket.recv(1 << 14)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found = True  # reports were dropped
                continue
            for message in parse_messages(data):
                if message.command == CMD_LINK_DEAD:
                    found |= message.attributes.get(ATTR_INDEX) == struct.pack("=I", index)

    def close(self) -> None:
        """Give the reports up."""
        self._socket.close()
