"""An export as a block device of this machine (nbdfuse and loop), and nothing left of it afterwards."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends.processes import Process
from tmem.errors import AttachError
from tmem.nbd import attach, export, swap
from tmem.nbd.export import Export
from tmem.types import PAGE_SIZE

from .conftest import Server, eventually, needs_root


@pytest.fixture
def attachable(swap_server: Server) -> Iterator[Server]:
    needs_root()
    yield swap_server
    left = export.load(swap_server.paths, "guest1")
    if left.attachment is not None and left.attachment.device is not None:
        swap.off(left.attachment.device)
    attach.detach(swap_server.paths, left)


def leftovers(server: Server) -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    backing = Path("/sys/block").glob("loop*/loop/backing_file")
    found = [line for line in mounts if str(server.paths.state) in line]
    found += [path.read_text() for path in backing if str(server.paths.state) in path.read_text()]
    return found + [str(path) for path in server.paths.state.glob("*.mnt")]


def test_attach_and_detach(attachable: Server) -> None:
    attached = attach.attach(attachable.paths, attachable.export)
    assert attached.attachment is not None
    device = attached.attachment.device
    assert device is not None
    assert export.load(attachable.paths, "guest1") == attached
    assert attach.attach(attachable.paths, attached) == attached
    name = Path(device).name
    assert int(Path(f"/sys/block/{name}/size").read_text()) * 512 == attachable.export.size_bytes
    assert Path(f"/sys/block/{name}/queue/logical_block_size").read_text().strip() == "4096"
    assert swap.takes_discards(device)
    data = random.Random(9).randbytes(4 * PAGE_SIZE)
    with open(device, "r+b", buffering=0) as raw:  # noqa: PTH123 - a device, unbuffered
        os.pwrite(raw.fileno(), data, 2 * PAGE_SIZE)
        os.fsync(raw.fileno())
    with attachable.client() as client:
        assert client.pread(len(data), 2 * PAGE_SIZE) == data
    detached = attach.detach(attachable.paths, attached)
    assert detached.attachment is None
    assert export.load(attachable.paths, "guest1") == detached
    assert leftovers(attachable) == []
    assert attach.detach(attachable.paths, detached) == detached


def test_discards_reach_the_pool(attachable: Server, segment: object) -> None:
    attached = attach.attach(attachable.paths, attachable.export)
    assert attached.attachment is not None
    assert attached.attachment.device is not None
    with attachable.client() as client:
        client.pwrite(random.Random(10).randbytes(1 << 20), 0)
        subprocess.run(["blkdiscard", attached.attachment.device], check=True)
        assert client.pread(1 << 20, 0) == bytes(1 << 20)


def test_a_killed_nbdfuse_is_taken_down_or_replaced(attachable: Server) -> None:
    attached = attach.attach(attachable.paths, attachable.export)
    assert attached.attachment is not None
    assert attached.attachment.process is not None
    os.kill(attached.attachment.process.pid, signal.SIGKILL)
    process = attached.attachment.process
    eventually(lambda: not process.alive, "nbdfuse is gone")
    again = attach.attach(attachable.paths, attached)
    assert again.attachment is not None
    assert again.attachment.process is not None
    os.kill(again.attachment.process.pid, signal.SIGKILL)
    attach.detach(attachable.paths, again)
    assert leftovers(attachable) == []


def test_a_recycled_process_is_left_alone(attachable: Server) -> None:
    """The record may name a process that is another one by now."""
    attached = attach.attach(attachable.paths, attachable.export)
    assert attached.attachment is not None
    process = attached.attachment.process
    assert process is not None
    bystander = Process(os.getpid(), process.start_ticks)
    renamed = export.Attachment(
        "nbdfuse", attached.attachment.device, attached.attachment.mount_dir, bystander
    )
    attach.detach(attachable.paths, attached.replace_attachment(renamed))
    assert leftovers(attachable) == []


def test_no_server(attachable: Server) -> None:
    attachable.stop()
    with pytest.raises(AttachError, match="cannot be attached"):
        attach.attach(attachable.paths, attachable.export)
    attach.detach(attachable.paths, export.load(attachable.paths, "guest1"))
    assert leftovers(attachable) == []
    attachable.start()


def test_a_device_in_use_is_not_detached(attachable: Server) -> None:
    attached = attach.attach(attachable.paths, attachable.export)
    assert attached.attachment is not None
    assert attached.attachment.device is not None
    swap.on(attached.attachment.device)
    with pytest.raises(AttachError, match="swapoff"):
        attach.detach(attachable.paths, attached)
    swap.off(attached.attachment.device)


def test_tls_is_not_attached(attachable: Server) -> None:
    encrypted = Export("guest1", 4096, tcp=("localhost", 1), tls_psk="/keys")
    with pytest.raises(AttachError, match="TLS and local swap do not mix"):
        attach.attach(attachable.paths, encrypted)
