"""Whether a mount's requests can come over io_uring (`-o io_uring=on`), and what to do where they cannot.

The rings themselves are native (backends/native/reader_rings.h); `device` asks the kernel for them in the
answer to INIT. Not for the daemon alone: who mounts looks here first, since a daemon has no terminal to say
it on. Threading: plain functions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmem.backends._native import Rings

SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
"""The kernel's switch, of the whole machine: what FUSE connections made from then on may have."""


def lacking(switch: Path = SWITCH) -> str:
    """Return why no mount can have them, and the remedy, on one line; empty if they can."""
    try:
        state = switch.read_text().strip()
    except OSError:
        return "this kernel has no FUSE over io_uring: use Linux 6.14 or newer with CONFIG_FUSE_IO_URING"
    return "" if state == "Y" else f"FUSE over io_uring is switched off on this machine: echo 1 > {switch}"


def make(payload_bytes: int) -> "Rings | str":
    """Return rings for requests of at most so many bytes, or why there are none."""
    from tmem.backends import _native

    try:
        return _native.Rings(payload_bytes)
    except OSError as error:
        return f"io_uring cannot be used ({error.strerror}): see sysctl kernel.io_uring_disabled"
