"""Mounts whose requests come over io_uring, where that can be."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from tmem.bench.mounts import rings_permitted
from tmem.fs.uring import SWITCH

BY_RINGS = "loop=native,io_uring=on"
"""The options of such a mount, to be made while it is `permitted`."""


@contextlib.contextmanager
def permitted(options: str) -> Iterator[None]:
    """Have the kernel's switch on within this block if a mount with these options needs it, or skip."""
    if "io_uring=on" not in options:
        yield
        return
    if not SWITCH.exists():
        pytest.skip("needs Linux 6.14 with CONFIG_FUSE_IO_URING")
    if os.geteuid() != 0:
        pytest.skip("needs root: switches FUSE over io_uring on")
    with rings_permitted():
        yield
