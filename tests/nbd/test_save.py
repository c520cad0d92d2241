"""A kernel that swaps to the device does not notice that it is saved; what was saved is its swap space."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.nbd import swap
from tmem.types import PAGE_SIZE

from .test_swap import HOG, MIB

if TYPE_CHECKING:
    from tmem.backends import _native


@pytest.fixture
def device_size() -> int:
    """Twice what the hog can fill."""
    return 128 * MIB


def saved_while_swapping(
    tmem: "Callable[..., subprocess.CompletedProcess[str]]", group: Path, directory: Path
) -> tuple[str, list[int]]:
    """Save the client again and again while a hog swaps; what that said, and pages each time."""
    command = [sys.executable, str(HOG), "--size", "44M", "--seconds", "3", "--cgroup", str(group)]
    saves: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hog:
        while hog.poll() is None:
            saved = tmem("save", str(directory / str(len(saves))))
            assert saved.returncode == 0, saved.stderr
            name, pages, _ = saved.stdout.split(maxsplit=2)
            assert name == "guest1:"
            saves.append(int(pages))
        assert hog.stdout is not None
        said = hog.stdout.read()
    assert hog.returncode == 0, said
    return said, saves


def test_a_swapping_kernel_is_saved(
    device: str,
    device_size: int,
    control_group: Callable[..., Path],
    tmem: "Callable[..., subprocess.CompletedProcess[str]]",
    segment: "_native.Segment",
    tmp_path: Path,
) -> None:
    swap.on(device, priority=32767)
    group = control_group(24 * MIB)
    said, saves = saved_while_swapping(tmem, group, tmp_path)
    figures = json.loads(said)
    assert figures["bad_pages"] == 0
    assert figures["swapped_out_pages"] > 4000
    assert len(saves) > 1
    most = max(saves)
    assert most > 2000
    swap.off(device)
    segment.client("guest1").pools()[0].flush(bytes(24), 1, device_size // PAGE_SIZE)  # room for the copy
    assert tmem("restore", str(tmp_path / str(saves.index(most))), "--as", "again").returncode == 0
    pool = segment.client("again", create=False).pools()[0]
    first = bytearray(PAGE_SIZE)
    assert pool.get(bytes(24), 0, first) == 1
    assert first.endswith(b"SWAPSPACE2")
    assert pool.statistics()["pages"] == most
    assert segment.check() == []
