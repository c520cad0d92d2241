"""How the daemon waits for requests: pyfuse3's own way, or one that costs half as much.

pyfuse3 waits through trio, which costs about 16 of the 27 us of a small read that hits. The fast loop polls
the FUSE device and trio's epoll descriptor together, as long as no handler waits for a worker thread, and
lets trio run at least every 32nd request. It works with one idle reader: a handler that is going to wait (for
a worker thread) has another one started by `waiting`, and a surplus one ends by pyfuse3's own rule. trio
stays in charge: results of worker threads and signals arrive through its epoll descriptor. This reads
internals of trio and pyfuse3; `install` tries them out, and where they look different the plain loop runs.

Both loops can be told to `stop` reading: what has been read is answered, what has not stays with the kernel
for whoever reads next. (`pyfuse3.terminate` may lose a request: one that is read after it is thrown away.)
Threading: the event loop's thread.
"""

import contextlib
import math
import select
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyfuse3
import trio

from tmem.fs.reading import ASKED, GONE, NOTHING, REQUEST, Reading
from tmem.fs.tasks import Failed, Telling

_TRIO_EVERY = 32  # requests; so that deadlines are seen under full load
_LONGEST_WAIT_SECONDS = 1.0
_MAX_TASKS = 99
_PAUSE_SECONDS = 0.001
_NEVER = -(1 << 31)


class _FastLock:
    """pyfuse3's read lock without trio's checkpoint, which costs a turn of the scheduler per request."""

    def __init__(self) -> None:
        self._locked = False
        self._waiting: deque[trio.Event] = deque()

    async def __aenter__(self) -> None:
        while self._locked:
            event = trio.Event()
            self._waiting.append(event)
            await event.wait()
        self._locked = True

    async def __aexit__(self, *_: object) -> None:
        self._locked = False
        if self._waiting:
            self._waiting.popleft().set()


class _Due(trio.abc.Instrument):
    """The tasks that trio is about to run, some of them in the turn of the scheduler that is under way."""

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.tasks.discard(task)


class Readers:
    """Runs the tasks that read requests, with the `fast` loop or the plain one; `failed`: see `tasks`."""

    def __init__(self, fast: bool = True, failed: Failed = lambda error: None) -> None:
        self._failed = failed
        self._wants_fast = fast
        self._fast = False
        self._installed = False
        self._session = -1
        self._reading: Reading | None = None
        self._awaited = -1  # the descriptor that is readable when there is something to do
        self._epoll = -1  # trio's
        self._nursery: trio.Nursery | None = None
        self._stopping = False
        self._ended = False
        self._idle = 0
        self._starting = False
        self._waiting = 0
        self._count = 0
        self._runner: Any = None  # trio's, without a public name
        self._poll = select.poll()
        self._due = _Due()

    def install(self) -> bool:
        """Take the place of pyfuse3's way to wait, before `pyfuse3.init`; False if it has another one.

        It then waits as it likes: slower, and `stop` cannot be used.
        """
        if not hasattr(pyfuse3, "_session_loop") or getattr(pyfuse3, "trio", None) is not trio:
            return False
        lowlevel = types.SimpleNamespace(
            wait_readable=self._wait_readable,
            notify_closing=self._notify_closing,
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
        )
        # The module's own global, which its compiled code looks up by name, as pyfuse3.asyncio relies on too.
        pyfuse3.trio = types.SimpleNamespace(  # type: ignore[attr-defined]
            lowlevel=lowlevel,
            Lock=_FastLock if self._wants_fast else trio.Lock,
            ClosedResourceError=trio.ClosedResourceError,
            open_nursery=trio.open_nursery,
        )
        self._installed = True
        return True

    @property
    def can_stop(self) -> bool:
        """Whether `stop` works: pyfuse3 is as `install` wants it."""
        return self._installed

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called, and not `resume` after it."""
        return self._stopping

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Bracket a handler's wait for a worker thread; another task reads requests meanwhile."""
        self._waiting += 1
        self._have_one_idle()
        try:
            yield
        finally:
            self._waiting -= 1

    async def serve(self, session: int, reading: "Reading | None" = None) -> None:
        """Serve requests on the descriptor `session` until unmounted, `pyfuse3.terminate`, or stopped.

        With `reading`, `session` is a socket, and the native reader reads the device. Returns when every
        request that was read has been answered. Can be called again after `stop`.
        """
        self._session, self._reading = session, reading
        self._awaited = session if reading is None else reading.fileno()
        self._stopping = self._starting = self._ended = False
        if reading is not None:
            reading.reader.pause(False)
        if not self._installed:
            await pyfuse3.main(1, _MAX_TASKS)
            return
        self._fast = self._wants_fast and self._find_trio(session)
        trio.lowlevel.add_instrument(self._due)
        try:
            await trio.lowlevel.checkpoint()  # for those that are due already
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start(nursery)
        finally:
            trio.lowlevel.remove_instrument(self._due)
            self._nursery = None
            if reading is not None:
                reading.reader.drain()  # what the last handlers have replied

    def stop(self) -> None:
        """Read no more requests; `serve` returns once those in hand are answered."""
        self._stopping = True
        if self._reading is not None:
            self._reading.reader.pause(True)
        trio.lowlevel.notify_closing(self._awaited)  # wakes who waits for one; nothing is closed

    def resume(self) -> bool:
        """Read requests again after all; False if `serve` has returned (or is about to)."""
        if self._nursery is None or not self._nursery.child_tasks:
            return False
        self._stopping = False
        if self._reading is not None:
            self._reading.reader.pause(False)
        self._have_one_idle(plainly=True)
        return True

    def _have_one_idle(self, plainly: bool = False) -> None:
        # The plain loop starts readers by itself, from one that has read a request.
        if (self._fast or plainly) and not (self._idle or self._starting or self._stopping):
            assert self._nursery is not None
            self._start(self._nursery)

    def _start(self, nursery: trio.Nursery) -> None:
        self._starting = True
        tasks = Telling(nursery, self._failed)  # it starts others in it
        # In the fast loop no idle readers are kept, and none is started by pyfuse3 itself: its count of tasks
        # sinks with each one of ours that ends, so the bound must be below anything that it can reach.
        bounds = (0, _NEVER) if self._fast else (1, _MAX_TASKS)
        tasks.start_soon(pyfuse3._session_loop, tasks, *bounds)  # type: ignore[attr-defined]

    def _find_trio(self, session: int) -> bool:
        try:
            core: Any = trio._core
            runner = core._run.GLOBAL_RUN_CONTEXT.runner
            epoll = runner.io_manager._epoll.fileno()
            len(runner.runq)
            runner.deadlines.next_deadline() - runner.clock.current_time()
        except AttributeError:
            return False
        self._poll = select.poll()
        self._poll.register(epoll, select.POLLIN)
        self._poll.register(session, select.POLLIN)
        self._runner = runner
        self._epoll = epoll
        return True

    def _notify_closing(self, descriptor: int) -> None:
        # From pyfuse3.terminate, which knows only the session's end.
        self._ended = True
        trio.lowlevel.notify_closing(self._awaited if descriptor == self._session else descriptor)

    async def _wait_readable(self, descriptor: int) -> None:
        self._starting = False
        if self._reading is not None:
            await self._read_natively(self._reading)
            return
        self._raise_if_stopping()
        self._idle += 1
        try:
            if self._may_block():
                for ready, _ in self._poll.poll(self._seconds_left() * 1000):
                    if ready == descriptor:
                        return
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            self._idle -= 1
        self._raise_if_stopping()  # from here until the request is read nothing else runs

    async def _read_natively(self, reading: Reading) -> None:
        """Have the native reader answer hits, and answer shortcuts, until there is a request for pyfuse3."""
        self._idle += 1
        try:
            event = NOTHING
            while event != REQUEST:
                if event == GONE or self._ended:
                    raise trio.ClosedResourceError("unmounted")
                if event == ASKED:
                    self._count += max(self._answer(reading) - 1, 0)
                    event = NOTHING
                if self._stopping:
                    event = await self._leave(reading)
                elif self._may_block():
                    event = reading.serve(self._epoll, math.ceil(self._seconds_left() * 1000))
                if event == NOTHING and not self._stopping:  # or trio has something to do
                    if reading.reader.full:  # what is readable is not to be read
                        await trio.sleep(_PAUSE_SECONDS)
                    else:
                        with reading.awaited(), contextlib.suppress(trio.ClosedResourceError):
                            await trio.lowlevel.wait_readable(reading)
                    if not self._stopping and not self._ended:
                        event = reading.serve(-1, 0)
        finally:
            self._idle -= 1

    def _answer(self, reading: Reading) -> int:
        """Answer shortcuts that lie there; return how many."""
        assert self._nursery is not None
        return reading.answer(Telling(self._nursery, self._failed).start_soon)

    async def _leave(self, reading: Reading) -> int:
        """Read no more; return REQUEST if there is one all the same, and NOTHING if reading goes on.

        What has been read must be answered: by helpers, by handlers, by pyfuse3.
        """
        while self._stopping:
            reading.reader.drain()
            self._answer(reading)
            if reading.has_request():
                return REQUEST
            if not self._waiting and reading.reader.quiet:
                raise trio.ClosedResourceError("left to whoever reads next")
            await trio.sleep(_PAUSE_SECONDS)
        return NOTHING

    def _may_block(self) -> bool:
        """Say whether the event loop has nothing else to do."""
        self._count += 1
        if self._count >= _TRIO_EVERY:
            self._count = 0
            return False
        # Another task may be due in this very turn of the scheduler, and would wait as long as requests come.
        return self._fast and not self._waiting and not self._due.tasks

    def _seconds_left(self) -> float:
        seconds: float = self._runner.deadlines.next_deadline() - self._runner.clock.current_time()
        return min(max(seconds, 0), _LONGEST_WAIT_SECONDS)

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise trio.ClosedResourceError("left to whoever reads next")  # ends pyfuse3's reader
