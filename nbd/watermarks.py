"""The kernel's watermarks of free memory: how much it keeps free for whoever may not wait.

A server under SCHED_RR may take from what is below the minimum, so with it and enough kept free local swap
gets by without containment. `watermark_boost_factor` raises the minimum for a while whenever pages of
different kinds mix, and every hang that was looked into had it raised; so it goes to 0. What was there before
is noted in the run-time directory, and ends with a reboot as the settings do. Needs root. Plain functions.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tmem.backends import meminfo
from tmem.backends.paths import runtime_dir
from tmem.errors import TmemError
from tmem.types import format_size

_SHARE = 20
_LEAST_KB = 16 << 10
# The kernel begins to reclaim at one and a half times the minimum; what is running needs something beside it.
_MARGIN_BYTES = 16 << 20

FREE, BOOST = "min_free_kbytes", "watermark_boost_factor"


def wanted_free_kb(proc: Path = Path("/proc")) -> int:
    """Return what min_free_kbytes must at least be: a twentieth of RAM, no less than 16 MiB."""
    return max(meminfo.read(proc).total_bytes // _SHARE >> 10, _LEAST_KB)


def current(proc: Path = Path("/proc")) -> dict[str, int]:
    """Return the two settings; -1 for one that this kernel does not have."""
    return {name: _number(proc / "sys/vm" / name) for name in (FREE, BOOST)}


def wanted(proc: Path = Path("/proc")) -> dict[str, int]:
    """Return the settings that have to change, with their new values. Nothing is ever lowered but the boost.

    Raises `TmemError` if the machine has not so much to spare.
    """
    now = current(proc)
    changes = {}
    free_kb = wanted_free_kb(proc)
    if 0 <= now[FREE] < free_kb:
        need = ((free_kb - now[FREE]) << 10) * 3 // 2 + _MARGIN_BYTES
        there = meminfo.read(proc).available_bytes
        if there < need:
            raise TmemError(
                f"keeping {format_size(free_kb << 10)} free needs {format_size(need)}, and only "
                f"{format_size(there)} are available: end something, or use 'tmem contain' instead"
            )
        changes[FREE] = free_kb
    if now[BOOST] > 0:
        changes[BOOST] = 0
    return changes


def apply(changes: Mapping[str, int], directory: Path | None = None, proc: Path = Path("/proc")) -> None:
    """Set `changes` and note what was there before, unless an earlier time noted it. Raises `TmemError`."""
    path = record_path(directory)
    try:
        path.write_text(json.dumps(current(proc) | noted(directory)) + "\n", encoding="utf-8")
    except OSError as error:
        raise TmemError(f"{path} cannot be written ({error.strerror}): run this as root") from None
    _write(changes, proc)


def undo(directory: Path | None = None, proc: Path = Path("/proc")) -> dict[str, int]:
    """Set what was there before `apply` and return it; empty if nothing was noted. Raises `TmemError`."""
    before = noted(directory)
    _write(before, proc)
    record_path(directory).unlink(missing_ok=True)
    return before


def noted(directory: Path | None = None) -> dict[str, int]:
    """Return the settings that `undo` would set."""
    try:
        found = json.loads(record_path(directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in (FREE, BOOST) if found.get(name, -1) >= 0}


def record_path(directory: Path | None = None) -> Path:
    """Return where the former settings are noted; no segment can have its name."""
    return (directory or runtime_dir()) / ".watermarks.json"


def _write(values: Mapping[str, int], proc: Path) -> None:
    for name, value in values.items():
        try:
            (proc / "sys/vm" / name).write_text(f"{value}\n", encoding="ascii")
        except OSError as error:
            raise TmemError(
                f"vm.{name} cannot be set ({error.strerror}): run this as root, and not in a container"
            ) from None


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return -1
