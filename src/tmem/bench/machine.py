"""Where figures come from: the machine, the versions of what was measured, how busy it was."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from tmem.backends import meminfo

_PROGRAMS = {
    "nbdkit": ("nbdkit", "--version"),
    "nbdfuse": ("nbdfuse", "--version"),
    "fio": ("fio", "--version"),
    "bindfs": ("bindfs", "--version"),
    "mergerfs": ("mergerfs", "--version"),
}


def machine() -> dict[str, object]:
    """Return it, for JSON."""
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        system = "unknown"
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": meminfo.read().total_bytes,
        "system": system,
        "kernel": os.uname().release,
        "architecture": platform.machine(),
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": {
            "tmem": version("tmem"),
            "python": platform.python_version(),
            **{name: found for name, argv in _PROGRAMS.items() if (found := _version(argv))},
        },
    }


def line(found: dict[str, object]) -> str:
    """Return it as one line for people."""
    memory = found["memory_bytes"]
    assert isinstance(memory, int)
    versions = found["versions"]
    assert isinstance(versions, dict)
    programs = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{found['cpu']}, {found['cpus']} CPUs, {memory / (1 << 30):.0f} GiB, {found['system']}, "
        f"kernel {found['kernel']}, load {found['load_1min']}; {programs}"
    )


def _cpu() -> str:
    for text in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if text.startswith("model name"):
            return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(argv: tuple[str, ...]) -> str | None:
    if shutil.which(argv[0]) is None:
        return None
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    number = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
    return number[0] if number else "unknown"
