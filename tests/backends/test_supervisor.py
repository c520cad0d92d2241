"""Services are kept running, found again after a restart of their supervisor, and never killed."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import trio

from tests.waiting import wait_until
from tmem.backends.paths import NAME_BYTES, SegmentPaths
from tmem.backends.processes import Process
from tmem.backends.supervisor import Supervisor
from tmem.errors import ServiceError

from .supervised import supervised

SLEEP = ["sleep", "300"]
STUBBORN = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]


@pytest.fixture
def paths(runtime_dir: Path) -> SegmentPaths:
    made = SegmentPaths.of("default")
    made.state.mkdir(mode=0o700)
    return made


async def pid_other_than(supervisor: Supervisor, old: int | None) -> int:
    while True:
        (service,) = supervisor.statistics()
        if service.pid is not None and service.pid != old:
            return service.pid
        await trio.sleep(0.01)


async def ready(paths: SegmentPaths) -> None:
    """Wait until the stubborn service has set its trap."""
    while "ready" not in (paths.state / "service-one.log").read_text():
        await trio.sleep(0.01)


def start(supervisor: Supervisor, argv: list[str] | None = None) -> int:
    pid = supervisor.supervise("one", argv or SLEEP, {})
    assert pid is not None
    return pid


def test_a_killed_service_is_started_again(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor)
        for _ in range(3):
            os.kill(pid, signal.SIGKILL)
            pid = await pid_other_than(supervisor, pid)
        assert supervisor.statistics()[0].starts == 4
        await supervisor.unsupervise("one", 30)

    supervised(paths, body)


def test_a_service_is_kept_through_want_of_descriptors(
    paths: SegmentPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was none to wait with: that ended the manager, and with it everything that it keeps running."""
    fails, real = [OSError(errno.EMFILE, "Too many open files"), MemoryError()], Process.open_pidfd

    def scarce(process: Process) -> int | None:
        if fails:
            raise fails.pop()
        return real(process)

    monkeypatch.setattr(Process, "open_pidfd", scarce)

    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor)
        while fails:
            await trio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        await pid_other_than(supervisor, pid)
        assert supervisor.statistics()[0].starts == 2
        await supervisor.unsupervise("one", 30)

    supervised(paths, body)


def test_a_service_is_stopped_although_that_cannot_be_recorded(paths: SegmentPaths) -> None:
    """The tmpfs is full, which a service that goes may help."""

    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor)
        (paths.state / "service-one.new").mkdir()  # so that nothing can be written there
        supervisor.restart("one", ["sleep", "301"], {})
        await pid_other_than(supervisor, pid)
        assert await supervisor.unsupervise("one", 30)
        assert supervisor.statistics() == []

    supervised(paths, body)


def test_a_service_that_always_dies_is_not_started_in_a_loop(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        supervisor.supervise("one", ["false"], {})
        while supervisor.statistics()[0].starts < 4:
            await trio.sleep(0.01)
        begun = trio.current_time()
        while supervisor.statistics()[0].starts < 5:
            await trio.sleep(0.01)
        assert trio.current_time() - begun > 0.3  # 0, 0.1, 0.2, then 0.4 s
        await supervisor.unsupervise("one", 30)

    supervised(paths, body)


def test_unsupervise_ends_and_forgets(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor)
        process = Process.of(pid)
        assert process is not None
        assert os.getsid(pid) == pid  # a Ctrl-C at our terminal does not reach it
        assert await supervisor.unsupervise("one", 30)
        assert not process.alive
        assert not await supervisor.unsupervise("one", 30)
        assert supervisor.statistics() == []
        assert not list(paths.state.glob("service-*"))

    supervised(paths, body)


def test_the_same_command_again_is_no_change(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor)
        assert start(supervisor) == pid
        with pytest.raises(ServiceError, match="another command"):
            start(supervisor, ["sleep", "301"])
        await supervisor.unsupervise("one", 30)

    supervised(paths, body)


def test_a_program_that_is_not_there_is_an_error(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        with pytest.raises(ServiceError, match="no such program"):
            start(supervisor, ["no-such-program"])
        assert supervisor.statistics() == []

    supervised(paths, body)
    assert not list(paths.state.glob("service-*.json"))


def test_services_survive_their_supervisor(paths: SegmentPaths) -> None:
    pids = []

    async def first(supervisor: Supervisor) -> None:
        pids.append(start(supervisor))

    async def second(supervisor: Supervisor) -> None:
        (service,) = supervisor.statistics()
        assert (service.pid, service.starts) == (pids[0], 0)
        os.kill(pids[0], signal.SIGKILL)
        await pid_other_than(supervisor, pids[0])
        await supervisor.unsupervise("one", 30)

    supervised(paths, first)
    assert Process.of(pids[0]) is not None
    supervised(paths, second)


def test_what_died_meanwhile_is_started(paths: SegmentPaths) -> None:
    pids = []

    async def first(supervisor: Supervisor) -> None:
        pids.append(start(supervisor))

    async def second(supervisor: Supervisor) -> None:
        await pid_other_than(supervisor, pids[0])
        await supervisor.unsupervise("one", 30)

    supervised(paths, first)
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    supervised(paths, second)


def test_a_start_that_was_not_recorded_is_found_by_its_marker(paths: SegmentPaths) -> None:
    pids = []

    async def first(supervisor: Supervisor) -> None:
        pids.append(start(supervisor))

    async def second(supervisor: Supervisor) -> None:
        assert supervisor.statistics()[0].pid == pids[0]
        await supervisor.unsupervise("one", 30)

    supervised(paths, first)
    record = paths.record("service", "one")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"process": None}))
    # exec lets the parent go on a moment before it has put the environment in its place.
    wait_until(lambda: str(record).encode() in Path(f"/proc/{pids[0]}/environ").read_bytes())
    supervised(paths, second)


def test_a_damaged_record_is_left_alone(paths: SegmentPaths) -> None:
    record = paths.record("service", "one")
    record.write_text('{"name": "one"')

    async def body(supervisor: Supervisor) -> None:
        assert supervisor.statistics() == []

    supervised(paths, body)
    assert record.exists()


def test_a_service_that_does_not_end_is_never_killed(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        pid = start(supervisor, STUBBORN)
        await ready(paths)
        with pytest.raises(ServiceError, match="still runs"):
            await supervisor.unsupervise("one", 0.2)
        assert supervisor.statistics()[0].state == "stopping"
        assert Process.of(pid) is not None
        with pytest.raises(ServiceError, match="being stopped"):
            start(supervisor, STUBBORN)
        os.kill(pid, signal.SIGKILL)  # as a person might; now it must not come back
        assert await supervisor.unsupervise("one", 30)
        assert supervisor.statistics() == []

    supervised(paths, body)


def test_a_stop_that_was_begun_goes_on_after_a_restart(paths: SegmentPaths) -> None:
    pids = []

    async def first(supervisor: Supervisor) -> None:
        pids.append(start(supervisor, STUBBORN))
        await ready(paths)
        with pytest.raises(ServiceError):
            await supervisor.unsupervise("one", 0.1)

    async def second(supervisor: Supervisor) -> None:
        assert supervisor.statistics()[0].state == "stopping"
        os.kill(pids[0], signal.SIGKILL)
        while supervisor.statistics():
            await trio.sleep(0.01)

    supervised(paths, first)
    supervised(paths, second)


def test_output_is_bounded_while_the_service_runs(paths: SegmentPaths) -> None:
    talkative = ["sh", "-c", "yes 'the segment is full' | head -c 3000000; echo quiet; exec sleep 300"]

    async def body(supervisor: Supervisor) -> None:
        start(supervisor, talkative)
        output = paths.state / "service-one.log"
        while not output.exists() or not output.read_bytes().endswith(b"quiet\n"):
            await trio.sleep(0.01)
        supervisor.trim_outputs()
        assert output.stat().st_size == 0
        await supervisor.unsupervise("one", 10)

    supervised(paths, body)


def test_the_longest_client_name_has_a_service(paths: SegmentPaths) -> None:
    async def body(supervisor: Supervisor) -> None:
        name = "swap-" + "c" * NAME_BYTES
        assert supervisor.supervise(name, SLEEP, {}) is not None
        await supervisor.unsupervise(name, 10)

    supervised(paths, body)
