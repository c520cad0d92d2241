"""Each guard's verdict on machines made of files, and on this one."""

from pathlib import Path

import pytest

from tmem.errors import AttachError
from tmem.nbd import containment, guards
from tmem.nbd.guards import Guard, State

from .conftest import Server

GIB = 1 << 30
SERVER, MANAGER, SHELL, DAEMON, KERNEL_THREAD = 100, 101, 200, 201, 2


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
                (directory / "memory.swap.max").write_text("0\n" if "tmem" in path else "max\n")
            else:
                (directory / "memory.limit_in_bytes").write_text(f"{limit or 0x7FFFFFFFFFFFF000}\n")
                (directory / "memory.swappiness").write_text("0\n" if "tmem" in path else "60\n")
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid in pids:
            entry = self.proc / str(pid)
            (entry / "task" / str(pid)).mkdir(parents=True)
            controllers = "0::" if self.version == 2 else "4:memory:"
            (entry / "cgroup").write_text(f"{controllers}{path}\n")
            (entry / "cmdline").write_bytes(b"" if pid == KERNEL_THREAD else b"program\0")
            self.schedule(pid, policy=0)

    def schedule(self, pid: int, policy: int) -> None:
        fields = ["S", *["0"] * 37, str(policy), "0"]
        (self.proc / str(pid) / "task" / str(pid) / "stat").write_text(f"{pid} (a) b) {' '.join(fields)}\n")

    def contained(self) -> Guard:
        return guards.containment_guard([SERVER, MANAGER], 2 * GIB, self.proc)


@pytest.fixture(params=[1, 2], ids=["cgroup-v1", "cgroup-v2"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    made = Machine(tmp_path, request.param)
    made.group("/", None, KERNEL_THREAD)
    made.group("/init.scope", None, 1)
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


def test_a_group_without_a_limit(machine: Machine) -> None:
    machine.group("/user.slice", None, SHELL)
    guard = machine.contained()
    assert guard.state is State.MISSING
    assert "user.slice has no limit" in guard.why
    assert "limit everything else to 5.9G" in guard.remedy


def test_processes_outside_any_group(machine: Machine) -> None:
    machine.group("/", None, SHELL)
    assert "1 processes are in the root group" in machine.contained().why


def test_strangers_in_the_servers_group(machine: Machine) -> None:
    machine.group("/tmem.slice/other.service", None, DAEMON)
    assert machine.contained().state is State.MISSING


def test_no_memory_controller(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2)
    (machine.groups / "cgroup.controllers").write_text("cpu\n")
    assert machine.contained().state is State.MISSING


def test_realtime(machine: Machine) -> None:
    def verdict() -> Guard:
        return guards.realtime_guard([SERVER], machine.proc)

    assert verdict().state is State.MISSING
    machine.schedule(SERVER, policy=2)
    assert verdict().state is State.PARTIAL
    assert "sysctl vm.min_free_kbytes=419430" in verdict().remedy
    machine.set_vm(min_free_kbytes=419430, watermark_boost_factor=0)
    assert verdict().state is State.ON
    assert guards.realtime_guard([], machine.proc).state is State.PARTIAL


def test_one_of_the_two_is_required() -> None:
    def judge(containment: State, realtime: State, force: bool = False) -> None:
        found = [Guard("containment", containment, "", "c"), Guard("realtime", realtime, "", "r")]
        guards.require([*found, Guard("locked memory", State.ON, "")], force)

    judge(State.ON, State.MISSING)
    judge(State.PARTIAL, State.ON)
    judge(State.MISSING, State.MISSING, force=True)
    with pytest.raises(AttachError, match="c; or r; or insist with --force"):
        judge(State.PARTIAL, State.PARTIAL)


def test_this_machine(swap_server: Server) -> None:
    found = {guard.name: guard for guard in guards.inspect(swap_server.paths, swap_server.export)}
    assert found["locked memory"].state in (State.ON, State.PARTIAL)
    assert found["io flusher"].state in (State.ON, State.MISSING)
    assert found.keys() >= {"containment", "realtime", "oom score", "segment", "own group"}
    assert all(guard.remedy or guard.state is State.ON for guard in found.values())
    swap_server.stop()
    after = {guard.name: guard for guard in guards.inspect(swap_server.paths, swap_server.export)}
    assert after["locked memory"].state is State.UNKNOWN
