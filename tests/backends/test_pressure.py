"""Looks at how short memory is, of made-up machines and of this one."""

from pathlib import Path

import pytest

from tmem.backends.pressure import MACHINE, Room, Rooms, Stalls, Trigger, stall_files

MIB = 1 << 20


def fake(proc: Path, group: Path, version: int) -> None:
    """A machine of 1 GiB with 512 MiB available, and this process in a control group."""
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n")
    line = "4:memory:/a/b" if version == 1 else "0::/a/b"
    (proc / "self" / "cgroup").write_text(f"{line}\n")
    kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw"
    (proc / "self" / "mountinfo").write_text(f"30 29 0:26 / {group} rw - {kind}\n")
    (group / "a" / "b").mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpu memory\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_machine_and_the_groups_that_have_a_limit(tmp_path: Path, version: int) -> None:
    proc, top = tmp_path / "proc", tmp_path / "group"
    fake(proc, top, version)
    rooms = Rooms("self", proc)
    assert rooms.look(0.0) == [Room(1024 * MIB, 512 * MIB)]
    limit, usage, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    (top / "a" / limit).write_text(f"{256 * MIB}\n")
    (top / "a" / usage).write_text(f"{240 * MIB}\n")
    (top / "a" / "b" / limit).write_text(f"{2048 * MIB}\n")  # more than the machine has
    (top / "a" / "memory.stat").write_text(
        f"{prefix}rss 5\n{prefix}inactive_file {6 * MIB}\n{prefix}active_file {4 * MIB}\n"
    )
    assert rooms.look(1.0) == [Room(1024 * MIB, 512 * MIB), Room(256 * MIB, 26 * MIB)]
    (top / "a" / "memory.stat").write_text(f"{prefix}rss 5\n{prefix}inactive_file 0\n")
    assert rooms.look(1.05)[1] == Room(256 * MIB, 26 * MIB)
    assert rooms.look(1.2)[1] == Room(256 * MIB, 16 * MIB)
    (top / "a" / usage).write_text(f"{100 * MIB}\n")
    assert rooms.look(1.3)[1] == Room(256 * MIB, 156 * MIB)  # plenty: nothing is summed up


def test_how_long_anybody_waited(tmp_path: Path) -> None:
    file = tmp_path / "memory"

    def total(us: int) -> None:
        file.write_text(f"some avg10=0.00 avg60=0.00 avg300=0.00 total={us}\nfull avg10=0.00 total=7\n")

    total(1_000_000)
    stalls = Stalls([file, tmp_path / "missing"])
    assert stalls.share(10.0) == 0
    total(1_500_000)
    assert stalls.share(11.0) == 0.5
    assert stalls.share(12.0) == 0
    total(9_000_000)
    assert stalls.share(12.5) == 1
    assert Stalls([]).share(1.0) == 0


def test_this_machine() -> None:
    rooms = Rooms().look(0.0)
    assert all(0 < room.available_bytes <= room.total_bytes for room in rooms)
    assert (MACHINE in stall_files()) == MACHINE.exists()
    trigger = Trigger()
    assert trigger.works == MACHINE.exists()
    assert trigger.wait(0) in (False, True)
    trigger.close()
    assert not trigger.works
    assert not Trigger(Path("/nowhere")).works
