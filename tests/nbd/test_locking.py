"""What of a server is locked in memory, as decided from lists and as the kernel counts it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import locking
from tmem.nbd import guards, server

from .conftest import Server

if TYPE_CHECKING:
    from collections.abc import Callable

MAPS = """\
55d7a1a44000-55d7a1a48000 r--p 00000000 fe:00 1234 /usr/bin/nbdkit
55d7a1a5b000-55d7a1a5c000 r-xp 00004000 fe:00 1234 /usr/bin/nbdkit
55d7a1a70000-55d7a1a72000 rw-p 0001e000 fe:00 1234 /usr/bin/nbdkit
55d7a1a72000-55d7ada72000 rw-p 00000000 00:00 0
55d7b0000000-55d7b0400000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0400000000 rw-s 00000000 00:1c 3 /run/tmem/my segment
7f1000000000-7f1008000000 rw-p 00000000 00:00 0
7f1010000000-7f1010001000 ---p 00000000 00:00 0
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
7ffd00100000-7ffd00104000 r--p 00000000 00:00 0 [vvar]
7ffd00104000-7ffd00106000 r-xp 00000000 00:00 0 [vdso]
"""


def test_which_mappings_are_locked() -> None:
    mappings = locking.parse_maps(MAPS)
    assert mappings[5].name == "/run/tmem/my segment"
    assert mappings[3].size_bytes == 192 << 20
    locked = list(locking.to_lock(mappings, "/usr/bin/nbdkit", (0, 0x1C, 3)))
    # Neither the static buffers (3), nor the segment (5), the guard page (7), vvar and vdso (9, 10).
    assert locked == [mappings[number] for number in (0, 1, 2, 4, 6, 8)]


MOUNTS = """\
20 1 0:1 / / rw - ext4 /dev/sda rw
21 20 0:2 / /run rw - tmpfs tmpfs rw,size=100k
22 21 0:3 / /run/tmem rw - tmpfs tmem rw,noswap
23 20 0:4 / /dev/shm rw shared:1 - tmpfs tmpfs rw
24 20 0:5 / /with\\040space rw - tmpfs tmpfs rw
25 23 0:6 / /dev/shm rw - tmpfs tmpfs rw,noswap
"""


@pytest.mark.parametrize(
    ("path", "swappable"),
    [
        ("/var/lib/seg", False),
        ("/run/seg", True),
        ("/run/tmem/seg", False),
        ("/run/tmemory/seg", True),
        ("/dev/shm/seg", False),
        ("/with space/seg", True),
    ],
)
def test_which_segments_can_be_swapped_out(path: str, swappable: bool) -> None:
    assert locking.swappable(Path(path), MOUNTS) is swappable


def test_a_running_server_is_locked(make_server: "Callable[..., Server]") -> None:
    one = make_server()
    with one.client() as client:
        client.pwrite(bytes(range(256)) * 4096, 0)
        report = server.read_report(one.paths, "guest1")
        assert report is not None
        assert report["pid"] == one.pid
        if report["refused"]:
            pytest.skip(f"the limit on locked memory is too low: {report['refused']}")
        status = Path(f"/proc/{one.pid}/status").read_text()
        resident = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line}
        locked_kb = guards.locked_bytes(one.pid) >> 10
        # Everything but nbdkit's unused 200 MB. (The segment counts in full where it is locked at all.)
        assert locked_kb > 20_000
        assert int(resident["RssAnon"]) + int(resident["RssFile"]) < 100_000


def test_the_parent_process_keeps_its_guards_over_exec(swap_server: Server) -> None:
    """The stack of each thread is small, because all of it is locked."""
    limits = Path(f"/proc/{swap_server.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max stack size"))
    assert line.split()[3] == str(512 << 10)
