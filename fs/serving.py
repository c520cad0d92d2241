"""Serve one mount: connect with the kernel, read requests, react to signals, until it is unmounted.

The same for a mount that is new and for one that other code has served until now (`takeover`). SIGTERM,
SIGINT and SIGHUP unmount, lazily if files are open, and end it; SIGUSR1 replaces the code (`restart`). Not
for what comes before and after: `mount`. Threading: the main thread.
"""

import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pyfuse3
import trio

from tmem.backends.processes import start_ticks
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TmemError
from tmem.fs import device, memory, mounts, restart
from tmem.fs.caching import CacheRule
from tmem.fs.device import Device
from tmem.fs.fanotify import Events
from tmem.fs.identity import has_common_names
from tmem.fs.lastresort import LastResort
from tmem.fs.loop import Readers
from tmem.fs.options import Loop, Passthrough, Uring, Watching
from tmem.fs.overlay import Overlay, build
from tmem.fs.plan import Plan
from tmem.fs.precache import Precache
from tmem.fs.reading import Reading
from tmem.fs.restart import Restarter
from tmem.fs.state import SavedRestarts
from tmem.fs.tasks import Telling, telling

log = logging.getLogger(__name__)


class Server:
    """One mount's overlay and what runs it.

    `root` is the lower directory's descriptor (O_RDONLY), owned from now on. `fine_stamps` as for `build`.
    """

    def __init__(self, plan: Plan, root: int, fine_stamps: bool | None = None) -> None:
        self.plan = plan
        self.precache = Precache(plan.paths, plan.options.client, plan.options.shared)
        self._readers = Readers(fast=plan.options.loop is not Loop.PLAIN, failed=self._failed)
        self._cache = CacheRule(plan.options.cache)
        self._ending = False
        self._detached = False
        self._failure: BaseException | None = None
        self._last_resort: LastResort | None = None
        self._going_on = trio.Event()  # set when a restart that had stopped everything failed
        self.overlay: Overlay = build(
            root,
            self.precache,
            timeout_seconds=plan.options.timeout_seconds,
            cached=self._cache,
            most_cached=self._cache.most_bytes,
            waiting=self._readers.waiting,
            policy=plan.options.policy,
            fine_stamps=fine_stamps,
        )

    def attach(self, mounted: Device) -> None:
        """Make libfuse's session on the device's end."""
        self._readers.install()
        pyfuse3.init(self.overlay, f"/dev/fd/{mounted.session}", set())
        if self.plan.options.loop in (Loop.AUTO, Loop.NATIVE) and self._readers.can_stop:
            mounted.read_natively = mounted.make_room()
            if not mounted.read_natively:
                log.warning("no native reader: net.core.wmem_max is below 80 KiB")
        if not mounted.request:  # else the kernel was told by the code before
            wanted = self.plan.options.passthrough is Passthrough.AUTO and os.geteuid() == 0
            mounted.wants_passthrough = wanted and mounted.read_natively
            mounted.wants_rings = self.plan.options.io_uring is Uring.ON and mounted.read_natively

    @property
    def can_restart(self) -> bool:
        """Whether the code can be replaced; known after `attach`."""
        return self._readers.can_stop

    def run(
        self,
        mount: Callable[[], Device],
        restarts: SavedRestarts | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve the device that `mount` makes until it is unmounted, then close it and the overlay.

        `ready` is called once it answers; `restarts` comes from the code before. AttachError, ClaimError.
        """
        memory.small_stacks()
        self._last_resort = LastResort(self.plan.successor.drain_seconds)
        old_umask = os.umask(0)  # the kernel has applied the caller's
        try:
            self.precache.claim()
            if self.plan.options.tier is not None:
                self._ask_beyond(self.plan.options.tier)
            if restarts is None and self.plan.options.watch is Watching.AUTO:
                self.overlay.watch_with(Events.of(self.overlay.table.root))
            with _record(self.plan):
                self._run(mount(), Restarter(self.plan, self.overlay, restarts), ready)
        finally:
            os.umask(old_umask)
            self.overlay.close()  # may wait for the lower directory, too
            self._last_resort.close()

    def _ask_beyond(self, url: str) -> None:
        from tmem.fs.beyond import TIMEOUT_SECONDS, Beyond  # megabytes, which mounts without it do not need

        if not has_common_names(self.overlay.table.root):  # mounted by code that did not know
            log.warning(
                "what other hosts have read is not asked for: their names of files are others on FUSE"
            )
            return
        shared = self.plan.options.shared
        assert shared is not None, "options say so"
        address = RedisAddress.parse(url, TIMEOUT_SECONDS)
        self.overlay.ask_beyond(Beyond(address, shared, self.plan.options.settled_seconds))

    def _run(self, mounted: Device, restarter: Restarter, ready: Callable[[], None]) -> None:
        try:
            self.attach(mounted)
            try:
                trio.run(self._main, mounted, restarter, ready)
            finally:
                pyfuse3.close(unmount=False)
                mounted.session = -1  # closed by libfuse
        finally:
            # Closing the device ends the connection; what is then still mounted there is a dead mount.
            mounted.close()
            mounts.sweep(self.plan.mountpoint)

    async def _main(self, mounted: Device, restarter: Restarter, ready: Callable[[], None]) -> None:
        await (device.take_over if mounted.request else device.negotiate)(mounted)
        self._cache.settle(mounted.direct_mmap)
        self.overlay.connect(mounted.fuse, mounted.request)
        reading = Reading(mounted) if mounted.read_natively else None
        self.overlay.read_by(reading)
        try:
            await self._serve(mounted, restarter, ready, reading)
        finally:
            self.overlay.read_by(None)
            if reading is not None:
                reading.end()

    async def _serve(
        self,
        mounted: Device,
        restarter: Restarter,
        ready: Callable[[], None],
        reading: Reading | None,
    ) -> None:
        if self.plan.locked:
            memory.lock(self.plan.paths.segment)
        if reading is not None:
            reading.begin()
        # trio hands signals that nobody has looked at to the handler of before, which would end the process.
        signal.signal(restart.SIGNAL, _too_late)
        assert self._last_resort is not None
        with (
            trio.open_signal_receiver(*restart.SIGNALS) as signals,
            self._last_resort.listening(lambda: self._give_up(mounted)),
        ):
            async with trio.open_nursery() as nursery:
                tasks = Telling(nursery, self._failed)
                tasks.start_soon(self._obey, signals, restarter, nursery)
                if self.overlay.watch is not None:
                    tasks.start_soon(self.overlay.watch.run)
                with telling(self._failed):
                    restarter.serving(mounted)
                    ready()
                    while True:
                        await self._readers.serve(mounted.session, reading)
                        if self._ending or not self._readers.stopping:
                            break
                        with self._last_resort.deaf():
                            restarter.become()
                        self._going_on.set()
                nursery.cancel_scope.cancel()

    async def _obey(self, signals: AsyncIterator[int], restarter: Restarter, nursery: trio.Nursery) -> None:
        async for number in signals:
            if number != restart.SIGNAL:
                await self._end(number)
                return
            if not self.overlay.restarts.under_way:
                await nursery.start(self._restart, restarter)

    async def _end(self, number: int) -> None:
        log.info("signal %d: unmounting %s", number, self.plan.mountpoint)
        self._ending = True
        alone = trio.CapacityLimiter(1)  # the usual threads may all wait for the lower directory
        try:
            await trio.to_thread.run_sync(mounts.detach, self.plan.mountpoint, limiter=alone)
            self._detached = True
        except TmemError as error:
            log.warning("%s", error)
        pyfuse3.terminate()

    def _failed(self, error: BaseException) -> None:
        """Have it all end in time: the tasks that are left, and then threads, may wait for the lower."""
        assert self._last_resort is not None
        self._failure = error
        self._last_resort.end()

    def _give_up(self, mounted: Device) -> None:
        """Unmount from outside the event loop, which does not come back."""
        if self._failure is not None:  # else it is told when all has ended
            log.error("the mount of %s failed", self.plan.lower, exc_info=self._failure)
        if not self._detached:
            mounts.detach(self.plan.mountpoint)
        mounted.abandon()

    async def _restart(
        self, restarter: Restarter, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with telling(self._failed):
            await self._restart_telling(restarter, task_status)

    async def _restart_telling(self, restarter: Restarter, task_status: trio.TaskStatus[None]) -> None:
        restarter.begin()
        task_status.started()
        if not self.can_restart:
            restarter.failed("this pyfuse3 differs from what a restart needs: unmount and mount again")
            return
        if self.overlay.reading is not None and self.overlay.reading.rings is not None:
            restarter.failed("what comes over io_uring cannot be handed over: unmount and mount again")
            return
        if not await restarter.check() or self._ending:
            return
        self._going_on = trio.Event()
        restarter.stopped()
        self._readers.stop()
        with trio.move_on_after(self.plan.successor.drain_seconds):
            await self._going_on.wait()  # or be cancelled by the end of it all
            return
        if self._readers.resume():
            restarter.failed(
                f"requests took longer than {self.plan.successor.drain_seconds:g} s: try again later"
            )


def _too_late(number: int, frame: object) -> None:
    """Take a request to restart that came when the mount was ending."""


@contextlib.contextmanager
def _record(plan: Plan) -> Iterator[None]:
    """Keep a record of the mount beside the segment, if there is one, for commands that list mounts."""
    path = plan.paths.record("mount", plan.options.client)
    record = {
        "client": plan.options.client,
        "lower": plan.lower,
        "mountpoint": plan.mountpoint,
        "pid": os.getpid(),
        "start_ticks": start_ticks(os.getpid()),
        "tier": RedisAddress.shown(plan.options.tier) if plan.options.tier else None,
    }
    written = False
    if plan.paths.state.is_dir():
        partial = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(record) + "\n")
            partial.replace(path)  # readers never see half a record
            written = True
    try:
        yield
    finally:
        if written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
