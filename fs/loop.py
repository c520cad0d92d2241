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
import select
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyfuse3
import trio

_TRIO_EVERY = 32  # requests; so that deadlines are seen under full load. A power of two.
_LONGEST_WAIT_SECONDS = 1.0
_MAX_TASKS = 99
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


class Readers:
    """Runs the tasks that read requests, with the `fast` loop or the plain one."""

    def __init__(self, fast: bool = True) -> None:
        self._wants_fast = fast
        self._fast = False
        self._installed = False
        self._session = -1
        self._nursery: trio.Nursery | None = None
        self._stopping = False
        self._idle = 0
        self._starting = False
        self._waiting = 0
        self._count = 0
        self._runner: Any = None  # trio's, without a public name
        self._poll = select.poll()

    def install(self) -> bool:
        """Take the place of pyfuse3's way to wait, before `pyfuse3.init`; False if it has another one.

        It then waits as it likes: slower, and `stop` cannot be used.
        """
        if not hasattr(pyfuse3, "_session_loop") or getattr(pyfuse3, "trio", None) is not trio:
            return False
        lowlevel = types.SimpleNamespace(
            wait_readable=self._wait_readable,
            notify_closing=trio.lowlevel.notify_closing,
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

    async def serve(self, session: int) -> None:
        """Serve requests on the descriptor `session` until unmounted, `pyfuse3.terminate`, or stopped.

        Returns when every request that was read has been answered. Can be called again after `stop`.
        """
        self._session = session
        self._stopping = self._starting = False
        if not self._installed:
            await pyfuse3.main(1, _MAX_TASKS)
            return
        self._fast = self._wants_fast and self._find_trio(session)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start(nursery)
        finally:
            self._nursery = None

    def stop(self) -> None:
        """Read no more requests; `serve` returns once those in hand are answered."""
        self._stopping = True
        trio.lowlevel.notify_closing(self._session)  # wakes who waits for one; nothing is closed

    def resume(self) -> bool:
        """Read requests again after all; False if `serve` has returned (or is about to)."""
        if self._nursery is None or not self._nursery.child_tasks:
            return False
        self._stopping = False
        self._have_one_idle(plainly=True)
        return True

    def _have_one_idle(self, plainly: bool = False) -> None:
        # The plain loop starts readers by itself, from one that has read a request.
        if (self._fast or plainly) and not (self._idle or self._starting or self._stopping):
            assert self._nursery is not None
            self._start(self._nursery)

    def _start(self, nursery: trio.Nursery) -> None:
        self._starting = True
        # In the fast loop no idle readers are kept, and none is started by pyfuse3 itself: its count of tasks
        # sinks with each one of ours that ends, so the bound must be below anything that it can reach.
        bounds = (0, _NEVER) if self._fast else (1, _MAX_TASKS)
        nursery.start_soon(pyfuse3._session_loop, nursery, *bounds)  # type: ignore[attr-defined]

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
        return True

    async def _wait_readable(self, descriptor: int) -> None:
        self._starting = False
        self._raise_if_stopping()
        self._idle += 1
        try:
            runner = self._runner
            self._count += 1
            # A handler whose worker thread is done may be due in this very turn of the scheduler, which
            # cannot be seen from here: so while one waits, wait as trio does.
            if self._fast and not self._waiting and self._count % _TRIO_EVERY and not runner.runq:
                seconds = runner.deadlines.next_deadline() - runner.clock.current_time()
                for ready, _ in self._poll.poll(min(max(seconds, 0), _LONGEST_WAIT_SECONDS) * 1000):
                    if ready == descriptor:
                        return
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            self._idle -= 1
        self._raise_if_stopping()  # from here until the request is read nothing else runs

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise trio.ClosedResourceError("left to whoever reads next")  # ends pyfuse3's reader
