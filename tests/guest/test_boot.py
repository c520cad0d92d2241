"""The harness itself: commands, files, signals, deadlines, the watchdog."""

import json
import os
import shutil
import signal
from collections.abc import Callable

import psutil
import pytest

from . import kernels
from .cache import GuestError
from .machine import Guest, GuestTimeout, Options
from .uml import UmlGuest

pytestmark = pytest.mark.timeout(900)  # on a busy machine these take minutes

# The largest mapping of the hog holds its pages. The generation of one of them is spoiled.
SPOIL = """
import sys
pid = sys.argv[1]
lines = [line.split() for line in open(f"/proc/{pid}/maps")]
ends = [[int(part, 16) for part in line[0].split("-")] for line in lines if len(line) == 5]
start, end = max(ends, key=lambda pair: pair[1] - pair[0])
memory = open(f"/proc/{pid}/mem", "r+b", buffering=0)
memory.seek(start + 4096 * 7 + 8)
memory.write(b"x" * 8)
"""


def test_a_newer_kernel_runs_this_project(boot: Callable[..., Guest], long: None) -> None:
    series = kernels.SERIES[1]
    runs_this_project(boot(kernel=series), series)


def runs_this_project(guest: Guest, series: str) -> None:
    """Show that commands, files and signals reach a guest, and errors come back."""
    assert guest.run(["uname", "-r"]).stdout.startswith(f"{series}.")
    assert guest.run(["tmem", "--version"]).stdout.startswith("tmem")
    assert guest.run("cat; echo two >&2; exit 3", check=False, data=b"one").rc == 3

    data = bytes(range(256)) * 1000
    guest.put("/tmp/file", data)
    assert guest.get("/tmp/file") == data

    with pytest.raises(GuestError, match="no such file"):
        guest.run("echo no such file >&2; false")
    with pytest.raises(GuestTimeout, match="has not ended"):
        guest.run("sleep 60", timeout_s=0.5)
    sleeping = guest.start(["sleep", "60"])
    sleeping.signal(signal.SIGTERM)
    assert sleeping.wait(90).rc == -signal.SIGTERM


def test_user_mode_linux_runs_it_too(root: None) -> None:
    if not shutil.which("linux.uml"):
        pytest.skip("user-mode-linux is not installed")
    with UmlGuest("uml", Options(memory_mib=256)) as guest:
        guest.boot()
        assert guest.run(["tmem", "--version"]).stdout.startswith("tmem")
        assert guest.run(["guest-tool", "hog", "-s", "8M", "-t", "0"]).rc == 0
        assert guest.run("test -b /dev/nbd0").rc == 0
        pid, directory = guest.process.pid if guest.process else 0, guest.directory
    assert not directory.exists()
    left = [one.pid for one in psutil.process_iter(["name"]) if one.info["name"] == "linux.uml"]
    assert not [other for other in left if os.getpgid(other) == pid]


def test_a_guest_runs_this_project_and_stalls_and_bad_pages_are_seen(boot: Callable[..., Guest]) -> None:
    """All on one guest, for it takes longer to boot than to do any of it."""
    guest = boot()
    runs_this_project(guest, kernels.SERIES[0])
    guest.watch(stall_s=3, keys="m")
    hog = guest.start(["guest-tool", "hog", "-s", "4M", "-t", "600"])
    hog.wait_for("touch", 180)
    assert not guest.is_hung()

    hog.signal(signal.SIGSTOP)
    assert guest.wait_hang(90)
    assert guest.is_hung()
    guest.wait_console("Mem-Info", 90)
    guest.put("/tmp/spoil.py", SPOIL)
    guest.run(["python3", "/tmp/spoil.py", str(hog.pid)])
    hog.signal(signal.SIGUSR1)
    hog.signal(signal.SIGCONT)
    result = hog.wait(180)
    assert result.rc == 1
    assert json.loads(result.stdout.splitlines()[-1])["bad_pages"] == 1
    guest.wait_console("MOVES AGAIN", 90)
    assert not guest.is_hung()
