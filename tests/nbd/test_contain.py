"""Containing a machine: what is planned, on machines made of numbers, and what comes of it in real groups.

The real ones lie below a group of the test's own, so that the machine itself is not contained.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tmem.backends import cgroup, groups
from tmem.backends.groups import Record
from tmem.backends.processes import Process
from tmem.errors import TmemError
from tmem.nbd import contain, containment, steps
from tmem.nbd.contain import Group, Machine, Wanted

from .conftest import eventually

MIB, GIB = 1 << 20, 1 << 30
ROOT = Path("/nowhere")


def machine(*members: Group, systemd: bool = False, version: int = 2, taken: int = GIB) -> Machine:
    """A machine of 8 GiB."""
    return Machine(version, ROOT, systemd, 8 * GIB, taken, members, 0, 0, 1, frozenset({100}), 0)


def limits(*members: Group, record: Record | None = None, **wanted: object) -> dict[str, int]:
    arguments: dict[str, object] = {"segments_bytes": 4 * GIB, "room_bytes": GIB, **wanted}
    return dict(contain.plan(machine(*members), Wanted(**arguments), record).limits)  # type: ignore[arg-type]


def test_what_is_left_goes_to_the_rest() -> None:
    assert limits() == {"rest": 2 * GIB}  # 8 - 1 taken - 4 - 1
    # What a group holds is taken by it, and not by the kernel.
    assert limits(Group("rest", 3, GIB // 2, GIB)) == {}
    ours = Record(str(ROOT), str(ROOT / "tmem"), {"rest": GIB}, {"rest": None})
    assert limits(Group("rest", 3, GIB // 2, GIB), record=ours) == {"rest": 2 * GIB + GIB // 2}


def test_room_grows_with_what_our_processes_hold() -> None:
    wanted = Wanted(4 * GIB)
    few = contain.plan(machine(), wanted).budget_bytes
    assert few == 8 * GIB - GIB - 4 * GIB - contain.default_room(8 * GIB)
    crowded = replace(machine(taken=3 * GIB), own_held_bytes=2 * GIB, own_process_bytes=GIB)
    assert contain.plan(crowded, wanted).budget_bytes == 3 * GIB - GIB - containment.RESTART_BYTES - GIB // 8


def test_groups_share_what_is_left() -> None:
    found = limits(Group("docker", 5, 512 * MIB), Group("empty"), Group("mine", 1, 0, 256 * MIB))
    left = 2 * GIB + 512 * MIB - 256 * MIB - 512 * MIB
    assert found == {"docker": 512 * MIB + left // 2, "rest": left // 2}
    shares = limits(Group("docker", 5, 512 * MIB), shares={"docker": 80})
    assert shares["docker"] == pytest.approx(2.5 * GIB * 0.8, abs=4096)
    assert sum(shares.values()) == pytest.approx(2.5 * GIB, abs=8192)


def test_a_limit_of_somebody_else_is_replaced_only_by_name() -> None:
    mine = Group("mine", 1, 0, 256 * MIB)
    assert "mine" not in limits(mine)
    assert limits(mine, shares={"mine": 50})["mine"] == GIB


@pytest.mark.parametrize(
    ("members", "wanted", "message"),
    [
        ((), {"room_bytes": 5 * GIB}, "nothing is left for everything else"),
        ((), {"segments_bytes": 8 * GIB}, "make the segment smaller"),
        ((Group("mine", 1, 0, 3 * GIB),), {}, "only 0B could be left"),
        ((), {"shares": {"docker": 50}}, "no group 'docker' to limit: there are rest"),
        ((Group("docker", 5, 900 * MIB),), {"shares": {"docker": 5}}, "docker holds 900M now, more than its"),
        ((Group("docker", 5, 900 * MIB),), {"shares": {"rest": 90}}, "what runs holds 900M now"),
    ],
)
def test_what_cannot_be_done(members: tuple[Group, ...], wanted: dict[str, object], message: str) -> None:
    with pytest.raises(TmemError, match=message):
        limits(*members, record=None, **wanted)


def test_systemd() -> None:
    plan = contain.plan(
        machine(Group("system.slice", 9, GIB), Group("machine.slice"), systemd=True),
        Wanted(4 * GIB, GIB),
    )
    # 3 GiB in all, of which system.slice holds one.
    assert plan.limits == {"system.slice": 2 * GIB, "user.slice": GIB}
    argv = [step.argv for step in plan.steps if isinstance(step, steps.Run)]
    assert len(argv) == len(plan.steps)
    set_property = ("systemctl", "set-property", "--runtime")
    assert argv[0] == (*set_property, "init.scope", "MemorySwapMax=0")
    assert argv[1] == (*set_property, "system.slice", f"MemoryMax={2 * GIB}")
    assert plan.record.own_group is None
    undone = [step.argv[3:] for step in contain.undo_steps(plan.record) if isinstance(step, steps.Run)]
    assert ("user.slice", "MemoryMax=infinity") in undone
    assert ("init.scope", "MemorySwapMax=infinity") in undone


def test_permanent_stays_permanent(tmp_path: Path) -> None:
    first = contain.plan(machine(systemd=True), Wanted(4 * GIB, GIB, permanent=True)).record
    again = contain.plan(machine(systemd=True), Wanted(4 * GIB, GIB), first)
    assert again.record.permanent
    assert not any("--runtime" in step.argv for step in again.steps if isinstance(step, steps.Run))
    kept = tmp_path / "lib" / "contain.json"
    replace(again.record, permanent=False).save(tmp_path, kept)
    again.record.save(tmp_path, kept)
    assert groups.load(tmp_path, kept) == again.record
    groups.forget(tmp_path, kept)
    assert groups.load(tmp_path, kept) is None


def test_the_first_time_counts_for_undo() -> None:
    before = Group("docker", 5, 0, None)
    first = contain.plan(machine(before), Wanted(4 * GIB, GIB)).record
    after = Group("docker", 5, 0, first.limits["docker"])
    again = contain.plan(machine(after), Wanted(4 * GIB, 2 * GIB), first).record
    assert again.before["docker"] is None
    assert again.limits["docker"] < first.limits["docker"]


def test_a_failing_command_is_told() -> None:
    with pytest.raises(TmemError, match="'sh -c echo not permitted >&2; exit 3' failed: not permitted"):
        steps.do(steps.Run(("sh", "-c", "echo not permitted >&2; exit 3")))
    with pytest.raises(TmemError, match="failed"):
        steps.do(steps.Run(("no-such-program",)))


def test_what_the_kernel_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(TmemError, match="lacks a part of the memory controller"):
        steps.do(steps.Write(tmp_path / "memory.swap.max", "0"))
    assert not (tmp_path / "memory.swap.max").exists()


# -- real groups


@pytest.fixture
def parent(root: None, control_group: Callable[..., Path]) -> Path:
    """A group of the test's own, with nobody in it."""
    return control_group()


@pytest.fixture
def sleepers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    started = [subprocess.Popen(["sleep", "300"]) for _ in range(3)]
    yield started
    for one in started:
        one.kill()
        one.wait()


def join(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def group_of(process: "subprocess.Popen[bytes]") -> Path | None:
    return cgroup.group_of(process.pid)


def contained(parent: Path, own: set[int], directory: Path, **wanted: object) -> contain.Plan:
    looked = contain.look(own, root=parent)
    arguments: dict[str, object] = {"segments_bytes": 64 * MIB, "room_bytes": 64 * MIB, **wanted}
    plan = contain.plan(looked, Wanted(**arguments), groups.load(directory))  # type: ignore[arg-type]
    contain.apply(plan, directory)
    return plan


def test_there_and_back(parent: Path, sleepers: list["subprocess.Popen[bytes]"], tmp_path: Path) -> None:
    ours, other, nested = sleepers
    for one in sleepers:
        join(parent, one.pid)
    plan = contained(parent, {ours.pid}, tmp_path)
    assert [group_of(one) for one in sleepers] == [parent / "tmem", parent / "rest", parent / "rest"]
    assert cgroup.limit_of(parent / "rest") == plan.limits["rest"]
    assert cgroup.limit_of(parent / "tmem") is None
    assert containment.swap_forbidden(ours.pid)
    assert not containment.swap_forbidden(other.pid)
    verdict = containment.examine({ours.pid}, root=parent)
    assert verdict is not None
    assert (verdict.limits_bytes, verdict.unlimited_groups, verdict.stray_processes) == (
        plan.limits["rest"],
        (),
        0,
    )

    # What was there before stays, and who has come since is moved: it may be done again.
    (parent / "rest" / "inner").mkdir()
    join(parent / "rest" / "inner", nested.pid)
    join(parent, other.pid)
    examined = containment.examine({ours.pid}, root=parent)
    assert examined is not None
    assert examined.stray_processes == 1
    again = contained(parent, {ours.pid}, tmp_path, room_bytes=256 * MIB)
    assert again.limits["rest"] < plan.limits["rest"]
    assert group_of(other) == parent / "rest"
    assert group_of(nested) == parent / "rest" / "inner"

    contain.undo(tmp_path)
    assert {group_of(one) for one in sleepers} == {parent}
    assert [path for path in parent.iterdir() if path.is_dir()] == []
    assert contain.undo(tmp_path) == []


def test_a_group_with_a_limit_gets_it_back(
    parent: Path, sleepers: list["subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    theirs = parent / "tmem-test-theirs"
    theirs.mkdir()
    try:
        join(theirs, sleepers[0].pid)
        (theirs / cgroup.LIMIT_FILES[cgroup.version() or 0]).write_text(str(512 * MIB))
        contained(parent, set(), tmp_path, shares={"tmem-test-theirs": 1})
        assert cgroup.limit_of(theirs) != 512 * MIB
        assert group_of(sleepers[0]) == theirs
        contain.undo(tmp_path)
        assert cgroup.limit_of(theirs) == 512 * MIB
    finally:
        sleepers[0].kill()
        sleepers[0].wait()
        eventually(lambda: not (theirs / "cgroup.procs").read_text(), "the group is empty")
        theirs.rmdir()


HOG = """
import sys
sys.stdin.readline()
block = bytearray(256 << 20)
block[::4096] = bytes([1]) * len(block[::4096])
"""


def test_the_limit_holds(parent: Path, tmp_path: Path) -> None:
    """A hog beyond the limit is stopped in its group; with swap it would be swapped out."""
    with subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE) as hog:
        join(parent, hog.pid)
        looked = contain.look(set(), root=parent)
        budget = contain.plan(looked, Wanted(64 * MIB)).budget_bytes
        contained(parent, set(), tmp_path, room_bytes=None, shares={"rest": 100 * 96 * MIB / budget})
        swap = Path("/proc/swaps").read_text().count("\n") > 1
        hog.communicate(b"\n", timeout=60)
    assert swap or hog.returncode == -signal.SIGKILL
    contain.undo(tmp_path)


FORKS = """
import os, sys
for _ in range(200):
    if os.fork():
        os._exit(0)  # its child goes on
sys.stdin.readline()
"""


def test_who_forks_does_not_escape(parent: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=reader) as forking:
        os.close(reader)
        with suppress(ProcessLookupError):
            join(parent, forking.pid)
        contained(parent, set(), tmp_path)
        assert list(cgroup.user_processes(parent, recursive=False)) == []
        os.close(writer)
    eventually(lambda: not (parent / "rest" / "cgroup.procs").read_text(), "all have ended")
    contain.undo(tmp_path)


def test_a_manager_starts_in_the_group(parent: Path, runtime_dir: Path) -> None:
    """Whatever it touches is charged there, the segment included; nothing moves with a process later."""
    contained(parent, set(), runtime_dir)

    def tmem(*arguments: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "tmem", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    started = tmem("start", "-d", "--memory", "32M", "--realtime")
    assert started.returncode == 0, started.stderr
    pid = int(started.stdout.rsplit(" ", 1)[1])
    try:
        assert cgroup.group_of(pid) == parent / "tmem"
        assert containment.swap_forbidden(pid)
        assert {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()} == {
            os.SCHED_RR
        }
        counts = cgroup.statistics(parent / "tmem")
        charged = counts.get("total_rss", counts.get("anon", 0))
        status = Path(f"/proc/{pid}/status").read_text()
        anonymous = int(status.split("RssAnon:")[1].split()[0]) << 10
        assert charged > anonymous * 3 // 4
        # The tables of the segment at least; the manager backs the reserve as well.
        backed = (runtime_dir / "default").stat().st_blocks * 512
        assert counts.get("total_shmem", counts.get("shmem", 0)) >= backed * 3 // 4 > 0
        locked = int(status.split("VmLck:")[1].split()[0]) << 10
        assert locked > anonymous
    finally:
        process = Process.of(pid)
        assert tmem("stop").returncode == 0
        assert process is None or not process.alive
    contain.undo(runtime_dir)


def test_the_record_is_for_people_and_programs(parent: Path, tmp_path: Path) -> None:
    contained(parent, set(), tmp_path)
    document = json.loads(groups.record_path(tmp_path).read_text())
    assert document["own_group"] == str(parent / "tmem")
    contain.undo(tmp_path)
