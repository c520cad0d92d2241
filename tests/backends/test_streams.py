"""Frames through descriptors: files past the page cache, pipes that do not block, streams that break."""

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import streams
from tmem.backends.savefile import BLOCK_BYTES, HEAD_BYTES, Kind
from tmem.backends.streams import Descriptor, FrameInput, FrameOutput
from tmem.errors import SaveFileError

LENGTHS = (1, 100, 4072, 4073, 65536, BLOCK_BYTES - HEAD_BYTES, 5, BLOCK_BYTES - HEAD_BYTES, 70000)


def write(descriptor: int, lengths: tuple[int, ...] = LENGTHS) -> FrameOutput:
    """Write frames of these lengths; what is in them follows from their number."""
    out = FrameOutput(descriptor)
    for number, length in enumerate(lengths):
        block = out.block()
        block[HEAD_BYTES : HEAD_BYTES + length] = bytes([number]) * length
        out.data(number, number % 16, block, length)
    out.document(Kind.END, 0, {"n": len(lengths)})
    return out


def rewind(file: int, at: int = 0) -> int:
    """Return to `at` in a file, and to the page cache."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
    os.lseek(file, at, os.SEEK_SET)
    return file


def check(frames: FrameInput, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Check that exactly these frames come."""
    for number, length in enumerate(lengths):
        frame = next(frames)
        assert (frame.kind, frame.client, frame.pool) == (Kind.DATA, number, number % 16)
        assert bytes(frame.payload) == bytes([number]) * length
    assert next(frames).document() == {"n": len(lengths)}
    with pytest.raises(StopIteration):
        next(frames)
    assert (frames.frames, frames.data_bytes) == (len(lengths) + 1, sum(lengths))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """An ordinary file, written past the page cache where that goes."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    streams.past_the_cache(descriptor)
    yield descriptor
    os.close(descriptor)


def test_a_file(file: int) -> None:
    write(file).close()
    assert os.fstat(file).st_size % 4096 == 0
    rewind(file)
    check(FrameInput(file, "the file", Kind.END, whole=True))


def test_a_file_on_a_file_system_of_memory(directory: Path) -> None:
    descriptor = os.open(directory / "file", os.O_RDWR | os.O_CREAT, 0o600)
    streams.past_the_cache(descriptor)
    write(descriptor).close()
    os.lseek(descriptor, 0, os.SEEK_SET)
    check(FrameInput(descriptor, "the file", Kind.END, whole=True))
    os.close(descriptor)


def test_behind_something_else_in_a_file(file: int) -> None:
    """At a place where the page cache cannot be passed by: with it, then."""
    os.pwrite(rewind(file, 6), b"before", 0)
    streams.past_the_cache(file)
    write(file).close()
    rewind(file, 6)
    check(FrameInput(file, "the file", Kind.END, whole=True))


def test_a_file_that_was_cut_at_an_odd_place(file: int) -> None:
    write(file).close()
    os.ftruncate(file, 100_001)
    rewind(file)
    frames = FrameInput(file, "the file", Kind.END, whole=True)
    with pytest.raises(SaveFileError, match="ends early, at byte 100001"):
        list(frames)


def test_a_pipe_that_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    frames = FrameInput(reader, "the pipe", Kind.END, whole=True)
    os.close(reader)  # the input has its own

    def write_and_close() -> None:
        write(writer).close()
        os.close(writer)

    writing = threading.Thread(target=write_and_close)
    writing.start()
    check(frames)
    writing.join()


def test_a_pipe_is_not_read_beyond_the_frame() -> None:
    """What follows the last frame of one stream may belong to somebody else."""
    reader, writer = os.pipe()
    write(writer, (100,)).close()
    os.write(writer, b"more")
    check(FrameInput(reader, "the pipe", Kind.END), (100,))
    assert os.read(reader, 100) == b"more"
    os.close(reader)
    os.close(writer)


def test_a_reader_that_leaves_is_an_error_of_the_next_call() -> None:
    reader, writer = os.pipe()
    out = FrameOutput(writer)
    os.close(reader)
    with pytest.raises(BrokenPipeError):  # noqa: PT012 - whichever call it is
        for _ in range(10):
            block = out.block()
            out.data(1, 0, block, BLOCK_BYTES - HEAD_BYTES)
        out.drain()
    with pytest.raises(BrokenPipeError):
        out.block()
    os.close(writer)


def test_a_reader_that_is_too_slow_is_given_up() -> None:
    reader, writer = os.pipe()
    out = FrameOutput(writer)
    out.timeout_s = 0.2
    with pytest.raises(TimeoutError, match=r"not taken within 0\.2 s"):  # noqa: PT012 - whichever call it is
        for _ in range(10):
            out.data(1, 0, out.block(), BLOCK_BYTES - HEAD_BYTES)
    with pytest.raises(TimeoutError, match="not taken"):
        out.drain()
    out.abandon()
    os.close(reader)
    os.close(writer)


def test_a_writer_that_is_too_slow_is_given_up() -> None:
    reader, writer = os.pipe()
    source = Descriptor(reader)
    os.write(writer, b"half")
    source.timeout_s = 0.1
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.1 s"):
        source.read(memoryview(bytearray(8)))
    os.close(reader)
    os.close(writer)


def test_an_abandoned_output_ends_its_stream() -> None:
    reader, writer = os.pipe()
    out = write(writer, (100,))
    out.drain()
    os.close(writer)
    out.abandon()
    while os.read(reader, 1 << 20):
        pass  # until its end, which comes although nobody closed the output
    os.close(reader)
