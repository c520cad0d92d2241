"""From an NBD export to a block device of this machine, and back.

By the kernel's nbd driver where there is one. Elsewhere nbdfuse shows the export as a file in a private
directory and a loop device makes a block device of it. What exists is noted in the export's record before and
after each step, so that `detach` in a later process finds all of it, also after a failure half-way.

nbdfuse 1.14 does not reconnect: when the server dies, its device fails every request from then on, and
whatever was swapped to it is out of reach until detached, although the pool still has it. The kernel's driver
parks requests instead. Single-threaded but for the warming reads; needs root.
"""

import contextlib
import mmap
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tmem.backends import guarded, processes, procfiles
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import AttachError
from tmem.nbd import handshake, swap
from tmem.nbd.export import Attachment, Export
from tmem.nbd.netlink import NbdControl

TIMEOUT_S = 60.0
_WARM_BYTES = 128 << 10
_WARM_THREADS = 16
_IO_TIMEOUT_MS = 500
"""Requests that were under way when a server died are sent again at this tick (the default is 30 s).

In emulated guests, the other server there: at 2,000 ms seven of 14 waits took 2 to 3.1 s, two took 6 s; at
500 ms five took 0.05 to 2.5 s. Slow requests cost a line in the kernel's log each time.
"""


def kernel_driver() -> bool:
    """Return whether this kernel has the nbd driver, loading it if it is a module."""
    if not _has_driver():
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["modprobe", "-q", "nbd"], check=False, capture_output=True)
    return _has_driver()


def attach(paths: SegmentPaths, export: Export) -> Export:
    """Attach `export`, whose server answers, and return it as attached; its record is written.

    An export that is attached already is returned as it is. Raises `AttachError`; what was made until then
    stays in the record for `detach`.
    """
    found = export.attachment
    if found is not None and found.device is not None and (found.process is None or found.process.alive):
        return export
    if export.tls_psk is not None:
        raise AttachError("TLS and local swap do not mix: attach an export without --tls-psk")
    if os.geteuid() != 0:
        raise AttachError("attaching a block device needs root: run this as root, or leave --attach out")
    export = detach(paths, export)
    return _attach_kernel(paths, export) if kernel_driver() else _attach_nbdfuse(paths, export)


def detach(paths: SegmentPaths, export: Export) -> Export:
    """Take down what `attach` made and return the export as detached; its record is written.

    Safe to repeat. Raises `AttachError` while the device is in use.
    """
    attachment = export.attachment
    if attachment is None:
        return export
    if attachment.device is not None and swap.is_active(attachment.device):
        raise AttachError(f"{attachment.device} is in use as swap: swapoff {attachment.device} first")
    if attachment.kind == "nbd":
        _detach_kernel(attachment)
    else:
        _detach_nbdfuse(attachment)
    export = export.replace_attachment(None)
    export.save(paths)
    return export


def log_path(paths: SegmentPaths, client: str) -> Path:
    """Return the file that takes what nbdfuse says."""
    return paths.state / f"swap-{client}.nbdfuse.log"


def _has_driver() -> bool:
    return Path("/sys/module/nbd").exists() or Path("/sys/block/nbd0").exists()


def _attach_kernel(paths: SegmentPaths, export: Export) -> Export:
    connection, info = handshake.connect(export)
    with connection, NbdControl() as control:
        handshake.warm(connection, info)
        index = control.connect(connection, info.size_bytes, info.flags)
    export = export.replace_attachment(Attachment("nbd", device=f"/dev/nbd{index}"))
    export.save(paths)
    with contextlib.suppress(OSError):
        Path(f"/sys/block/nbd{index}/queue/io_timeout").write_text(str(_IO_TIMEOUT_MS), encoding="ascii")
    return export


def _detach_kernel(attachment: Attachment) -> None:
    if attachment.device is None:
        return
    name = Path(attachment.device).name
    connected = Path(f"/sys/block/{name}/pid")
    if connected.exists():
        with NbdControl() as control:
            control.disconnect(int(name.removeprefix("nbd")))
    if not _poll(lambda: not connected.exists()):
        raise AttachError(f"{attachment.device} does not disconnect: close what uses it, then try again")


def _attach_nbdfuse(paths: SegmentPaths, export: Export) -> Export:
    directory = paths.state / f"swap-{export.client}.mnt"
    directory.mkdir(mode=0o700, exist_ok=True)
    log = log_path(paths, export.client)
    log.unlink(missing_ok=True)
    attachment = Attachment("nbdfuse", mount_dir=str(directory))
    export = export.replace_attachment(attachment)
    export.save(paths)
    file = _file(attachment)
    # One connection: its workers already serve requests side by side, and more only cost locked stacks
    # (hog of 192 MB in 64 MB: 10,100 touches/s against 8,900 with nbdfuse's own default of four).
    argv = guarded.command(["nbdfuse", "-C", "1", str(file), export.uri], export.realtime)
    pid = processes.spawn(argv, os.environ, log)
    process = Process.of(pid)
    export = export.replace_attachment(Attachment("nbdfuse", mount_dir=str(directory), process=process))
    export.save(paths)

    def settled() -> bool:
        return file.exists() or process is None or not process.alive

    if not _poll(settled) or not file.exists():
        processes.reap(pid)
        reason = processes.last_line(log) or "nbdfuse does not mount"
        raise AttachError(f"the export cannot be attached ({reason}): is nbdfuse (libnbd-bin) installed?")
    device = swap.run_tool(
        "losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(file)
    )
    export = export.replace_attachment(Attachment("nbdfuse", device, str(directory), process))
    export.save(paths)
    _warm(device, export.size_bytes)
    return export


def _detach_nbdfuse(attachment: Attachment) -> None:
    # Not only the recorded device: whoever was killed between losetup and the record left one, too.
    for name in _loops(attachment):
        swap.run_tool("losetup", "--detach", f"/dev/{name}")
    if not _poll(lambda: not _loops(attachment)):
        raise AttachError(f"{attachment.device} does not detach: close what uses it, then try again")
    directory = Path(attachment.mount_dir or "")
    if attachment.mount_dir is not None and _mounted(directory):
        swap.run_tool("umount", str(directory))
    process = attachment.process
    if process is not None:
        if not _poll(lambda: not process.alive):
            raise AttachError(f"nbdfuse (process {process.pid}) does not end: see what holds {directory}")
        processes.reap(process.pid)
    if attachment.mount_dir is not None:
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()


def _file(attachment: Attachment) -> Path:
    return Path(attachment.mount_dir or "") / "disk"


def _loops(attachment: Attachment) -> list[str]:
    """Return the names of the loop devices on the file of nbdfuse."""
    wanted = str(_file(attachment))
    names = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.fsdecode(backing.read_bytes()).rstrip("\n") == wanted:
                names.append(backing.parents[1].name)
    return names


def _mounted(directory: Path) -> bool:
    """Return whether something is mounted there; unlike stat this does not ask a FUSE daemon that is gone."""
    return any(line.split(" ")[4] == str(directory) for line in procfiles.lines(procfiles.MOUNTS))


def _warm(device: str, size_bytes: int) -> None:
    """Read 128 KiB from many threads at once, so that every worker on the way has its stack and buffers."""
    length = min(_WARM_BYTES, size_bytes)

    def read(_: int) -> None:
        with mmap.mmap(-1, _WARM_BYTES) as buffer, memoryview(buffer)[:length] as part:
            os.preadv(descriptor, [part], 0)

    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(_WARM_THREADS) as pool:
            list(pool.map(read, range(8 * _WARM_THREADS)))
    except OSError as error:
        raise AttachError(f"{device} cannot be read ({error.strerror}): see the server's log") from None
    finally:
        os.close(descriptor)


def _poll(condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds, up to TIMEOUT_S; whether it does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
