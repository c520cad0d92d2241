"""A guest whose process 1 is systemd: the usual image, with systemd's own files and some units laid over it.

The layer is a second disk; an /init of its own in a second initrd (the kernel unpacks both, the later one
wins) puts an overlay of the two together and becomes systemd. The agent is a service in it, so the tests talk
to such a guest as to any other. Not for what is tested in it.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from . import cache, image
from .machine import Guest, Machine, Options

PACKAGES = ("systemd", "libsystemd-shared", "libsystemd0", "libudev1")
"""Taken from this machine. udev is usually not installed where tests run, so it is fetched."""

LAYER_BYTES = 64 << 20
"""Free space of the layer: what the guest writes, outside of its scratch directories, lands there."""

_LEFT_OUT = (
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/locale",
    "/usr/share/bash-completion",
    "/etc/init.d",
)
_MASKED = (
    *(
        "serial-getty@ttyS0.service",
        "getty@tty1.service",
        "systemd-logind.service",
        "systemd-update-utmp.service",
    ),
    *("systemd-random-seed.service", "systemd-pstore.service", "systemd-hwdb-update.service", "dbus.socket"),
    *("systemd-update-utmp-runlevel.service", "systemd-journal-flush.service", "systemd-sysusers.service"),
)
_AGENT = """\
[Unit]
Description=The tests' agent
DefaultDependencies=no
After=systemd-remount-fs.service

[Service]
ExecStart=/usr/lib/guest/tool init
OOMScoreAdjust=-1000
KillMode=none
Delegate=yes

[Install]
WantedBy=sysinit.target
"""
_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module parameters; do
    $b insmod "/modules/$module.ko" $parameters
done </modules/list
$b mkdir -p /base /layer
$b mount -t ext4 -o ro,noatime /dev/vda /base
$b mount -t ext4 -o rw,noatime /dev/vdb /layer
$b mount -t overlay -o lowerdir=/layer/root:/base,upperdir=/layer/upper,workdir=/layer/work overlay /root
for directory in proc sys dev; do
    $b mount --move /$directory /root/$directory
done
exec $b switch_root /root /lib/systemd/systemd
"""


class SystemdGuest(Guest):
    """A guest with systemd; `files` are laid over its root, names absolute, and may be units, links included.

    A value that begins with ``->`` is the target of a symbolic link.
    """

    def __init__(
        self,
        name: str,
        options: Options | None = None,
        log: Path | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, options, log)
        self._files = dict(files or {})

    def command(self) -> list[str]:
        """Return the command line of QEMU, with the other initrd and the layer as second disk."""
        argv = super().command()
        at = argv.index("-initrd") + 1
        argv[at] = str(_initrd(Path(argv[at])))
        at = argv.index("-append") + 1
        argv[at] += (
            " systemd.show_status=1 systemd.unit=multi-user.target systemd.journald.forward_to_console=0"
        )
        drive = f"file={_layer(self._files)},format=raw,snapshot=on,if=none,id=layer"
        # Before the other disks, which are vdc and so on then.
        at = argv.index("virtio-blk-pci,drive=disk0") + 1
        argv[at:at] = ["-drive", drive, "-device", "virtio-blk-pci,drive=layer"]
        return argv

    def wait_booted(self, timeout_s: float = 240) -> Self:
        """Wait until commands can be run; the boot may still go on."""
        return super().wait_booted(timeout_s)

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until the machine has switched itself off; whether it has."""
        return Machine._poll(lambda: not self.alive, timeout_s)


def _initrd(base: Path) -> Path:
    key = hashlib.sha256(_INIT.encode() + base.name.encode()).hexdigest()[:16]

    def make(to: Path) -> None:
        stage = to.with_suffix(".d")
        stage.mkdir()
        try:
            (stage / "init").write_text(_INIT, encoding="ascii")
            (stage / "init").chmod(0o755)
            packed = subprocess.run(
                ["sh", "-c", "echo init | busybox cpio -o -H newc 2>/dev/null"],
                cwd=stage,
                check=True,
                capture_output=True,
            ).stdout
            to.write_bytes(base.read_bytes() + packed)
        finally:
            shutil.rmtree(stage)

    return cache.made(f"systemdrd-{key}", make)


def _layer(files: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(sorted(files.items())).encode())
    for path in sorted((image.PROJECT / "src" / "tmem" / "units").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(cache.run("dpkg-query", "-W", "-f", "${Package} ${Version}\n", *PACKAGES).encode())
    return cache.made(f"systemd-{digest.hexdigest()[:16]}", lambda to: _make_layer(to, files))


def _make_layer(to: Path, files: Mapping[str, str]) -> None:
    top = to.with_suffix(".d")
    stage = top / "root"
    try:
        for folder in ("root/usr/lib", "root/etc/systemd/system", "upper", "work"):
            (top / folder).mkdir(parents=True)
        for line in cache.run("dpkg", "-L", *PACKAGES).splitlines():
            if line.startswith("/") and not line.startswith(_LEFT_OUT):
                image._copy(Path(line), stage)
        udev = _udev()
        for path in udev.rglob("*"):
            relative = path.relative_to(udev)
            if relative.parts[0] == "lib":
                relative = Path("usr") / relative
            if (path.is_file() or path.is_symlink()) and not f"/{relative}".startswith(_LEFT_OUT):
                target = stage / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target, follow_symlinks=False)
        image._libraries(stage)
        units = stage / "etc" / "systemd" / "system"
        for name in _MASKED:
            (units / name).symlink_to("/dev/null")
        texts = {
            "/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
            "/etc/hostname": "guest\n",
            "/etc/systemd/system/guest-agent.service": _AGENT,
            "/etc/systemd/system/sysinit.target.wants/guest-agent.service": "->../guest-agent.service",
            "/etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n",
            **files,
        }
        package = "usr/local/lib/python3.11/dist-packages/tmem/units"
        shutil.copytree(image.PROJECT / "src" / "tmem" / "units", stage / package)
        for name, text in texts.items():
            path = stage / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("->"):
                path.symlink_to(text.removeprefix("->"))
            else:
                path.write_text(text, encoding="utf-8")
        used = sum(path.lstat().st_size + 4096 for path in top.rglob("*"))
        size_mib = (used + used // 8 + LAYER_BYTES >> 20) + 1
        cache.run(
            *("mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0"), "-d", top, to, f"{size_mib}M"
        )
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _udev() -> Path:
    """Return the files of the package udev."""

    def make(to: Path) -> None:
        to.mkdir()
        cache.run("apt-get", "download", "udev", cwd=to)
        (deb,) = to.glob("*.deb")
        cache.run("dpkg-deb", "-x", deb, to)
        deb.unlink()

    return cache.made("udev", make)
