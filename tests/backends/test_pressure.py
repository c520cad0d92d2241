"""How long anybody waits for memory, on made-up machines and on this one."""

from pathlib import Path

from tmem.backends.pressure import MACHINE, Room, Stalls, Trigger, rooms, stall_files


def test_the_machine_and_the_groups_that_have_a_limit(tmp_path: Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "group" / "a"
    (proc / "self").mkdir(parents=True)
    (group / "b").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    (proc / "self" / "cgroup").write_text("4:memory:/a/b\n")
    (proc / "self" / "mountinfo").write_text(f"30 29 0:26 / {group.parent} rw - cgroup cgroup rw,memory\n")
    (group / "memory.limit_in_bytes").write_text("9000\n")
    (group / "memory.usage_in_bytes").write_text("7000\n")
    (group / "memory.stat").write_text("total_rss 5\ntotal_inactive_file 600\ntotal_active_file 50\n")
    (group / "b" / "memory.limit_in_bytes").write_text(f"{2 << 20}\n")  # more than the machine has
    assert rooms("self", proc) == [Room(1 << 20, 1 << 19), Room(9000, 2650)]


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
    assert (MACHINE in stall_files()) == MACHINE.exists()
    trigger = Trigger()
    assert trigger.works == MACHINE.exists()
    assert trigger.wait(0) in (False, True)
    trigger.close()
    assert not trigger.works
    assert not Trigger(Path("/nowhere")).works
