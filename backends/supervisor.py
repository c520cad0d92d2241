"""Keeps servers running: starts them, starts them again when they die, finds them after its own restart.

A service is a command that the manager was asked to keep alive. Its record (``service-NAME.json`` in the
state directory) holds the command and the process; a later supervisor adopts what still runs. A service is
never killed: it gets SIGTERM on `unsupervise` and all the time it needs, since a swap device may hang on it.
One that serves a client is not started again once that is gone or was handed over to another place. Not for
what the servers do. Threading: trio tasks of one run; nothing here is thread-safe.

    supervise -> running -> (died) waiting -> running ...        waiting: 0, 0.1, 0.2 ... 10 s
                               (died, its client is gone) forgotten
                    restart -> (killed) running, with another command
                    unsupervise -> stopping -> (died) forgotten
"""

import json
import logging
import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from tmem.backends import processes
from tmem.backends.paths import NAME_BYTES, SegmentPaths, check_name
from tmem.backends.processes import Process
from tmem.errors import PoolError, SegmentError, ServiceError, TmemError

MARKER = "TMEM_SERVICE"
"""Environment variable by which a server is found that was started but not yet recorded."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 10.0
# A server that has run this long had come up: when it is killed, the next start is immediate again.
_SETTLED_S = 1.0
_TROUBLED_S = 0.1

OUTPUT_BYTES = 1 << 20
"""How much of what a service says is kept at most."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceStatistics:
    """One supervised service."""

    name: str
    """What it was called when it was supervised."""
    pid: int | None
    """Its process; None while it waits to be started again."""
    state: str
    """``running``, ``waiting`` (to be started again) or ``stopping``."""
    starts: int
    """How often this supervisor started it; 0 for one that was adopted and has run ever since."""


@dataclass
class _Service:
    """The state of one service; its task in `Supervisor._keep` is the only one that starts it."""

    name: str
    argv: list[str]
    env: dict[str, str]
    client: str | None
    record: Path
    process: Process | None = None
    stopping: bool = False
    replacing: bool = False
    starts: int = 0
    started_s: float = 0.0  # trio's clock
    asked_to_stop: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)

    def save(self) -> None:
        """Write the record so that it is whole at every moment."""
        value = {
            "name": self.name,
            "argv": self.argv,
            "env": self.env,
            "client": self.client,
            "stopping": self.stopping,
            "process": None if self.process is None else asdict(self.process),
        }
        fresh = self.record.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.chmod(0o600)
        fresh.replace(self.record)

    @property
    def output(self) -> Path:
        return self.record.with_suffix(".log")

    def trim_output(self) -> None:
        """Empty the output if it has grown beyond OUTPUT_BYTES."""
        with suppress(OSError):
            if self.output.stat().st_size > OUTPUT_BYTES:
                os.truncate(self.output, 0)


class Supervisor:
    """All services of one segment. Its tasks live in `nursery` and leave the servers alone when cancelled."""

    def __init__(self, paths: SegmentPaths, nursery: trio.Nursery) -> None:
        self._paths = paths
        self._nursery = nursery
        self._services: dict[str, _Service] = {}

    def statistics(self) -> list[ServiceStatistics]:
        """Return the services in the order of their names."""
        return [
            ServiceStatistics(
                service.name,
                service.process.pid if service.process else None,
                "stopping" if service.stopping else "running" if service.process else "waiting",
                service.starts,
            )
            for _, service in sorted(self._services.items())
        ]

    def keeps(self, prefix: str) -> bool:
        """Say whether a service whose name begins so is kept running."""
        return any(name.startswith(prefix) for name in self._services)

    def trim_outputs(self) -> None:
        """Empty the outputs that have grown beyond OUTPUT_BYTES: they lie in memory, next to the pages.

        A server whose segment is full writes a line for every refused write. Its output is opened for
        appending, so it goes on at the new end.
        """
        for service in self._services.values():
            service.trim_output()

    def adopt(self) -> None:
        """Take over the recorded services: those that still run as they are, the others by starting them."""
        for path in sorted(self._paths.state.glob("service-*.json")):
            service = _load(path)
            if service is None:
                continue
            service.process = service.process or _find_marked(path)
            if service.process:
                _log.info("%s: still runs, pid %d", service.name, service.process.pid)
            self._services[service.name] = service
            service.started_s = trio.current_time()
            self._nursery.start_soon(self._keep, service)

    def supervise(
        self, name: str, argv: list[str], env: dict[str, str], client: str | None = None
    ) -> int | None:
        """Start `argv` and keep it running; return its pid. The same name and command again is no change.

        `env` is added to the manager's own environment; `client` is the one that it serves. Raises
        `ServiceError` if the program cannot be started, if the name is taken by another command or if it is
        being stopped.
        """
        check_name(name, "service name", most=NAME_BYTES + 16)
        if service := self._services.get(name):
            if service.stopping:
                raise ServiceError(f"{name} is being stopped: try again when it has ended")
            if service.argv != argv:
                raise ServiceError(f"{name} runs already with another command: remove it first")
            return service.process.pid if service.process else None
        service = _Service(name, argv, env, client, self._paths.record("service", name))
        try:
            self._start(service)
        except ServiceError:
            service.record.unlink(missing_ok=True)
            raise
        self._services[name] = service
        self._nursery.start_soon(self._keep, service)
        return service.process.pid if service.process else None

    async def unsupervise(self, name: str, timeout_s: float) -> bool:
        """Stop the service with SIGTERM and forget it; say whether there was one.

        Raises `ServiceError` if it still runs after `timeout_s`; it is then stopping, and this may be
        repeated.
        """
        service = self._services.get(name)
        if service is None:
            return False
        service.stopping = True
        with suppress(OSError):  # without room for that whoever comes after us may start it, but it stops now
            service.save()
        service.asked_to_stop.set()
        if service.process:
            _signal(service.process, signal.SIGTERM)
        with trio.move_on_after(timeout_s):
            await service.gone.wait()
            return True
        pid = service.process.pid if service.process else 0
        raise ServiceError(
            f"{name} (pid {pid}) still runs {timeout_s:g} s after SIGTERM: wait, then try again"
        )

    def restart(self, name: str, argv: list[str], env: dict[str, str]) -> None:
        """Kill the service, and start `argv` in its place at once; `ServiceError` if there is none.

        SIGKILL, because a server of nbdkit 1.32 does not end while somebody is connected. What it has
        acknowledged stays; what it has not, its client sends again to the next one.
        """
        service = self._services.get(name)
        if service is None or service.stopping:
            raise ServiceError(f"{name} is not kept running here: there is nothing to restart")
        service.argv, service.env, service.replacing = argv, env, True
        with suppress(OSError):  # it is saved once more when it runs
            service.save()
        if service.process:
            _signal(service.process, signal.SIGKILL)

    async def _keep(self, service: _Service) -> None:
        """Follow one service to its end, whatever goes wrong: no memory or descriptor ends the manager."""
        complaint = ""
        while True:
            try:
                return await self._follow(service)
            except (TmemError, OSError, MemoryError, RuntimeError) as error:
                if complaint != str(error):  # once
                    _log.warning("%s: %s", service.name, error)
                complaint = str(error)
            await trio.sleep(_TROUBLED_S)

    async def _follow(self, service: _Service) -> None:
        """Follow one service until it is to stop and has stopped, or has nobody left to serve."""
        delay_s = 0.0
        while True:
            ended = ""
            if service.process:
                await _ended(service.process)
                code = processes.reap(service.process.pid)
                ended = "ended" if code is None else f"ended with status {code}"
                service.process = None
                if service.replacing or trio.current_time() - service.started_s > _SETTLED_S:
                    delay_s = 0.0
            left = not service.stopping and self._has_left(service.client)
            if left:
                _log.info("%s: %s; forgotten, for its client is gone", service.name, ended or "does not run")
            elif service.stopping or service.replacing:
                _log.info("%s: %s", service.name, ended or "does not run")
            elif ended:
                said = processes.last_line(service.output) or "no output"
                _log.warning("%s: %s (%s)", service.name, ended, said)
            if not service.stopping and not left and delay_s:
                with trio.move_on_after(delay_s):
                    await service.asked_to_stop.wait()
            if service.stopping or left:
                break
            delay_s = min(max(delay_s * 2, _FIRST_DELAY_S), _LONGEST_DELAY_S)
            service.replacing = False
            try:
                self._start(service)
            except (ServiceError, OSError) as error:
                _log.warning("%s: %s", service.name, error)
        service.record.unlink(missing_ok=True)
        service.output.unlink(missing_ok=True)
        del self._services[service.name]
        service.gone.set()

    def _has_left(self, client: str | None) -> bool:
        """Say whether the client is not in the segment, or has departed from it."""
        if client is None:
            return False
        from tmem.backends import _native

        try:
            segment = _native.attach(str(self._paths.segment))
        except (SegmentError, OSError):
            return False
        try:
            return segment.client(client, create=False).phase == "departed"
        except PoolError:
            return True
        except SegmentError:  # no room for another thread there
            return False
        finally:
            segment.close()

    def _start(self, service: _Service) -> None:
        # Before the start too: what is started without a record is found by its marker. Where there is no
        # room for a record, on a tmpfs that is full, a server matters more.
        with suppress(OSError):
            service.save()
        service.trim_output()
        environment = {**os.environ, **service.env, MARKER: str(service.record)}
        pid = processes.spawn(service.argv, environment, service.output)
        service.starts += 1
        service.started_s = trio.current_time()
        # None when it has ended already: then the zombie is ours, and its pid is pinned.
        service.process = Process.of(pid) or Process(pid, -1)
        with suppress(OSError):
            service.save()
        _log.info("%s: started, pid %d", service.name, pid)


def _load(path: Path) -> _Service | None:
    """Return the service of a record, its process only if that still runs; None if nobody can read it."""
    try:
        value = json.loads(path.read_text())
        process = Process(**value["process"]) if value["process"] else None
        service = _Service(
            value["name"],
            value["argv"],
            value["env"],
            value.get("client"),
            path,
            stopping=value["stopping"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s is damaged and left alone (%s)", path, error)
        return None
    if service.stopping:
        service.asked_to_stop.set()
    service.process = process if process is not None and process.alive else None
    return service


def _find_marked(record: Path) -> Process | None:
    """Return the running process that was started for `record`: the session leader with its marker."""
    wanted = f"{MARKER}={record}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with suppress(OSError):
            if wanted in (directory / "environ").read_bytes().split(b"\0") and os.getsid(pid) == pid:
                return Process.of(pid)
    return None


def _signal(process: Process, number: signal.Signals) -> None:
    descriptor = process.open_pidfd()
    if descriptor is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


async def _ended(process: Process) -> None:
    """Return when `process` has ended."""
    descriptor = process.open_pidfd()
    if descriptor is None:
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        trio.lowlevel.notify_closing(descriptor)
        os.close(descriptor)
