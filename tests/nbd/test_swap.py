"""The kernel swaps into tmem: a hog in a control group smaller than itself, every page verified, and
swapoff."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import AttachError
from tmem.nbd import swap

from ..groups import set_limit
from .conftest import ROOT, eventually

if TYPE_CHECKING:
    from tmem.backends import _native

HOG = ROOT / "scripts" / "hog.py"
MIB = 1 << 20


@pytest.mark.parametrize("discard", [True, False], ids=["discard", "no-discard"])
def test_a_hog_swaps(
    device: str, control_group: Callable[..., Path], segment: "_native.Segment", discard: bool
) -> None:
    swap.on(device, priority=32767, discard=discard)
    entry = swap.entry(device)
    assert entry is not None
    assert entry.priority == 32767
    group = control_group(24 * MIB)
    command = [sys.executable, str(HOG), "--size", "48M", "--seconds", "1", "--cgroup", str(group)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert figures["bad_pages"] == 0
    assert figures["swapped_out_pages"] > 4000
    assert figures["swapped_in_pages"] > 2000
    (pool,) = segment.client("guest1").pools()
    assert pool.statistics()["puts"] > 1000
    swap.off(device)
    assert not swap.is_active(device)
    assert segment.check() == []


def test_swapoff_brings_everything_back(device: str, control_group: Callable[..., Path]) -> None:
    """swapoff while the hog still has its pages there, told about the progress."""
    swap.on(device, priority=32767)
    group = control_group(24 * MIB)
    command = [sys.executable, str(HOG), "--size", "40M", "--seconds", "3600", "--cgroup", str(group)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as hog:
        try:

            def used() -> int:
                entry = swap.entry(device)
                return entry.used_bytes if entry is not None else 0

            eventually(lambda: used() > 12 * MIB, "the hog swaps")
            set_limit(group, 128 * MIB)
            left: list[int] = []
            swap.off(device, left.append)
            assert left[0] > 0
            assert left[-1] == 0
            assert hog.poll() is None
        finally:
            hog.kill()


def test_what_is_not_in_use_needs_no_swapoff(device: str) -> None:
    assert not swap.is_active(device)
    swap.off(device)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(random.Random(1).randbytes(4096))
    with pytest.raises(AttachError, match="mkswap"):
        swap.on(str(file))
    with pytest.raises(AttachError, match="is not installed"):
        swap.run_tool("no-such-tool-anywhere")


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "swaps").write_text(
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/loop0                              partition\t32764\t\t32\t\t-2\n"
        "/swap\\040file                           file\t\t1024\t\t0\t\t10\n"
    )
    assert swap.entries(tmp_path) == [
        swap.SwapEntry("/dev/loop0", 32764 << 10, 32 << 10, -2),
        swap.SwapEntry("/swap\\040file", 1 << 20, 0, 10),
    ]


def test_the_hog_sees_a_wrong_page() -> None:
    """The verifier itself: a page that changed behind its back is bad."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("hog", HOG)
    assert spec is not None
    assert spec.loader is not None
    hog = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hog)
    pages = hog.Pages(16, seed=1)
    for index in range(16):
        pages.write(index)
    assert all(pages.good(index) for index in range(16))
    pages.memory[5 * 4096 + 4095] ^= 1
    assert [index for index in range(16) if not pages.good(index)] == [5]
