"""Netlink messages, byte for byte as the kernel's headers lay them out, and a real exchange with the
kernel."""

import socket
from pathlib import Path

import pytest

from tmem.errors import AttachError
from tmem.nbd import netlink
from tmem.nbd.netlink import NbdControl

# Little-endian machines only, as are all that the bytes below were written for.
CONNECT = bytes.fromhex(
    "60000000 1c00 0500 07000000 00000000"  # nlmsghdr: length 96, family 28, REQUEST|ACK, sequence 7, port 0
    "01 01 0000"  # genlmsghdr: NBD_CMD_CONNECT, version 1
    "0c00 0200 0000000100000000"  # NBD_ATTR_SIZE_BYTES: 16 MiB
    "0c00 0300 0010000000000000"  # NBD_ATTR_BLOCK_SIZE_BYTES: 4096
    "0c00 0400 0000000000000000"  # NBD_ATTR_TIMEOUT: none
    "0c00 0800 8051010000000000"  # NBD_ATTR_DEAD_CONN_TIMEOUT: a day
    "0c00 0500 ed05000000000000"  # NBD_ATTR_SERVER_FLAGS
    "1000 0780"  # NBD_ATTR_SOCKETS, nested
    "0c00 0180"  # NBD_SOCK_ITEM, nested
    "0800 0100 05000000"  # NBD_SOCK_FD: 5
)


def test_connect_message() -> None:
    attributes = netlink.connect_attributes(descriptor=5, size_bytes=16 << 20, flags=0x5ED)
    message = netlink.pack_message(28, netlink.CMD_CONNECT, 7, attributes)
    assert message == CONNECT


def test_disconnect_message() -> None:
    message = netlink.pack_message(28, netlink.CMD_DISCONNECT, 1, [netlink.u32(netlink.ATTR_INDEX, 3)])
    assert message == bytes.fromhex("1c000000 1c00 0500 01000000 00000000 02 01 0000 0800 0100 03000000")


def test_attributes_are_padded() -> None:
    assert netlink.attribute(2, b"nbd\0x") == bytes.fromhex("0900 0200 6e626400 78 000000")
    data = netlink.attribute(2, b"nbd\0x") + netlink.u32(1, 9)
    assert list(netlink.parse_attributes(data)) == [(2, b"nbd\0x"), (1, b"\x09\0\0\0")]


def test_status_reply() -> None:
    reply = bytes.fromhex(
        "40000000 1c00 0000 01000000 11000000 05 01 0000"
        "2c00 0980"  # NBD_ATTR_DEVICE_LIST
        "1400 0180 0800 0100 00000000 0500 0200 01 000000"  # device 0, connected
        "1400 0180 0800 0100 02000000 0500 0200 00 000000"  # device 2, not
    )
    (message,) = netlink.parse_messages(reply)
    assert message.command == netlink.CMD_STATUS
    assert netlink.parse_status(message.attributes) == {0: True, 2: False}


def test_error_reply() -> None:
    reply = bytes.fromhex("24000000 0200 0000 01000000 00000000 feffffff") + bytes(16)
    (message,) = netlink.parse_messages(reply)
    assert message.errno == 2


@pytest.mark.parametrize("cut", [17, 21, 30])
def test_what_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="cut short"):
        list(netlink.parse_messages(CONNECT[:cut]))
    with pytest.raises(ValueError, match="cut short"):
        list(netlink.parse_attributes(CONNECT[20:][:cut]))


def has_driver() -> bool:
    return Path("/sys/module/nbd").exists()


@pytest.mark.skipif(has_driver(), reason="this kernel has the nbd driver")
def test_a_kernel_without_the_driver() -> None:
    """The kernel answers the question for the family, in its own encoding."""
    with pytest.raises(AttachError, match="the kernel has no nbd driver"):
        NbdControl()


def test_the_kernel_knows_its_control_family() -> None:
    """A message made here is understood by the kernel, and its answer here."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as control:
        control.bind((0, 0))
        control.send(netlink.pack_message(16, 3, 1, [netlink.attribute(2, b"nlctrl\0")]))
        answer, acknowledgement = (
            message for _ in range(2) for message in netlink.parse_messages(control.recv(1 << 16))
        )
    assert answer.attributes[1] == b"\x10\0"
    assert answer.attributes[2] == b"nlctrl\0"
    assert acknowledgement.errno == 0
