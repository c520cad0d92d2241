"""What goes wrong in a handler is that request's error, or nobody's; it never ends the mount."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pyfuse3
import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.errors import NoSpaceError
from tmem.fs.base import Failure, errno_seen
from tmem.fs.buffers import Buffers
from tmem.fs.caching import SMALL_BYTES, CacheRule
from tmem.fs.options import Cache
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache

from .test_interleavings import CONTEXT, opened

if TYPE_CHECKING:
    from tmem.backends import _native

CONTENT = b"content"


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.EACCES, "x"), errno.EACCES),
        (OSError(511, "x"), 511),
        (OSError(512, "the kernel refuses this one"), errno.EIO),
        (OSError(524, "and so ENOTSUPP, which file systems have let out"), errno.EIO),
        (OSError(), errno.EIO),
        (NoSpaceError(), errno.ENOSPC),
        (MemoryError(), errno.ENOMEM),
        (OverflowError("a time beyond 64 bits, say"), errno.EIO),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a name that nobody has thought of"), errno.EIO),
    ],
)
def test_what_a_program_sees(failure: Failure, number: int) -> None:
    assert errno_seen(failure) == number


def test_what_nobody_has_thought_of_is_one_request_s_error_and_logged(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        with monkeypatch.context() as patched:
            patched.setattr(overlay, "attributes", fails)
            with pytest.raises(pyfuse3.FUSEError) as failure:
                await overlay.getattr(entry.st_ino, CONTEXT)
        assert failure.value.errno == errno.EIO
        assert (await overlay.getattr(entry.st_ino, CONTEXT)).st_size == len(CONTENT)

    def fails(*arguments: object, **keywords: object) -> NoReturn:
        raise OverflowError("int too big to convert")

    trio.run(main)
    assert "int too big to convert" in caplog.text


def no_descriptors(status: os.stat_result, appends: bool) -> bool:
    raise OSError(errno.EMFILE, "no descriptor is left to find out")


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def overlay(lower: Path, segment: "_native.Segment") -> Iterator[Overlay]:
    overlay = build(os.open(lower, os.O_RDONLY), Precache(SegmentPaths.of("default"), "web"))
    yield overlay
    overlay.close()


def test_an_open_that_fails_late_leaves_nothing(lower: Path, runtime_dir: Path) -> None:
    root = os.open(lower, os.O_RDONLY)
    overlay = build(root, Precache(SegmentPaths.of("default"), "web"), cached=no_descriptors)
    flags = os.O_RDWR | os.O_CREAT

    async def main() -> None:
        entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
        with pytest.raises(pyfuse3.FUSEError):
            await overlay.open(entry.st_ino, os.O_RDWR, CONTEXT)
        await overlay.forget([(entry.st_ino, 1)])
        with pytest.raises(pyfuse3.FUSEError):
            await overlay.create(pyfuse3.ROOT_INODE, b"new", 0o644, flags, CONTEXT)

    before = len(list(Path("/proc/self/fd").iterdir()))
    trio.run(main)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(overlay.table) == 1
    assert overlay.used_by_files() == []
    overlay.close()


@pytest.mark.parametrize("failure", [OSError(errno.ENOTCONN, "x"), KeyError("MemTotal"), ValueError("x")])
def test_memory_that_cannot_be_looked_at_is_not_in_plenty(failure: Exception) -> None:
    """As in a container whose /proc is served by a daemon that is being restarted."""

    def plenty() -> bool:
        raise failure

    rule = CacheRule(Cache.AUTO, plenty)
    rule.settle(direct_mmap=True)
    assert not rule(os.stat_result((0o100644, 1, 1, 1, 0, 0, SMALL_BYTES, 0, 0, 0)))


class NoMemory(Buffers):
    """Has none."""

    def __init__(self, failure: OSError | MemoryError) -> None:
        super().__init__()
        self._failure = failure

    def take(self, size: int) -> memoryview:
        raise self._failure


@pytest.mark.parametrize("failure", [OSError(errno.ENOMEM, "from mmap"), MemoryError()])
@pytest.mark.parametrize("with_pool", [True, False])
def test_a_read_without_memory(overlay: Overlay, failure: OSError | MemoryError, with_pool: bool) -> None:
    async def main() -> None:
        fh = await opened(overlay)
        overlay._files[fh].inode.declined = not with_pool
        overlay._loader.buffers = NoMemory(failure)
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await overlay.read(fh, 0, 10)
        assert caught.value.errno == errno.ENOMEM

    trio.run(main)


def test_a_close_without_a_descriptor_says_nothing_of_the_lower(overlay: Overlay) -> None:
    """The file is cached on: its lower has not failed to write."""

    async def main() -> None:
        fh = await opened(overlay)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(pyfuse3.FUSEError):
                await overlay.flush(fh)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(2):
            assert bytes(await overlay.read(fh, 0, 10)) == CONTENT
        assert overlay.statistics().hit_reads == 1

    trio.run(main)


_WITHOUT_THREADS = """
import os, sys, threading
import pyfuse3, trio
from tmem.backends.paths import SegmentPaths
from tmem.fs.overlay import build
from tmem.fs.precache import Precache

threading.stack_size(1 << 47)  # more than there are addresses: no thread can be started

async def main():
    context = pyfuse3.RequestContext()
    entry = await overlay.lookup(pyfuse3.ROOT_INODE, b"file", context)
    fh = (await overlay.open(entry.st_ino, os.O_RDWR, context)).fh
    await overlay.write(fh, 0, b"C")
    await overlay.fsync(fh, False)
    try:
        await trio.to_thread.run_sync(print, "there are threads")
    except RuntimeError:
        print("done")

root = os.open(sys.argv[1], os.O_RDONLY)
overlay = build(root, Precache(SegmentPaths.of("none"), "web"))
trio.run(main)
"""


def test_no_thread_to_be_had(lower: Path, runtime_dir: Path) -> None:
    """What is to be done is done all the same."""
    command = [sys.executable, "-c", _WITHOUT_THREADS, str(lower)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.stdout, result.stderr) == ("done\n", "")
    assert (lower / "file").read_bytes() == b"C" + CONTENT[1:]
