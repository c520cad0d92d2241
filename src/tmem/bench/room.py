"""Whether there is enough memory and disk to measure, before anything is begun. Any thread."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tmem.backends import pressure
from tmem.bench.grounds import DISK, SHARED_MEMORY
from tmem.bench.parts import Plan
from tmem.errors import TmemError
from tmem.types import format_size

_SPARE_BYTES = 256 << 20
_SPARE_SHARE = 1 / 16
"""What is left to everybody else: so much of the memory, at least."""


def check(plans: Iterable[Plan], available_bytes: int | None = None, disk: Path = DISK) -> None:
    """Raise `TmemError` unless the parts, one after the other, have the memory and disk that they need."""
    plans = list(plans)
    memory = max((plan.memory_bytes for plan in plans), default=0)
    on_disk = max((plan.disk_bytes for plan in plans), default=0)
    available = _available() if available_bytes is None else available_bytes
    if memory > available:
        raise TmemError(
            f"this needs {format_size(memory)} of memory and {format_size(max(available, 0))} can be spared: "
            "end something, or try --quick, or --only with a smaller part"
        )
    free = shutil.disk_usage(disk).free
    if on_disk > free * 9 // 10:
        raise TmemError(
            f"this needs {format_size(on_disk)} in {disk} and {format_size(free)} are free there: "
            "make room, or try --quick, or --only with another part"
        )
    for place in (SHARED_MEMORY, disk):
        if not os.access(place, os.W_OK):
            raise TmemError(
                f"{place} is not writable, and files must be made there: run this as another user"
            )


def _available() -> int:
    """Return what may be taken: of the machine, and of every control group that limits us."""
    return int(
        min(
            room.available_bytes - max(_SPARE_BYTES, room.total_bytes * _SPARE_SHARE)
            for room in pressure.rooms()
        )
    )
