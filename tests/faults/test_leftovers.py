"""What the dead leave: sockets, records of processes whose pids others have now, half-written files."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tmem.backends import processes, service
from tmem.backends.paths import SegmentPaths
from tmem.errors import TmemError
from tmem.nbd import export, server
from tmem.nbd.export import Export

from .board import wait
from .world import FILES, SWAP, World, kill, tmem


@pytest.fixture
def innocent() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has nothing to do with any of this, and must live to the end."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
        assert process.poll() is None, "somebody else's process was ended"
    finally:
        process.kill()
        process.wait()


def test_everything_dies_at_once(world: World) -> None:
    """Sockets and records of all are there, and none of them is alive: it starts as if nothing were."""
    world.work()
    world.swap.proceed(50)
    dead = [world.server_process, world.daemon_process]
    world.kill_manager()
    for process in dead:
        kill(process)
    for process in dead:
        wait(lambda of=process: not of.alive, "it is gone")  # type: ignore[misc]
    assert world.paths.control.exists()
    assert world.paths.record("service", f"swap-{SWAP}").exists()
    assert world.paths.record("mount", FILES).exists()
    assert export.load(world.paths, SWAP).unix is not None
    world.start_manager()
    world.mount()
    for child in world.loads:
        child.proceed(50)
    world.rest()


def test_pids_that_others_have_now(world: World, innocent: "subprocess.Popen[bytes]") -> None:
    """Records of the dead name a living process; its start time is another one, so it is nobody's."""
    world.kill_manager()
    kill(world.server_process)
    world.kill_daemon()
    for path, where in (
        (world.paths.record("service", f"swap-{SWAP}"), "process"),
        (world.paths.record("mount", FILES), None),
        (server.report_path(world.paths, SWAP), None),
    ):
        document = json.loads(path.read_text())
        (document[where] if where else document)["pid"] = innocent.pid
        path.write_text(json.dumps(document))
    (world.paths.state / "manager.lock").write_text(f"{innocent.pid}\n")
    assert server.running(world.paths, SWAP) is None
    world.start_manager()
    world.mount()
    world.work()
    for child in world.loads:
        child.proceed(50)
    world.rest()
    for child in world.loads:
        child.end()
    tmem("umount", world.point)
    tmem("swap", "remove", SWAP)


def test_a_record_cut_short_is_an_error_in_one_line(paths: SegmentPaths) -> None:
    """Records are replaced as a whole, so nobody who dies leaves this; it is said, and not used."""
    paths.state.mkdir(mode=0o700)
    one = Export("guest1", 8 << 20, unix="/nowhere")
    one.save(paths)
    record = paths.record("swap", "guest1")
    whole = record.read_bytes()
    for length in range(len(whole.rstrip())):
        record.write_bytes(whole[:length])
        with pytest.raises(TmemError) as caught:
            export.load(paths, "guest1")
        assert "\n" not in str(caught.value)
        report = server.report_path(paths, "guest1")
        report.write_bytes(whole[:length])
        assert server.running(paths, "guest1") is None
    one.save(paths)
    assert export.load(paths, "guest1") == one


def test_half_written_files_beside_the_records(world: World) -> None:
    """Who is killed while it writes a record leaves a part of a new one, and the old one in force."""
    state, parts = world.paths.state, []
    for name in (
        f"swap-{SWAP}.json.1234",
        f"swap-{SWAP}.server.1234",
        f"service-swap-{SWAP}.new",
        f"mount-{FILES}.new",
    ):
        parts.append(state / name)
        parts[-1].write_text('{"client": "gu')
    world.kill_manager()
    world.kill_server()
    world.kill_daemon()
    world.start_manager()
    world.mount()
    world.work()
    for child in world.loads:
        child.proceed(50)
    world.rest()
    tmem("list")
    services = service.request(world.paths, {"op": "services"})["services"]
    assert isinstance(services, list)
    assert [entry["name"] for entry in services] == [f"swap-{SWAP}"]


def test_a_zombie_is_dead() -> None:
    """A server whose parent does not collect it is not taken for one that runs."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        wait(lambda: processes.start_ticks(pid) is None, "it is a zombie")
        os.kill(pid, signal.SIGCONT)  # there it is, all the same
    finally:
        os.waitpid(pid, 0)
