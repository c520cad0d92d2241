"""A program whose memory does not fit into its control group, and what is on the device that it swaps to."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.nbd import swap

from ..groups import reclaim
from .conftest import ROOT

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
STRAY_BYTES = 4 * MIB
STRAY_PAGES = STRAY_BYTES // 4096
"""An emptied device has one page, its header; swap is the machine's, so others may use it meanwhile. The
hog's pages are three times as many at least."""
HOG_BYTES, SMALL_GROUP_BYTES, LARGE_GROUP_BYTES = 40 * MIB, 24 * MIB, 128 * MIB

# Fills its memory, and then says how many pages are wrong whenever it is asked.
HOG = """
import importlib.util, sys
from pathlib import Path
file, size, group = sys.argv[1:]
spec = importlib.util.spec_from_file_location("hog", file)
hog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hog)
(Path(group) / "cgroup.procs").write_text("0")
pages = hog.Pages(int(size) // 4096, 1)
for index in range(pages.npages):
    pages.write(index)
print("filled", flush=True)
for _ in sys.stdin:
    print(sum(not pages.good(index) for index in range(pages.npages)), flush=True)
"""


class Hog:
    """A process whose memory does not fit into its control group."""

    def __init__(self, process: "subprocess.Popen[str]", group: Path) -> None:
        self.process = process
        self.group = group

    def bad_pages(self) -> int:
        """Let it look at every page; how many are wrong."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def filled(group: Path, size_bytes: int) -> Iterator[Hog]:
    """A hog of so many bytes, all written, in that control group."""
    argv = [sys.executable, "-c", HOG, str(ROOT / "scripts" / "hog.py"), str(size_bytes), str(group)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "filled\n"
            yield Hog(process, group)
        finally:
            process.kill()


def used_bytes(device: str) -> int:
    entry = swap.entry(device)
    assert entry is not None, "not in use as swap"
    return entry.used_bytes


def pages(segment: "_native.Segment") -> int:
    """Pages in the device's pool; an empty device has one, the swap header."""
    (pool,) = segment.client("local", create=False).pools()
    return pool.statistics()["pages"]


def is_freed(device: str, hog: Hog) -> bool:
    """Say whether the kernel has freed the slots of a hog that has ended.

    It is made to look: what was on its way to the device when its owner died stays there until then.
    """
    reclaim(hog.group)
    return used_bytes(device) < STRAY_BYTES
