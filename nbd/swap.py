"""Use a block device as swap: mkswap, swapon, swapoff with progress, and what /proc/swaps says.

Thin over util-linux and /proc; knows nothing of NBD. Any thread; needs root but for `entries`.
"""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles
from tmem.errors import AttachError

_PROGRESS_INTERVAL_S = 0.1
_ELSEWHERE_S = 20.0
"""How long somebody else's swapoff may bring nothing back before it is not waited for any longer."""


@dataclass(frozen=True)
class SwapEntry:
    """A line of /proc/swaps; sizes in bytes."""

    device: str
    size_bytes: int
    used_bytes: int
    priority: int


def entries(proc: Path = Path("/proc")) -> list[SwapEntry]:
    """Return the swap areas in use."""
    found = []
    for line in procfiles.lines(proc / "swaps")[1:]:
        device, _kind, size_kb, used_kb, priority = line.rsplit(maxsplit=4)
        found.append(SwapEntry(device, int(size_kb) << 10, int(used_kb) << 10, int(priority)))
    return found


def entry(device: str) -> SwapEntry | None:
    """Return the entry of `device`, None if it is not in use as swap."""
    return next((found for found in entries() if found.device == device), None)


def is_active(device: str) -> bool:
    """Return whether `device` is in use as swap."""
    return entry(device) is not None


def takes_discards(device: str) -> bool:
    """Return whether the block device accepts discards."""
    limit = Path("/sys/block", Path(device).name, "queue/discard_max_bytes")
    return limit.exists() and int(limit.read_text(encoding="ascii")) > 0


def on(device: str, priority: int | None = None, discard: bool = True, header: bool = True) -> None:
    """Use `device`, unless it is in use already, after writing a swap header on it unless told not to.

    With `discard` the kernel says which pages it has freed, where the device takes that. AttachError.
    """
    if is_active(device):
        return
    if header:
        run_tool("mkswap", device)
    options = [] if priority is None else ["--priority", str(priority)]
    if discard and takes_discards(device):
        options.append("--discard=pages")
    run_tool("swapon", *options, device)


def off(device: str, progress: Callable[[int], None] = lambda left_bytes: None) -> None:
    """Bring back everything from `device` and stop using it; nothing if it is not in use.

    `progress` is called now and then with the bytes left. Raises `AttachError` if the kernel refuses, mostly
    for want of memory: then the device stays in use, and nothing is lost.
    """
    complaint = os.strerror(errno.EINTR)
    while (
        os.strerror(errno.EINTR) in complaint
    ):  # it was stopped by a terminal or a debugger, and has gone on
        if not is_active(device):
            return
        complaint = _run_swapoff(device, progress)
    if complaint and _ends_elsewhere(device, complaint, progress):
        return
    if complaint:
        raise AttachError(f"{complaint}: free some memory, then try again")
    progress(0)


def _run_swapoff(device: str, progress: Callable[[int], None]) -> str:
    """Call swapoff(8) once; return what it complains of, nothing if it has done it."""
    untranslated = {**os.environ, "LC_ALL": "C"}
    # If we are killed outright it ends, too, and leaves the device in use: nobody would use it again.
    tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    with subprocess.Popen(
        [*tied, "swapoff", device], stderr=subprocess.PIPE, text=True, env=untranslated
    ) as process:
        assert process.stderr is not None
        try:
            while process.poll() is None:
                if (now := entry(device)) is not None:
                    progress(now.used_bytes)
                time.sleep(_PROGRESS_INTERVAL_S)
        except BaseException:
            process.terminate()  # swapoff(2) gives up at a signal and leaves the device in use
            raise
        complaint = _last_line(process.stderr.read())
    return "" if process.returncode == 0 else complaint or "swapoff failed"


def _ends_elsewhere(device: str, complaint: str, progress: Callable[[int], None]) -> bool:
    """Say whether somebody else (systemd, at shutdown) was swapping it off already, and is done."""
    if os.strerror(errno.EINVAL) not in complaint:
        return False
    used = -1
    quiet_since = time.monotonic()
    while (now := entry(device)) is not None and time.monotonic() < quiet_since + _ELSEWHERE_S:
        if now.used_bytes != used:
            used, quiet_since = now.used_bytes, time.monotonic()
            progress(used)
        time.sleep(_PROGRESS_INTERVAL_S)
    return now is None


def run_tool(*argv: str) -> str:
    """Run a tool and return what it prints; AttachError with its last complaint if it fails."""
    try:
        result = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise AttachError(f"{argv[0]} is not installed: apt-get install util-linux mount") from None
    if result.returncode != 0:
        complaint = _last_line(result.stderr) or f"{argv[0]} failed with status {result.returncode}"
        raise AttachError(f"{complaint}: run '{' '.join(argv)}' to see more")
    return result.stdout.strip()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
