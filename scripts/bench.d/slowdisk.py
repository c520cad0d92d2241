"""Slow storage: an ext4 on a loop device over nbdfuse, over nbdkit with its delay and rate filters.

Each request takes DELAY longer, four are under way at a time (nbdfuse's connections), and all together get no
more than RATE_BITS a second. The image is in memory; nothing between it and the ext4 caches (the loop device
reads directly), so that only the ext4's own page cache does.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmem.bench.grounds import running, wait_until
from tmem.bench.mounts import ext4, unmount

DELAY = "5ms"
RATE_BITS = 800_000_000
"""100 MB/s."""


@dataclass(frozen=True)
class Slow:
    """A slow disk's file system, mounted."""

    device: str
    lower: Path

    def mount(self) -> None:
        """Mount it."""
        subprocess.run(["mount", "-o", "noatime", self.device, str(self.lower)], check=True)

    def remount(self) -> None:
        """Unmount it and mount it again, so that the kernel has nothing of it."""
        subprocess.run(["umount", str(self.lower)], check=True)
        self.mount()


@contextmanager
def slow_ext4(directory: Path, size: int, fill: Callable[[Path], None]) -> Iterator[Slow]:
    """Yield an ext4 of `size` bytes on such a disk, which `fill` has put files into while it was fast."""
    image, socket, shown, lower = (directory / name for name in ("image", "socket", "shown", "lower"))
    with ext4(image, lower, size) as fast:
        fill(fast)
    filters = ["--filter=delay", "--filter=rate"]
    # Without a bucket to save up in, or two seconds' worth would come at full speed after each pause.
    settings = [f"rdelay={DELAY}", f"wdelay={DELAY}", f"rate={RATE_BITS}", "burstiness=0.1"]
    server = ["nbdkit", "-f", "-U", str(socket), *filters, "file", str(image), *settings]
    with running(server):
        wait_until(socket.exists, "the slow disk")
        shown.mkdir()
        with _shown(shown, f"nbd+unix:///?socket={socket}") as file, _loop(file) as device:
            slow = Slow(device, lower)
            slow.mount()
            try:
                yield slow
            finally:
                unmount(lower)


@contextmanager
def _shown(directory: Path, uri: str) -> Iterator[Path]:
    file = directory / "nbd"
    with running(["nbdfuse", str(file), uri]):
        wait_until(file.exists, "nbdfuse")
        try:
            yield file
        finally:
            unmount(directory)


@contextmanager
def _loop(file: Path) -> Iterator[str]:
    made = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(file)],
        check=True,
        capture_output=True,
        text=True,
    )
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
