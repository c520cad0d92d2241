"""Large hits go to the kernel by way of a pipe; `tests/native/piped.c` has what may go wrong there."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.bench.mounts import pin

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

READ = 512 << 10
CONTENT = random.Random(5).randbytes(6 * READ + 777)


@pytest.fixture
def place(segment: "_native.Segment", mounter: Mounter) -> Place:
    place = mounter("loop=native,io_uring=off")
    (place.lower / "file").write_bytes(CONTENT)
    pin(place.pid, {min(os.sched_getaffinity(0))})  # with two CPUs a helper may answer, which has no pipe
    return place


def read_in_order(place: Place, size: int, start: int = 0) -> None:
    descriptor = os.open(place.point / "file", os.O_RDONLY)
    try:
        for offset in range(start, len(CONTENT), size):
            assert os.pread(descriptor, size, offset) == CONTENT[offset : offset + size]
    finally:
        os.close(descriptor)


def goes_by_pipe(place: Place) -> bool:
    """Say whether the file can be read without the daemon writing most of it.

    Misses are written, and what is read by the stand-in.
    """
    for _ in range(50):
        before = written(place)
        read_in_order(place, READ)
        if written(place) - before < READ:
            return True
    return False


def written(place: Place) -> int:
    """Return the bytes that the daemon's write calls have taken so far."""
    text = Path(f"/proc/{place.pid}/io").read_text()
    return int(dict(line.split(": ") for line in text.splitlines())["wchar"])


def test_hits_of_any_size_and_place_have_their_bytes(place: Place) -> None:
    for size in (READ, READ, 1 << 20, 300_001, 128 << 10, 70_000):
        read_in_order(place, size)
    read_in_order(place, READ, 4095)
    assert place.statistics().hit_reads > 20
    assert goes_by_pipe(place)


def test_a_daemon_with_other_code_has_a_pipe_of_its_own(place: Place) -> None:
    assert goes_by_pipe(place)
    assert not place.restart().failure
    assert goes_by_pipe(place)


def has_huge_page(place: Place) -> bool:
    """Say whether the daemon has memory for windows of a stream, which is in huge pages (`hg`)."""
    flags = [
        line.split()
        for line in Path(f"/proc/{place.pid}/smaps").read_text().splitlines()
        if line.startswith("VmFlags:")
    ]
    return any("hg" in words for words in flags)


def pipes(place: Place) -> int:
    links = [link.readlink() for link in Path(f"/proc/{place.pid}/fd").iterdir() if link.is_symlink()]
    return sum(str(link).startswith("pipe:") for link in links)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages")
@pytest.mark.parametrize("goes_on", [False, True], ids=["quiet", "small reads go on"])
def test_what_a_stream_took_goes_back_when_it_is_over(
    place: Place, eventually: Callable[..., None], goes_on: bool
) -> None:
    before = pipes(place)
    assert goes_by_pipe(place)
    assert has_huge_page(place)
    assert pipes(place) > before
    descriptor = os.open(place.point / "file", os.O_RDONLY)
    try:

        def is_given_back() -> bool:
            if goes_on:
                assert os.pread(descriptor, 4096, 8192) == CONTENT[8192:12288]
            return not has_huge_page(place) and pipes(place) == before

        eventually(is_given_back)
    finally:
        os.close(descriptor)
    assert goes_by_pipe(place)
    assert has_huge_page(place)
