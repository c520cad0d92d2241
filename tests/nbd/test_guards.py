"""Each guard's verdict on machines made of files, and on this one."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import AttachError
from tmem.nbd import containment, family, guards
from tmem.nbd.export import Export
from tmem.nbd.family import Member
from tmem.nbd.guards import Guard, State
from tmem.types import parse_size

from .conftest import Server

GIB = 1 << 30
SERVER, MANAGER, KEEPER, SHELL, DAEMON, KERNEL_THREAD = 100, 101, 102, 200, 201, 2
MEMBERS = [Member("server", SERVER), Member("manager", MANAGER)]
IO_FLUSHER = 0x180000


class Machine:
    """A machine of 8 GiB as files: /proc and one hierarchy of control groups."""

    def __init__(self, root: Path, version: int) -> None:
        self.version = version
        self.proc = root / "proc"
        self.groups = root / "cgroup"
        self.groups.mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        (self.proc / "self/mountinfo").write_text(f"30 20 0:30 / {self.groups} rw - {kind}\n")
        (self.proc / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree: 1 kB\n")
        (self.groups / "cgroup.controllers").write_text("cpu memory\n")
        self.set_vm(min_free_kbytes=67584, watermark_boost_factor=15000)

    def set_vm(self, **values: int) -> None:
        (self.proc / "sys/vm").mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (self.proc / "sys/vm" / name).write_text(f"{value}\n")

    def group(self, path: str, limit: int | None, *pids: int) -> None:
        directory = self.groups / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        if path != "/":
            if self.version == 2:
                (directory / "memory.max").write_text("max\n" if limit is None else f"{limit}\n")
                (directory / "memory.swap.max").write_text("0\n" if path == "/tmem.slice" else "max\n")
            else:
                (directory / "memory.limit_in_bytes").write_text(f"{limit or 0x7FFFFFFFFFFFF000}\n")
                (directory / "memory.swappiness").write_text("0\n" if "tmem" in path else "60\n")
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid in pids:
            entry = self.proc / str(pid)
            (entry / "task" / str(pid)).mkdir(parents=True, exist_ok=True)
            controllers = "0::" if self.version == 2 else "4:memory:"
            (entry / "cgroup").write_text(f"{controllers}{path}\n")
            (entry / "cmdline").write_bytes(b"" if pid == KERNEL_THREAD else b"program\0")
            self.schedule(pid)

    def charge(self, path: str, shmem_bytes: int) -> None:
        """Say what is charged to a group."""
        (self.groups / path.strip("/") / "memory.stat").write_text(f"anon 0\nshmem {shmem_bytes}\n")

    def schedule(self, pid: int, policy: int = 0, flags: int = 0) -> None:
        fields = ["S", *["0"] * 5, str(flags), *["0"] * 31, str(policy), "0"]
        (self.proc / str(pid) / "task" / str(pid) / "stat").write_text(f"{pid} (a) b) {' '.join(fields)}\n")

    def contained(self, resident_bytes: int | None = None) -> Guard:
        return guards.containment_guard([SERVER, MANAGER], 2 * GIB, self.proc, resident_bytes=resident_bytes)


@pytest.fixture(params=[1, 2], ids=["cgroup-v1", "cgroup-v2"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    made = Machine(tmp_path, request.param)
    made.group("/", None, KERNEL_THREAD)
    made.group("/init.scope", None, 1)
    made.group("/tmem.slice", None)
    made.group("/tmem.slice/tmem.service", None, SERVER, MANAGER)
    return made


def test_contained(machine: Machine) -> None:
    machine.group("/user.slice", 2 * GIB)
    machine.group("/user.slice/session", None, SHELL)
    machine.group("/system.slice", 3 * GIB, DAEMON)
    machine.group("/empty.slice", None)
    assert machine.contained().state is State.ON
    assert containment.swap_forbidden(SERVER, machine.proc)
    assert not containment.swap_forbidden(DAEMON, machine.proc)


def test_limits_that_leave_no_room(machine: Machine) -> None:
    machine.group("/user.slice", 3 * GIB, SHELL)
    machine.group("/system.slice", 3 * GIB, DAEMON)
    guard = machine.contained()
    assert guard.state is State.PARTIAL
    assert "limited to 6G: too much" in guard.why


@pytest.mark.parametrize(("taken_mib", "state"), [(2048 + 200, State.ON), (2048 + 1000, State.PARTIAL)])
def test_limits_are_held_against_what_is_taken_now(machine: Machine, taken_mib: int, state: State) -> None:
    """With the servers running it is to be seen what they, the kernel and mounts need."""
    machine.group("/user.slice", 5 * GIB, SHELL)
    (machine.groups / "user.slice/memory.stat").write_text(f"anon {GIB}\n")
    held_mib = 1024
    available_kb = 8388608 - ((taken_mib + held_mib) << 10)
    (machine.proc / "meminfo").write_text(f"MemTotal: 8388608 kB\nMemAvailable: {available_kb} kB\n")
    assert machine.contained().state is State.ON
    assert machine.contained(resident_bytes=2 * GIB).state is state


def test_a_group_without_a_limit(machine: Machine) -> None:
    machine.group("/user.slice", None, SHELL)
    guard = machine.contained()
    assert guard.state is State.MISSING
    assert "user.slice has no limit" in guard.why
    assert "limits everything else to 5.9G" in guard.remedy


def test_processes_outside_any_group(machine: Machine) -> None:
    machine.group("/", None, SHELL)
    assert "1 processes are in the root group" in machine.contained().why


def test_strangers_in_the_servers_group(machine: Machine) -> None:
    """In a group of another name than ours it is by accident that one of us is there."""
    machine.group("/tmem.slice/other.service", None, DAEMON)
    assert machine.contained().state is State.ON
    machine.group("/servers", None, MANAGER)
    machine.group("/servers/other.service", None, SHELL)
    guard = machine.contained()
    assert guard.state is State.MISSING
    assert "1 processes" in guard.why


def test_one_of_ours_in_a_limited_group(machine: Machine) -> None:
    """As a mount that systemd made of an fstab line."""
    machine.group("/system.slice", 2 * GIB)
    machine.group("/system.slice/mnt.mount", None, MANAGER)
    machine.group("/system.slice/other.service", None, SHELL)
    assert machine.contained().state is State.ON


def test_no_memory_controller(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2)
    (machine.groups / "cgroup.controllers").write_text("cpu\n")
    assert machine.contained().state is State.MISSING


def test_realtime(machine: Machine) -> None:
    def verdict() -> Guard:
        return guards.realtime_guard(MEMBERS, machine.proc)

    assert verdict().state is State.MISSING
    machine.schedule(SERVER, policy=2)
    assert verdict().state is State.MISSING
    assert "the manager does not run under SCHED_RR" in verdict().why
    machine.schedule(MANAGER, policy=2)
    assert verdict().state is State.PARTIAL
    assert verdict().remedy == "run 'tmem watermarks'"
    machine.set_vm(min_free_kbytes=419430, watermark_boost_factor=0)
    assert verdict().state is State.ON
    assert guards.realtime_guard([], machine.proc).state is State.PARTIAL
    gone = Member("server", 999)
    assert guards.realtime_guard([gone], machine.proc).state is State.PARTIAL
    assert guards.io_flusher_guard([gone], machine.proc).state is State.MISSING


def test_every_thread_counts(machine: Machine) -> None:
    for pid in (SERVER, MANAGER):
        machine.schedule(pid, policy=2, flags=IO_FLUSHER)
    machine.set_vm(min_free_kbytes=419430, watermark_boost_factor=0)
    assert guards.realtime_guard(MEMBERS, machine.proc).state is State.ON
    assert guards.io_flusher_guard(MEMBERS, machine.proc).state is State.ON
    thread = machine.proc / str(MANAGER) / "task" / "999"
    thread.mkdir()
    (thread / "stat").write_text("999 (trio) S 0 0 0 0 0 0 " + " ".join(["0"] * 40))
    assert "the manager" in guards.realtime_guard(MEMBERS, machine.proc).why
    assert "the manager may wait" in guards.io_flusher_guard(MEMBERS, machine.proc).why


def test_locked_memory(machine: Machine) -> None:
    def verdict(**report: object) -> Guard:
        return guards.locked_guard(MEMBERS, report, machine.proc)

    assert verdict().state is State.MISSING
    (machine.proc / str(SERVER) / "status").write_text("VmLck:\t   36000 kB\n")
    assert verdict().state is State.PARTIAL
    assert "nothing of the manager" in verdict().why
    (machine.proc / str(MANAGER) / "status").write_text("VmLck:\t   32000 kB\n")
    assert verdict().state is State.ON
    assert verdict(refused=["stack: no memory"]).state is State.PARTIAL
    assert guards.locked_guard(MEMBERS[1:], {}, machine.proc).state is State.UNKNOWN


def test_oom_score(machine: Machine) -> None:
    (machine.proc / str(SERVER) / "oom_score_adj").write_text("-1000\n")
    (machine.proc / str(MANAGER) / "oom_score_adj").write_text("0\n")
    assert "0 of the manager" in guards.oom_guard(MEMBERS, machine.proc).why
    (machine.proc / str(MANAGER) / "oom_score_adj").write_text("-1000\n")
    assert guards.oom_guard(MEMBERS, machine.proc).state is State.ON


def test_own_group(machine: Machine) -> None:
    found = guards.own_group_guard(MEMBERS, machine.proc)
    if machine.version == 2:  # of the parent, too
        assert found.state is State.ON
    else:  # the kernel can still swap it out when it has no page cache left
        assert (found.state, found.remedy) == (State.PARTIAL, "boot with cgroup v2")
    machine.group("/user.slice", None, KEEPER)
    found = guards.own_group_guard([*MEMBERS, Member("keeper", KEEPER)], machine.proc)
    assert found.state is State.MISSING
    assert "what the keeper has not locked" in found.why


def test_the_segment(machine: Machine, tmp_path: Path) -> None:
    segment = tmp_path / "segment"
    segment.write_bytes(bytes(1 << 20))
    mounts = machine.proc / "self/mountinfo"

    def verdict(options: str) -> State:
        line = f"40 20 0:40 / {tmp_path} rw - tmpfs tmpfs {options}\n"
        mounts.write_text(mounts.read_text().splitlines()[0] + "\n" + line)
        return guards.segment_guard(segment, MEMBERS, machine.proc).state

    assert verdict("rw,noswap") is State.ON
    assert verdict("rw") is State.PARTIAL
    machine.charge("/tmem.slice/tmem.service", 4096)  # less than is backed: the rest is charged elsewhere
    assert verdict("rw") is State.PARTIAL
    machine.charge("/tmem.slice/tmem.service", 2 << 20)
    assert verdict("rw") is (State.ON if machine.version == 2 else State.PARTIAL)


def test_the_attachment() -> None:
    found = guards.attachment_guard("nbd", MEMBERS)
    assert found.state is State.PARTIAL
    assert "no keeper and no standby" in found.why
    everybody = [*MEMBERS, Member("keeper", KEEPER), Member("standby", 103)]
    assert guards.attachment_guard("nbd", everybody).state is State.ON
    assert guards.attachment_guard("nbdfuse", everybody).state is State.PARTIAL


def test_containment_is_required() -> None:
    """SCHED_RR and watermarks do not take its place: see docs/operations.md."""

    def judge(containment: State, force: bool = False) -> None:
        found = [Guard("containment", containment, "it is not limited", "limit it")]
        guards.require([*found, Guard("realtime", State.ON, ""), Guard("locked memory", State.ON, "")], force)

    judge(State.ON)
    judge(State.MISSING, force=True)
    for state in (State.PARTIAL, State.MISSING, State.UNKNOWN):
        with pytest.raises(AttachError, match="for it is not limited: limit it; or insist with --force"):
            judge(state)


def test_this_machine(swap_server: Server) -> None:
    def look() -> dict[str, Guard]:
        return {guard.name: guard for guard in guards.inspect(swap_server.paths, swap_server.export)}

    found = look()
    assert found["locked memory"].state in (State.ON, State.PARTIAL)
    assert found["io flusher"].state in (State.ON, State.MISSING)
    assert found.keys() >= {"containment", "realtime", "oom score", "segment", "own group"}
    assert all(guard.remedy or guard.state is State.ON for guard in found.values())
    swap_server.stop()
    assert look()["locked memory"].state is State.UNKNOWN


def test_who_is_in_the_path(swap_server: Server, tmem: Callable[..., object]) -> None:
    paths = swap_server.paths
    assert [one.role for one in family.of_device(paths, swap_server.export)] == ["server"]
    tmem("start", "-d")
    with subprocess.Popen(["sleep", "60"]) as keeper:
        try:
            process = Process.of(keeper.pid)
            assert process is not None
            record = paths.record("service", "keeper-guest1")
            record.write_text(json.dumps({"process": asdict(process)}))
            found = {one.role: one.pid for one in family.of_device(paths, swap_server.export)}
            assert found == {
                "server": swap_server.pid,
                "keeper": keeper.pid,
                "manager": family.manager(paths),
            }
            assert family.everybody(paths.directory) == set(found.values())
        finally:
            keeper.kill()
    assert "keeper" not in [one.role for one in family.of_device(paths, swap_server.export)]
    record.unlink()


def test_what_a_machine_without_devices_would_need(paths: SegmentPaths) -> None:
    found = {guard.name: guard for guard in guards.prospect(paths)}
    assert found.keys() == {"RAM", "containment", "realtime", "own group"}
    assert "a segment of 6" in found["RAM"].why


@pytest.mark.parametrize(
    ("size", "reserve", "state"),
    [(56, False, State.ON), (96, False, State.PARTIAL), (129, False, State.MISSING), (129, True, State.ON)],
)
def test_a_device_that_the_segment_cannot_hold(size: int, reserve: bool, state: State) -> None:
    """The kernel would write refused pages again and again, which looks like a machine that hangs."""
    device = Export("guest1", size << 20, unix="/s", reserve=reserve)
    guard = guards.room_guard(device, 64 << 20)
    assert guard.state is state
    if guard.remedy:  # which would make it better, if it is followed
        size_bytes = parse_size(re.findall(r"no larger than (\d+M)", guard.remedy)[0])
        advised = guards.room_guard(Export("guest1", size_bytes, unix="/s"), 64 << 20)
        assert advised.state is (State.ON if state is State.PARTIAL else State.PARTIAL)
    found = [Guard("containment", State.ON, ""), guard]
    guards.require(found, force=True)
    if state is State.MISSING:
        with pytest.raises(AttachError, match="no larger than 128M"):
            guards.require(found, force=False)
    else:
        guards.require(found, force=False)
