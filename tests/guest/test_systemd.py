"""The units at work: a machine that boots with systemd, swaps to itself, and is switched off while it does.

One guest for all of it, in the order of a machine's life; it takes about two minutes, so only TMEM_LONG=1
runs it.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.cli import install

from .machine import Options
from .systemd import SystemdGuest

UNITS = f"/{install.UNITS}"
pytestmark = [
    pytest.mark.skipif(os.environ.get("TMEM_LONG") != "1", reason="takes minutes: set TMEM_LONG=1"),
    pytest.mark.timeout(900),
]


def files() -> dict[str, str]:
    """Return what 'tmem install' and an administrator would have left in the guest."""
    units = install.render("default", Path("/usr/local/bin/tmem"))
    enabled = {
        "sysinit.target.wants/tmem@default.service": "tmem@.service",
        "sysinit.target.wants/tmem-contain.service": "tmem-contain.service",
        "sysinit.target.wants/tmem-swap@web1.service": "tmem-swap@.service",
        "multi-user.target.wants/tmem-mount@unit.service": "tmem-mount@.service",
    }
    return {
        **{f"{UNITS}/{unit.name}": unit.text for unit in units},
        **{f"{UNITS}/{link}": f"->{UNITS}/{unit}" for link, unit in enabled.items()},
        "/etc/tmem/default.conf": "OPTIONS=--memory 96M\n",
        "/etc/tmem/swap-web1.conf": "OPTIONS=--size 192M\n",
        "/etc/tmem/mount-unit.conf": "LOWER=/srv/lower\nMOUNTPOINT=/mnt/unit\n",
        "/etc/fstab": "/srv/lower /mnt/fstab fuse.tmem ro,x-systemd.after=tmem@default.service 0 0\n",
        "/srv/lower/file": "content\n",
        "/mnt/unit/empty": "",
        "/mnt/fstab/empty": "",
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("systemd") / "console.log"


@pytest.fixture(scope="module", params=["6.1"])
def guest(request: pytest.FixtureRequest, log: Path) -> Iterator[SystemdGuest]:
    options = Options(kernel=request.param, memory_mib=512, cpus=2)
    with SystemdGuest("systemd", options, log, files()) as booted:
        booted.boot()
        booted.run("systemctl is-system-running --wait", 300, check=False)
        yield booted


def show(guest: SystemdGuest, unit: str, *names: str) -> list[str]:
    """Return properties of a unit, in the order of their names in the call."""
    shown = guest.run(["systemctl", "show", unit, *(f"--property={name}" for name in names)]).stdout
    values = dict(line.split("=", 1) for line in shown.splitlines() if line)
    return [values[name] for name in names]


def swapped(guest: SystemdGuest) -> int:
    """Return the KiB on the device; -1 if it is not in use as swap."""
    lines = guest.run(["cat", "/proc/swaps"]).stdout.splitlines()[1:]
    return next((int(line.split()[3]) for line in lines if line.startswith("/dev/nbd")), -1)


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.5)


def start_hog(guest: SystemdGuest, name: str, seconds: int) -> None:
    """Let a service use more memory than its slice may have."""
    guest.run(["systemd-run", "--unit", name, "guest-tool", "hog", "-s", "200M", "-t", str(seconds)])
    until(lambda: swapped(guest) > 64 << 10, 120)


def test_everything_has_started(guest: SystemdGuest) -> None:
    failed = guest.run("systemctl --failed --no-legend; journalctl -o cat --no-pager -u 'tmem*' | tail -30")
    state = guest.run("systemctl is-system-running", check=False).stdout.strip()
    assert state == "running", failed.stdout
    assert swapped(guest) >= 0
    for unit in "tmem@default", "tmem-contain", "tmem-swap@web1", "tmem-mount@unit", "mnt-fstab.mount":
        assert show(guest, unit, "ActiveState") == ["active"], unit


def test_the_slices_are_as_they_must_be(guest: SystemdGuest) -> None:
    assert guest.run("cat /sys/fs/cgroup/tmem.slice/memory.swap.max").stdout.strip() == "0"
    assert guest.run("cat /sys/fs/cgroup/system.slice/memory.max").stdout.strip().isdigit()
    pids = guest.run("cat /sys/fs/cgroup/tmem.slice/tmem@default.service/cgroup.procs").stdout.split()
    commands = [guest.run(f"cat /proc/{pid}/comm /proc/{pid}/oom_score_adj").stdout.split() for pid in pids]
    assert sum(name == "nbdkit" for name, _ in commands) == 2, "the server and its standby"
    assert {score for _, score in commands} == {"-1000"}
    doctor = guest.run("tmem doctor", check=False).stdout
    assert re.search(r"containment +on", doctor), doctor


def test_files_can_be_read_through_both_kinds_of_mount(guest: SystemdGuest) -> None:
    for point in "/mnt/fstab", "/mnt/unit":
        assert guest.run(["cat", f"{point}/file"]).stdout == "content\n"
    assert guest.run("touch /mnt/fstab/x", check=False).rc != 0


def test_a_mount_of_the_unit_comes_back(guest: SystemdGuest) -> None:
    (pid,) = show(guest, "tmem-mount@unit", "MainPID")
    assert pid != "0"
    assert guest.run(f"cat /proc/{pid}/oom_score_adj").stdout.strip() == "-500"
    guest.run(["kill", "-KILL", pid])
    until(lambda: guest.run("cat /mnt/unit/file", check=False).stdout == "content\n")
    assert show(guest, "tmem-mount@unit", "NRestarts") == ["1"]
    guest.run("systemctl stop tmem-mount@unit")
    assert guest.run("findmnt /mnt/unit", check=False).rc != 0
    assert show(guest, "tmem-mount@unit", "ActiveState") == ["inactive"]


def test_a_manager_that_is_killed_or_restarted_leaves_the_swap_device_alone(guest: SystemdGuest) -> None:
    start_hog(guest, "first", 30)
    servers = "pidof nbdkit | tr ' ' '\\n' | sort | tr '\\n' ' '"
    before = guest.run(servers).stdout
    (pid,) = show(guest, "tmem@default", "MainPID")
    guest.run(["kill", "-KILL", pid])
    until(lambda: show(guest, "tmem@default", "NRestarts", "ActiveState") == ["1", "active"])
    assert show(guest, "tmem@default", "MainPID") != [pid]
    guest.run("systemctl restart tmem@default", 90)
    assert guest.run(servers).stdout == before
    assert show(guest, "tmem-swap@web1", "ActiveState") == ["active"]
    assert swapped(guest) > 0
    until(lambda: show(guest, "first", "ActiveState") != ["active"], 240)
    said = guest.run("journalctl -o cat --no-pager -u first").stdout
    report = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert report["pages"] > 0
    assert report["bad_pages"] == 0


def test_the_swap_unit_can_be_stopped_and_started(guest: SystemdGuest) -> None:
    guest.run("systemctl stop tmem-swap@web1", 120)
    assert swapped(guest) == -1
    assert guest.run("pidof nbdkit", check=False).stdout == ""
    guest.run("systemctl start tmem-swap@web1", 180)
    assert swapped(guest) >= 0


def test_it_is_switched_off_while_it_swaps(guest: SystemdGuest, log: Path) -> None:
    start_hog(guest, "last", 3600)
    guest.start("systemctl poweroff --no-block")
    assert guest.wait_ended(300), guest.console_tail()
    said = log.read_text(errors="replace")
    assert "Power down" in said
    order = ["Stopped \x1b[0;1;39mlast.service", "Stopping \x1b[0;1;39mtmem-swap@web1"]
    order += ["Stopped \x1b[0;1;39mtmem-swap@web1", "Stopping \x1b[0;1;39mtmem@default", "Reached target"]
    at = [said.rfind(text) for text in order]
    assert -1 not in at
    assert at == sorted(at)
    for trouble in "Killed process", "Failed deactivating swap", "Failed unmounting", "blocked for more than":
        assert trouble not in said
