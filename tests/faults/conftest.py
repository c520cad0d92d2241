"""What the tests of faults share: the seed, which is printed, and a small machine under load."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths

from .world import World


@pytest.fixture
def seed() -> str:
    """Where everything random comes from; ``TMEM_SEED`` repeats a run."""
    chosen = os.environ.get("TMEM_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"TMEM_SEED={chosen}")
    return chosen


@pytest.fixture
def paths(runtime_dir: Path) -> SegmentPaths:
    return SegmentPaths("default", runtime_dir)


@pytest.fixture
def world(paths: SegmentPaths, tmp_path: Path, seed: str, root: None) -> Iterator[World]:
    """A manager, a swap device and a mount, each with a load; everything rests."""
    made = World(paths, tmp_path, seed)
    try:
        made.open()
        yield made
    finally:
        print(made.said())
        made.close()
