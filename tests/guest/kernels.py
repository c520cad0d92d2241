"""Debian's kernels for guests, unpacked into the cache without being installed, and an initrd for each.

Of a series such as "6.1" the newest cloud kernel that apt knows is taken, the signed package if there is one.
Modules are resolved with modules.dep, so nothing here knows what depends on what.
"""

import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .cache import GuestError

SERIES = ("6.1", "6.12")
"""The kernels of Debian 12, and of its backports as they are in the security archive."""

MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng", "virtio_balloon"),
    *("ext4", "overlay", "fuse", "nbd", "loop", "lz4", "zram", "brd"),
)
"""What every guest loads, in this order; what is built in counts as loaded."""

PARAMETERS = {"nbd": "nbds_max=4", "zram": "num_devices=1", "brd": "rd_nr=0"}

_INIT = Path(__file__).with_name("init.sh")
_BUSYBOX = Path("/bin/busybox")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its series ("6.1"), its release (as uname -r says it), and where it lies."""

    series: str
    release: str
    root: Path

    @property
    def image(self) -> Path:
        """The bzImage."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """The directory with modules.dep."""
        return self.root / "lib" / "modules" / self.release

    def load_order(self, names: tuple[str, ...] = MODULES) -> list[Path]:
        """Return the files of the modules `names` and of what they need, in the order to load them in.

        What is built in has no file. Raises `GuestError` for a module that this kernel does not have.
        """
        needs: dict[str, list[str]] = {}
        for line in (self.modules / "modules.dep").read_text(encoding="ascii").splitlines():
            file, _, rest = line.partition(":")
            needs[file] = rest.split()
        by_name = {_module_name(file): file for file in needs}
        built_in = (self.modules / "modules.builtin").read_text(encoding="ascii").splitlines()
        ordered: list[str] = []
        for name in names:
            if name in map(_module_name, built_in):
                continue
            if name not in by_name:
                raise GuestError(f"kernel {self.release} has no module {name}")
            file = by_name[name]
            # What a line needs is listed so that the last is to be loaded first.
            ordered += [needed for needed in (*reversed(needs[file]), file) if needed not in ordered]
        return [self.modules / file for file in ordered]


@functools.cache
def fetch(series: str) -> Kernel:
    """Return the kernel of `series`, fetched on first use; `GuestError` if apt has none."""
    unpacked = cache.made(f"kernel_{series}", lambda to: _unpack(series, to))
    release = next((unpacked / "lib" / "modules").iterdir()).name
    return Kernel(series, release, unpacked)


def initrd(kernel: Kernel) -> Path:
    """Return an initrd that loads the modules, mounts the root and becomes the nursery of the tool."""
    if not _BUSYBOX.exists():
        raise GuestError("busybox is missing: apt-get install busybox-static")
    key = hashlib.sha256(_INIT.read_bytes() + repr((MODULES, PARAMETERS)).encode()).hexdigest()[:16]
    return cache.made(f"initrd-{kernel.release}-{key}", lambda to: _make_initrd(kernel, to))


def packages(series: str, names: list[str]) -> list[str]:
    """Return the cloud kernels of `series` among package `names`, best first: newest, then signed."""
    pattern = re.compile(rf"linux-image-{re.escape(series)}\.(\d[^-]*(?:-\d+)?)-cloud-amd64(-unsigned)?")
    matches = [match for name in names if (match := pattern.fullmatch(name))]

    def rank(match: re.Match[str]) -> tuple[list[int], bool]:
        return [int(number) for number in re.findall(r"\d+", match[1])], match[2] is None

    return [match[0] for match in sorted(matches, key=rank, reverse=True)]


def _unpack(series: str, to: Path) -> None:
    to.mkdir()
    package = _download(series, to)
    if package is None and os.geteuid() == 0:
        cache.run("apt-get", "-qq", "update", check=False)  # lists that are missing, or of last month
        package = _download(series, to)
    if package is None:
        raise GuestError(f"apt has no linux-image-{series}*-cloud-amd64: apt-get update, or another kernel")
    cache.run("dpkg-deb", "-x", package, to)
    package.unlink()
    release = next((to / "lib" / "modules").iterdir()).name
    cache.run("depmod", "-b", to, release)


def _download(series: str, to: Path) -> Path | None:
    """Fetch the best package of the series that can be had."""
    for name in packages(series, cache.run("apt-cache", "pkgnames", f"linux-image-{series}.").split()):
        cache.run("apt-get", "download", name, cwd=to, check=False)
        if (found := next(to.glob("*.deb"), None)) is not None:
            return found
    return None


def _make_initrd(kernel: Kernel, to: Path) -> None:
    stage = to.with_suffix(".d")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        for folder in ("bin", "dev", "proc", "sys", "root", "modules"):
            (stage / folder).mkdir(parents=True)
        shutil.copy2(_BUSYBOX, stage / "bin" / "busybox")
        shutil.copy2(_INIT, stage / "init")
        (stage / "init").chmod(0o755)
        lines = []
        for path in kernel.load_order():
            data = path.read_bytes()
            name = _module_name(path.name)
            (stage / "modules" / f"{name}.ko").write_bytes(
                lzma.decompress(data) if path.suffix == ".xz" else data
            )
            lines.append(f"{name} {PARAMETERS.get(name, '')}".rstrip() + "\n")
        (stage / "modules" / "list").write_text("".join(lines), encoding="ascii")
        # Not compressed: unpacking would cost an emulated CPU more than reading it.
        script = f"find . | {_BUSYBOX} cpio -o -H newc 2>/dev/null"
        with to.open("wb") as file:
            file.write(_bytes_of(script, stage))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _bytes_of(script: str, cwd: Path) -> bytes:
    return subprocess.run(["sh", "-c", script], cwd=cwd, check=True, capture_output=True).stdout


def _module_name(file: str) -> str:
    """Return a module's name as modprobe knows it: no folder, no suffix, underscores."""
    return Path(file).name.partition(".ko")[0].replace("-", "_")
