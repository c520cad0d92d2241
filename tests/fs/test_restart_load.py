"""Restarts while programs work on the mount, again and again; the programs verify what they read."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import Mounter

if TYPE_CHECKING:
    from tmem.backends import _native

STORM = Path(__file__).with_name("storm.py")


@contextlib.contextmanager
def storm(directory: Path) -> Iterator[dict[str, float]]:
    """Run the storm on a directory while the block runs; what it has counted is there afterwards."""
    counts: dict[str, float] = {}
    command = [sys.executable, str(STORM), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            yield counts
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            counts.update(json.loads(output))
        finally:
            process.kill()


def one_after_the_other(mounter: Mounter, segment: "_native.Segment", options: str, restarts: int) -> None:
    # Of a mount that has stepped aside the kernel writes by itself, which is reported as a change underneath.
    place = mounter(f"step_aside=never,{options}".rstrip(","))
    with storm(place.point) as counts:
        for number in range(restarts):
            status = place.restart()
            assert (status.count, status.pid) == (number + 1, place.pid)
    assert min(counts.values()) > 0
    statistics = place.statistics()
    assert statistics.hit_pages > 0 or "cache=kernel" in options
    assert statistics.foreign_changes == 0
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
    assert segment.check() == []  # exact only while nobody puts what he has read ahead


@pytest.mark.parametrize(("options", "restarts"), [("", 8), ("cache=kernel,loop=plain", 3)])
def test_restarts_under_load(
    mounter: Mounter, segment: "_native.Segment", options: str, restarts: int
) -> None:
    one_after_the_other(mounter, segment, options, restarts)
