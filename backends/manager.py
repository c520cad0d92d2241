"""The manager service of a segment: everything that must happen while nobody asks for a page.

Every second it repairs what dead threads left, refills the reserve of backed memory, moves pages together
where many were freed, and gives back what is free beyond the reserve; it keeps the segment as large as the
machine can spare (`resizing`), stores cold pages smaller (`condensing`), keeps the servers running, and
answers on the control socket, to its own user and root only. It is not in the data path: while it is down,
puts, gets and flushes go on, and the servers that it started stay. One manager per segment, held by a lock
file. Threading: one trio run; calls of the core that may take long run in worker threads. The protocol stands
in `service`.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio

from tmem.backends import locking, notify, scraping
from tmem.backends.compacting import Compactor
from tmem.backends.condensing import Condenser
from tmem.backends.demotion import Demotion
from tmem.backends.paths import SegmentPaths
from tmem.backends.prefetching import Room
from tmem.backends.repatriator import Repatriator
from tmem.backends.resizing import Resizer
from tmem.backends.service import MAX_LINE_BYTES, socket_address
from tmem.backends.settling import Settler, Wanted
from tmem.backends.supervisor import Supervisor
from tmem.backends.tierlooks import TierFigures
from tmem.errors import ServiceError, TmemError

if TYPE_CHECKING:
    from tmem.backends import _native

PERIOD_S = 1.0
HURRY_S = 0.1
"""The period while puts use up more than half of the reserve within one, or half of the memory is holes."""

_METRICS_TIMEOUT_S = 10.0
_TROUBLES = (TmemError, OSError, MemoryError, RuntimeError)
"""After which house is kept on; the last: no thread can be started."""

_UCRED = struct.Struct("iII")

_log = logging.getLogger(__name__)


@dataclass
class ManagerStatistics:
    """What a manager has done since it started."""

    reaped: int = 0
    """Dead threads that it repaired."""
    populated_bytes: int = 0
    """Memory that it backed ahead of puts."""
    trimmed_bytes: int = 0
    """Free memory that it gave back to the system."""
    demoted_pages: int = 0
    """Persistent pages that it moved to tiers."""
    demoted_cold_pages: int = 0
    """Of those, pages that nobody had used for long, while there was memory."""
    prefetched_pages: int = 0
    """Pages that it brought back from tiers because there was plenty of memory."""
    prefetching_ns: int = 0
    """How long that took, mostly reading from tiers."""


class Reserve:
    """How much free memory of a segment to keep backed: it follows what puts use up.

    Backing a chunk costs a put 1 to 4 us per page, and a server that has to do it under memory pressure may
    wait for itself; memory that waits backed is missing elsewhere. So the reserve is a 64th of the segment
    (at most 8 MiB) while little happens. It doubles while puts use up more than half of it between two looks,
    up to an eighth (at most 64 MiB: what a fast swap-out compresses in half a second), and halves when they
    use none. While this machine swaps to the segment it never falls below half of that: a kernel begins to
    swap when there is no memory left to be backed.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._usual = min(memory_bytes // 64, 8 << 20)
        self._most = min(memory_bytes // 8, 64 << 20)
        self._least = self.size_bytes = self._usual

    def serve_local(self, local: bool) -> None:
        """Say whether this machine swaps to the segment."""
        self._least = self._most // 2 if local else self._usual
        self.size_bytes = max(self.size_bytes, self._least)

    def follow(self, used_bytes: int) -> bool:
        """Adapt to `used_bytes` since the last look; True if the next look should come soon."""
        hurry = used_bytes * 2 > self.size_bytes
        if hurry:
            self.size_bytes = min(self.size_bytes * 2, self._most)
        elif used_bytes == 0:
            self.size_bytes = max(self.size_bytes // 2, self._least)
        return hurry


def run(
    paths: SegmentPaths,
    segment: "_native.Segment",
    settings: Wanted = lambda name: {},
    metrics: list[str] | None = None,
    repatriation: tuple[int, list[str]] = (0, []),
) -> bool:
    """Run the manager until it is told to stop, by SIGINT, SIGTERM or the control socket.

    `settings` says what clients are to have, by their names; `metrics` is the command that serves metrics, if
    somebody is to. `repatriation` says for how many seconds memory must have been in plenty before this
    machine's swapped-out pages come back (0: they do not), and by which command.

    True if the process is to go on as a new manager, of the code that is installed by now.

    Raises `ServiceError` if a manager of this segment runs already.
    """
    with _exclusive(paths):
        _lock_memory(paths)
        manager = _Manager(paths, segment, settings, metrics, Repatriator(paths, segment, *repatriation))
        trio.run(manager.run)
    return manager.renewed


class _Manager:
    """One run of the manager."""

    def __init__(
        self,
        paths: SegmentPaths,
        segment: "_native.Segment",
        settings: Wanted,
        metrics: list[str] | None,
        repatriator: Repatriator,
    ) -> None:
        self.statistics = ManagerStatistics()
        self._paths = paths
        self._segment = segment
        self._reserve = Reserve(segment.memory_bytes)
        self._settler = Settler(settings)
        self._compactor = Compactor(segment)
        self._resizer = Resizer(segment, lambda: self._reserve.size_bytes, self._is_local)
        self._condenser = Condenser(segment)
        self._repatriator = repatriator
        self._metrics = metrics
        self._since_ns = time.monotonic_ns()
        self._scope = trio.CancelScope()
        self._complaint = ""
        self._tier_problems: dict[str, str] = {}
        """Why pages of clients stay in memory although they have a tier, by the client's name."""
        self._tiers: Callable[[], dict[str, TierFigures]] = dict
        """Says what was seen of tiers last; it waits for none."""
        self._stopping = False
        self.renewed = False
        self._operations: dict[str, Callable[[dict[str, object]], Awaitable[dict[str, object]]]] = {
            "ping": self._ping,
            "renew": self._renew,
            "restart": self._restart,
            "services": self._list_services,
            "stop": self._stop,
            "supervise": self._supervise,
            "unsupervise": self._unsupervise,
        }

    async def run(self) -> None:
        control = self._paths.control
        control.unlink(missing_ok=True)  # a killed manager leaves its socket; the lock says it is dead
        with self._scope, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                self._supervisor = Supervisor(self._paths, nursery)
                self._supervisor.adopt()
                nursery.start_soon(self._follow_signals, signals)
                nursery.start_soon(self._keep_house)
                nursery.start_soon(self._resizer.run)
                nursery.start_soon(self._condense)
                nursery.start_soon(self._serve_metrics)
                nursery.start_soon(self._demote)
                nursery.start_soon(self._repatriator.run)
                with trio.socket.socket(trio.socket.AF_UNIX) as listening:
                    with socket_address(control) as address:
                        await listening.bind(address)
                    listening.listen()
                    notify.ready()  # whoever waits for the service may connect from now on
                    _log.info("manager of segment %r runs, pid %d", self._paths.name, os.getpid())
                    await trio.serve_listeners(self._answer, [trio.SocketListener(listening)])
        control.unlink(missing_ok=True)
        _log.info("manager of segment %r stopped; pages and servers stay", self._paths.name)

    async def _follow_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            _log.info("%s", signal.Signals(number).name)
            self._scope.cancel()

    async def _serve_metrics(self) -> None:
        """Have a process serve metrics, or none: one that was left behind is replaced, or ended."""
        try:
            if not self._metrics:
                await self._supervisor.unsupervise(scraping.NAME, _METRICS_TIMEOUT_S)
            elif self._supervisor.keeps(scraping.NAME):
                self._supervisor.restart(scraping.NAME, self._metrics, {})
            else:
                self._supervisor.supervise(scraping.NAME, self._metrics, {})
        except ServiceError as error:  # nothing that anybody's pages depend on
            _log.warning("%s: %s", scraping.NAME, error)

    # -- housekeeping

    async def _keep_house(self) -> None:
        while True:
            if not self._segment.alive:
                _log.info("segment %r was destroyed", self._paths.name)
                self._scope.cancel()
            hurry = False
            try:
                hurry = self._reserve.follow(await self._tend())
                if not hurry:
                    await trio.to_thread.run_sync(self._compactor.step)
                self._complaint = ""
            except _TROUBLES as error:
                if str(error) != self._complaint:  # once, not every second
                    _log.warning("housekeeping: %s", error)
                self._complaint = str(error)
            await trio.sleep(HURRY_S if hurry or self._compactor.many_holes else PERIOD_S)

    async def _condense(self) -> None:
        while True:
            await trio.sleep(PERIOD_S)
            try:
                await trio.to_thread.run_sync(self._condenser.step)
            except _TROUBLES as error:  # perhaps it is ending
                _log.info("cold pages: %s", error)
                await trio.sleep(10 * PERIOD_S)

    async def _tend(self) -> int:
        """Do one round; return the bytes that had to be populated."""
        counts = self.statistics
        self._supervisor.trim_outputs()
        self._reserve.serve_local(self._is_local())
        if dead := self._segment.reap():
            counts.reaped += dead
            _log.warning("repaired what %d dead threads left", dead)
        self._settler.look(self._segment)
        # Beyond the limit nothing is backed ahead, but for a machine that swaps to it.
        room = max(self._segment.limits[self._is_local()] - self._segment.occupied[0], 0)
        wanted = min(self._reserve.size_bytes, room)
        added = await trio.to_thread.run_sync(self._segment.populate, wanted)
        counts.populated_bytes += added
        # Twice the reserve, so that a load which frees and takes does not fault the same memory in each
        # second.
        counts.trimmed_bytes += await trio.to_thread.run_sync(
            self._segment.trim, 2 * self._reserve.size_bytes
        )
        return added

    def _is_local(self) -> bool:
        """Say whether this machine swaps to the segment."""
        return self._supervisor.keeps("keeper-")

    async def _demote(self) -> None:
        """Move cold persistent pages to the tiers of their clients (`demotion`), and back."""
        demotion = Demotion(self._paths, self._segment, room=Room(self._segment))
        self._tiers = demotion.tiers
        complaint = ""
        try:
            while True:
                hurry = False
                try:
                    hurry = await trio.to_thread.run_sync(demotion.round)
                    complaint = ""
                except _TROUBLES as error:
                    if str(error) != complaint:  # once
                        _log.warning("tiers: %s", error)
                    complaint = str(error)
                self.statistics.demoted_pages = demotion.demoted_pages
                self.statistics.demoted_cold_pages = demotion.cold_pages
                self.statistics.prefetched_pages = demotion.prefetched_pages
                self.statistics.prefetching_ns = demotion.prefetching_ns
                self._tier_problems = demotion.problems()
                await trio.sleep(HURRY_S if hurry else PERIOD_S)
        finally:
            demotion.close()

    # -- the control socket

    async def _answer(self, stream: trio.SocketStream) -> None:
        """Serve one connection: a JSON object a line, an answer each, in order."""
        pending = bytearray()
        try:
            # Others cannot open the socket unless somebody opens its directory to them.
            stranger = _user_of(stream) not in (0, os.geteuid())
            refusal = {"error": f"the manager is of user {os.geteuid()}: run this as that user or as root"}
            async for received in stream:
                pending += received
                while (end := pending.find(b"\n")) >= 0:
                    line = bytes(pending[:end])
                    del pending[: end + 1]
                    answer = refusal if stranger else await self._handle(line)
                    await stream.send_all(json.dumps(answer).encode() + b"\n")
                    if self._stopping:
                        self._scope.cancel()
                if len(pending) > MAX_LINE_BYTES:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # whoever asked did not wait for the answer
        finally:
            await trio.aclose_forcefully(stream)

    async def _handle(self, line: bytes) -> dict[str, object]:
        try:
            message = json.loads(line)
            operation = self._operations[message["op"]]
        except (ValueError, TypeError, KeyError):
            return {"error": "the manager does not know this request: are both of the same version?"}
        try:
            return {"ok": True, **await operation(message)}
        except TmemError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"request {message['op']!r} lacks or misuses {error}"}
        except (OSError, MemoryError, RuntimeError) as error:  # which must not end the manager
            _log.exception("request %r failed", message["op"])
            return {"error": f"the manager failed: {error}"}

    async def _ping(self, message: dict[str, object]) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "since_ns": self._since_ns,
            "segment": self._paths.name,
            "complaint": self._complaint,
            "tier_problems": self._tier_problems,
            "tiers": {name: asdict(figures) for name, figures in self._tiers().items()},
            "statistics": asdict(self.statistics)
            | asdict(self._resizer.statistics)
            | asdict(self._compactor.statistics + self._condenser.statistics)
            | self._condenser.figures()
            | asdict(self._repatriator.statistics),
        }

    async def _list_services(self, message: dict[str, object]) -> dict[str, object]:
        return {"services": [asdict(service) for service in self._supervisor.statistics()]}

    async def _renew(self, message: dict[str, object]) -> dict[str, object]:
        self.renewed = True
        return await self._stop(message)

    async def _stop(self, message: dict[str, object]) -> dict[str, object]:
        self._stopping = True
        return {"pid": os.getpid()}

    async def _restart(self, message: dict[str, object]) -> dict[str, object]:
        self._supervisor.restart(_text(message, "name"), *_command(message))
        return {}

    async def _supervise(self, message: dict[str, object]) -> dict[str, object]:
        argv, env = _command(message)
        client = _text(message, "client") if "client" in message else None
        return {"pid": self._supervisor.supervise(_text(message, "name"), argv, env, client)}

    async def _unsupervise(self, message: dict[str, object]) -> dict[str, object]:
        timeout_s = message["timeout_s"]
        if not isinstance(timeout_s, int | float):
            raise TypeError("timeout_s")
        return {"found": await self._supervisor.unsupervise(_text(message, "name"), timeout_s)}


def _user_of(stream: trio.SocketStream) -> int:
    """Return the user id with which the other side of a Unix socket connected."""
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _pid, uid, _gid = _UCRED.unpack(credentials)
    return int(uid)


def _command(message: dict[str, object]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment of a message that starts something."""
    argv, env = message["argv"], message.get("env", {})
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise TypeError("argv")
    if not isinstance(env, dict) or not all(isinstance(word, str) for word in env.values()):
        raise TypeError("env")
    return argv, env


def _text(message: dict[str, object], key: str) -> str:
    value = message[key]
    if not isinstance(value, str):
        raise TypeError(key)
    return value


@contextmanager
def _exclusive(paths: SegmentPaths) -> Iterator[None]:
    """Hold the lock that makes this process the only manager of the segment."""
    descriptor = os.open(paths.state / "manager.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise ServiceError(
                f"a manager runs already for segment {paths.name!r} (pid {holder}): "
                f"stop it with 'tmem --name {paths.name} stop'"
            ) from None
        # For people only: no reason to fail where the tmpfs is full. What is written over needs no room.
        with suppress(OSError):
            os.pwrite(descriptor, f"{os.getpid():<15}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock_memory(paths: SegmentPaths) -> None:
    """Lock this process's memory: who refills the reserve must not be in swap.

    It takes 4 ms, and 6 MiB more than to lock what has been touched (32 instead of 26 MiB). Of the segment,
    where it could be swapped out, what this process maps is locked as well, which is what waits in the
    reserve. What is mapped from now on is locked as it is touched: to look into the segment once more must
    not back all of it.
    """
    swappable = locking.swappable(paths.segment)
    report = locking.lock_process(paths.segment, swappable, future_on_fault=True)
    if report.refused:
        _log.info("memory is not all locked (%s): fine unless this machine swaps to it", report.refused[0])
