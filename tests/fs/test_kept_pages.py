"""Pages that the kernel keeps of a file go with the first open after a change underneath that it hears of."""

import errno
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tmem.types import PAGE_SIZE

from .native_mount import KEEP_CACHE, NO_FLUSH, OPEN, Mount, make

INTERRUPT = 36


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    for maker in make(tmp_path):
        yield maker()


@pytest.fixture
def node(mount: Mount) -> int:
    """A file of which the kernel has pages, in a mount that opens are granted in."""
    mount.grant()
    number = mount.look_up("file")
    mount.use(number)
    assert mount.open(number)[2] == KEEP_CACHE | NO_FLUSH
    return number


def change_unseen(path: Path, content: bytes = b"changed") -> None:
    """Write to a file underneath so that neither its size nor its mtime tells."""
    stamps = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))


def test_a_change_that_an_open_found_which_failed(
    mount: Mount, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not told then, and by attributes it cannot know."""
    change_unseen(mount.lower / "file")
    opens = os.open

    def refuse_to_write(path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.ETXTBSY, "it is being run")
        return opens(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_to_write)
        assert mount.refused(node, os.O_RDWR) == errno.ETXTBSY
    assert mount.open(node)[2] == NO_FLUSH
    assert mount.open(node)[2] == KEEP_CACHE | NO_FLUSH


def test_a_change_that_a_read_found(mount: Mount, node: int) -> None:
    (handle,) = mount.files()
    with (mount.lower / "file").open("r+b") as file:
        file.write(b"changed")
        file.seek(0, os.SEEK_END)
        file.write(b"longer")
    trio.run(mount.overlay.read, handle, 2 * PAGE_SIZE, PAGE_SIZE)
    assert mount.open(node)[2] == NO_FLUSH
    assert mount.open(node)[2] == KEEP_CACHE | NO_FLUSH


def test_a_change_that_an_open_found_whose_program_was_killed(
    mount: Mount, node: int, monkeypatch: pytest.MonkeyPatch, program: "subprocess.Popen[bytes]"
) -> None:
    change_unseen(mount.lower / "file")
    opened = mount.overlay._opened

    def be_slow(*arguments: object) -> object:
        info = opened(*arguments)  # type: ignore[arg-type]
        program.send_signal(signal.SIGQUIT)
        mount.request(INTERRUPT, 0, struct.pack("=Q", unique))
        while struct.unpack_from("=iQ", mount.kernel.recv(1 << 20), 4) != (-errno.EINTR, unique):
            pass  # until the stand-in has answered
        return info

    unique = mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0), program.pid)
    with monkeypatch.context() as patch:
        patch.setattr(mount.overlay, "_opened", be_slow)
        assert mount.served()
    undo = os.read(mount.reading._session, 1 << 20)
    trio.run(mount.overlay.release, *struct.unpack_from("=Q", undo, 40))
    assert mount.open(node)[2] == NO_FLUSH
    assert mount.open(node)[2] == KEEP_CACHE | NO_FLUSH
