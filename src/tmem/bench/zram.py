"""zram and zswap, the kernel's own: devices made for a measurement, and settings put back after it. Root."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmem.errors import TmemError
from tmem.types import PAGE_SIZE

TABLE_BYTES = 16
"""What zram keeps for a page, used or not, outside `mem_used_total`: a handle, and flags with a time."""

_CONTROL = Path("/sys/class/zram-control")
_ZSWAP = Path("/sys/module/zswap/parameters")


def lacks(algorithm: str) -> str | None:
    """Return why there can be no zram with `algorithm`, None if there can."""
    if not _CONTROL.exists():
        return "this kernel has no zram, or has not loaded it: modprobe zram"
    if os.geteuid() != 0:
        return "zram needs root: run this as root"
    known = sorted(Path("/sys/block").glob("zram*/comp_algorithm"))
    if known and algorithm not in known[0].read_text().replace("[", "").replace("]", "").split():
        return f"the kernel's zram has no {algorithm}: boot a kernel that was built with it"
    return None


@contextmanager
def device(algorithm: str, size_bytes: int) -> Iterator[tuple[Path, Path]]:
    """Make a zram device; yield its directory in /sys and its node. It must not be in use afterwards."""
    if (reason := lacks(algorithm)) is not None:
        raise TmemError(reason)
    number = int((_CONTROL / "hot_add").read_text())
    directory, node = Path(f"/sys/block/zram{number}"), Path(f"/dev/zram{number}")
    made = False
    try:
        (directory / "comp_algorithm").write_text(algorithm)
        (directory / "disksize").write_text(str(size_bytes))
        if not node.exists():  # no devtmpfs
            major, minor = map(int, (directory / "dev").read_text().split(":"))
            os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(major, minor))
            made = True
        yield directory, node
    finally:
        (directory / "reset").write_text("1")
        (_CONTROL / "hot_remove").write_text(str(number))
        if made:
            node.unlink(missing_ok=True)


def used_bytes(directory: Path) -> int:
    """Return the memory that a device takes, its table included."""
    npages = int((directory / "disksize").read_text()) // PAGE_SIZE
    return int((directory / "mm_stat").read_text().split()[2]) + npages * TABLE_BYTES


def zswap_lacks() -> str | None:
    """Return why zswap cannot be used, None if it can."""
    if not (_ZSWAP / "enabled").exists():
        return "this kernel has no zswap: boot one that was built with CONFIG_ZSWAP"
    return None if os.geteuid() == 0 else "zswap needs root: run this as root"


def zswap_compressor() -> str:
    """Return what zswap compresses with on this machine."""
    return (_ZSWAP / "compressor").read_text().strip()


@contextmanager
def zswap(enabled: bool) -> Iterator[None]:
    """Have zswap on or off for all of the machine's swap in the block, and as it was afterwards.

    Nothing is lost either way: what it holds it keeps until it is asked for.
    """
    switch = _ZSWAP / "enabled"
    before = switch.read_text().strip() if switch.exists() else ""
    wanted = "Y" if enabled else "N"
    if before in ("", wanted):
        yield
        return
    switch.write_text(wanted)
    try:
        yield
    finally:
        switch.write_text(before)


def zswap_bytes() -> int:
    """Return the memory that zswap holds now."""
    return _number("meminfo", "Zswap:") << 10


def zswap_stores() -> int:
    """Return how many pages zswap has taken since the machine was started."""
    return _number("vmstat", "zswpout")


def _number(file: str, name: str) -> int:
    """Return the number after `name` in a file of /proc; 0 where it is not there."""
    for text in Path("/proc", file).read_text(encoding="ascii").splitlines():
        if text.startswith(f"{name} "):
            return int(text.split()[1])
    return 0
