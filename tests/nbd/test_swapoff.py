"""What stands in the way of swapoff: no room for what comes back, and somebody else's swapoff."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.nbd import server, swap

from ..groups import set_limit
from .conftest import eventually
from .hogs import LARGE_GROUP_BYTES, Hog, used_bytes
from .test_shrink import Tmem, device, hog

__all__ = ["device", "hog"]


def test_remove_refuses_where_a_group_would_be_full(tmem: Tmem, device: str, hog: Hog) -> None:
    """swapoff charges every page to its group again, and the kernel kills who is in a full one."""
    used = used_bytes(device)
    refused = tmem("swap", "remove", "local")
    assert refused.returncode == 1
    assert "of local cannot come back: " in refused.stderr
    assert f"the control group {hog.group} would need" in refused.stderr
    assert "is limited to 24M" in refused.stderr
    assert "--force" in refused.stderr
    assert refused.stderr.count("\n") == 1
    # Nothing has been tried.
    assert used_bytes(device) > used * 3 // 4
    assert hog.bad_pages() == 0
    set_limit(hog.group, LARGE_GROUP_BYTES)
    removed = tmem("swap", "remove", "local")
    assert removed.returncode == 0, removed.stderr
    assert not swap.is_active(device)
    assert hog.bad_pages() == 0


def test_remove_can_be_insisted_on(tmem: Tmem, device: str, hog: Hog) -> None:
    """Then it is tried; whether the kernel kills the hog or refuses is the kernel's business."""
    removed = tmem("swap", "remove", "local", "--force")
    assert removed.returncode == 0 or "swapoff failed: Cannot allocate memory" in removed.stderr
    assert swap.is_active(device) == (removed.returncode != 0)


def swapoffs() -> list[int]:
    """The children of this process that swap something off."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "swapoff":
                found.append(child.pid)
    return found


def test_a_swapoff_of_somebody_else_is_waited_for(device: str, hog: Hog, paths: SegmentPaths) -> None:
    """As systemd's at shutdown: the kernel refuses a second one as if the device were no swap (EINVAL)."""
    set_limit(hog.group, LARGE_GROUP_BYTES)
    serving = server.running(paths, "local")
    assert serving is not None
    told: list[int] = []
    outcome: list[object] = []

    def off() -> None:
        try:
            swap.off(device, told.append)
            outcome.append("in use" if swap.is_active(device) else "off")
        except AttachError as error:
            outcome.append(error)

    ours = threading.Thread(target=off)
    os.kill(serving.pid, signal.SIGSTOP)  # theirs must not end before ours begins
    try:
        with subprocess.Popen(["swapoff", device]) as theirs:
            try:
                stack = Path(f"/proc/{theirs.pid}/stack")
                eventually(lambda: "swapoff" in stack.read_text(), "the kernel is at it")
                ours.start()
                # Told once, it has begun its own, which ends at once.
                eventually(lambda: bool(told) and swapoffs() == [theirs.pid], "ours is refused")
                assert outcome == []
            finally:
                os.kill(serving.pid, signal.SIGCONT)
        assert theirs.returncode == 0
    finally:
        if ours.ident is not None:
            ours.join()
    assert outcome == ["off"]
    assert told[0] > 0
    assert hog.bad_pages() == 0
